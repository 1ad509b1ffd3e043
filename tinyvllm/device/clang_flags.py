"""Flags for clang, which takes half of a cold start on a CPU: it unrolls loops that gain nothing by it."""

from __future__ import annotations

import functools
import os
import re
import subprocess
from typing import Any

from tinygrad.runtime.support.compiler_cpu import ClangCompiler

# loops of known length stay loops above 100 instructions, and others become four copies at most
FEWER_COPIES = ("-mllvm", "-unroll-threshold=100", "-mllvm", "-unroll-max-count=4")
# in a kernel's name: a product with a dense matrix, which takes up to 1.13 times as long with them
DENSE = re.compile(r"void \w+_b?float\d+_\w+\(")

_compile = ClangCompiler.compile


def use_fewer_copies() -> None:
    """Have tinygrad's C compiler take FEWER_COPIES for kernels other than DENSE."""
    ClangCompiler.compile = _compile_kernel


def _compile_kernel(self: Any, source: str) -> bytes:
    if DENSE.search(source) or not knows_flags():
        return _compile(self, source)
    compiler = object.__new__(type(self))
    compiler.__dict__ = {**self.__dict__, "args": [*self.args, *FEWER_COPIES]}
    return _compile(compiler, source)


def knows_flags() -> bool:
    """Whether the compiler knows FEWER_COPIES. It is asked once, which takes 45 ms: what this process forks knows."""
    return _has_flags(os.environ.get("CC", "clang"))


@functools.cache
def _has_flags(compiler: str) -> bool:
    command = [compiler, *FEWER_COPIES, "-c", "-x", "c", "-", "-o", os.devnull]
    return subprocess.run(command, input=b"", capture_output=True, check=False).returncode == 0
