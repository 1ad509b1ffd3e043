"""Files that a benchmark's --json wrote, which may also be of another program, cut off or edited."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.errors import ConsoleError

from tinyvllm.errors import TinyvllmError

MAX_BYTES = 256 * 2**20


def read_result(path: str) -> Any:
    """The JSON value in a file. Raises TinyvllmError for what is not a regular file with JSON."""
    file = Path(path)
    try:
        if file.exists() and not file.is_file():  # a pipe or a device may have no end
            raise TinyvllmError(f"{path} cannot be read: it is not a regular file")
        if (size := file.stat().st_size) > MAX_BYTES:
            raise TinyvllmError(f"{path} cannot be read: it has {size} bytes, but the limit is {MAX_BYTES}")
        return json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise TinyvllmError(f"{path} cannot be read: {error.strerror}") from error
    except RecursionError as error:
        raise TinyvllmError(f"{path} is not JSON that can be read: it is nested too deeply") from error
    except ValueError as error:
        raise TinyvllmError(f"{path} is not JSON: {error}") from error


@contextmanager
def fields_of(*paths: str, kind: str = "benchmark") -> Iterator[None]:
    """While the values of these files are used: raises TinyvllmError for one that is missing or of another type."""
    try:
        yield
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError, ConsoleError) as error:
        raise TinyvllmError(
            f"{' or '.join(dict.fromkeys(paths))} lacks a field of a {kind} or has one of another type "
            f"({type(error).__name__}: {error}): measure again with this version"
        ) from error
