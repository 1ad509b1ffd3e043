"""What the headers of safetensors files say, for settings that do not say it: the dtype of the weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # by safetensors' names
MAX_HEADER_BYTES = 100_000_000  # the library's own limit


def read_header(path: Path) -> Any:
    """The JSON at the start of a safetensors file. Raises OSError, and ValueError for a damaged one."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        return json.loads(file.read(min(size, MAX_HEADER_BYTES)))


def stored_dtype(directory: Path) -> str | None:
    """That of the first matrix of floats in the safetensors, by which transformers goes too; None if there is none. A
    damaged file counts as none: the reader of weights will name it."""
    for path in sorted(directory.glob("*.safetensors")):
        try:
            entries = read_header(path).values()
            found = [DTYPES.get(entry["dtype"]) for entry in entries if len(entry.get("shape", ())) > 1]
        except (OSError, ValueError, AttributeError, KeyError, TypeError):
            return None
        if dtypes := [dtype for dtype in found if dtype is not None]:
            return dtypes[0]
    return None
