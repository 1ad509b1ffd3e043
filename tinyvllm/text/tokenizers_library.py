"""Calls of the tokenizers library, which may fail in ways that Python code does not expect.

Its panics are not an `Exception`, so they would end the thread. When it aborts, the process ends; so a risky file is
first tried in a process of its own.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import tokenizers

from tinyvllm.errors import ModelError
from tinyvllm.text.tokenizer_file import CheckedFile

TRIAL_S = 20  # of processor time
TRIAL_BYTES = 1 << 30  # of address space, beside `TRIAL_FACTOR` for each byte of the file
TRIAL_FACTOR = 64
# Texts on which a pattern that backtracks takes long
TRIAL = """
import resource, sys
limit_s, limit_bytes = int(sys.argv[1]), int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
resource.setrlimit(resource.RLIMIT_CPU, (limit_s, limit_s))
resource.setrlimit(resource.RLIMIT_AS, (limit_bytes, limit_bytes))
import tokenizers
try:
    backend = tokenizers.Tokenizer.from_buffer(sys.stdin.buffer.read())
    for unit in ("a", " ", "1", "\\n", "aA", "a ", "a1", "!", "\u00e9", "\u4e2d"):
        backend.encode(unit * 2000 + "\\0", add_special_tokens=False)
except BaseException as error:
    print(error, file=sys.stderr)
    sys.exit(1)
"""


@contextlib.contextmanager
def failures_as(make_error: Callable[[str], Exception]) -> Iterator[None]:
    """Turn the library's errors and panics into the error that `make_error` makes from their text."""
    try:
        yield
    except BaseException as error:
        # A panic is a pyo3_runtime.PanicException, which cannot be imported; errors are plain Exceptions
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        raise make_error(" ".join(str(error).split())[:300]) from error


def load(path: Path, file: CheckedFile) -> tokenizers.Tokenizer:
    """The tokenizer of a checked file. Raises ModelError."""
    if file.risk:
        try_apart(path, file)
    try:
        with failures_as(lambda text: ModelError(f"{path} is not a valid tokenizer: {text}")):
            return tokenizers.Tokenizer.from_buffer(file.data)
    except ValueError as error:
        raise ModelError(f"{path} is not a valid tokenizer: {str(error)[:300]}") from error


def try_apart(path: Path, file: CheckedFile) -> None:
    """Load a file in a process of its own, under limits of time and memory, and encode long texts. Raises ModelError if
    that fails."""
    limits = [str(TRIAL_S), str(TRIAL_BYTES + TRIAL_FACTOR * len(file.data))]
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", TRIAL, *limits], input=file.data, capture_output=True, timeout=3 * TRIAL_S
        )
    except subprocess.TimeoutExpired:
        raise ModelError(f"{path}: {file.risk}, and encoding a text takes more than {TRIAL_S} s") from None
    if done.returncode == 0:
        return
    lines = done.stderr.decode(errors="replace").splitlines()
    reason = lines[-1][:300] if lines else ""
    if done.returncode < 0:
        raise ModelError(
            f"{path}: {file.risk}, and the tokenizers library ends with signal {-done.returncode} on it within limits "
            f"of {limits[0]} s and {int(limits[1]) >> 20} MiB: {reason}"
        )
    raise ModelError(f"{path}: {file.risk}, and the tokenizers library cannot use it: {reason}")
