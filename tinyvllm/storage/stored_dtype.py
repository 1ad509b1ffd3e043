"""The dtype of a directory's weights, for settings that do not say it."""

from __future__ import annotations

import json
from pathlib import Path

DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # by safetensors' names
MAX_HEADER_BYTES = 100_000_000  # the library's own limit


def stored_dtype(directory: Path) -> str | None:
    """That of the first matrix of floats in the safetensors, by which transformers goes too; None if there is none. A
    damaged file counts as none: the reader of weights will name it."""
    for path in sorted(directory.glob("*.safetensors")):
        try:
            with path.open("rb") as file:
                size = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(min(size, MAX_HEADER_BYTES)))
            found = [DTYPES.get(entry["dtype"]) for entry in header.values() if len(entry.get("shape", ())) > 1]
        except (OSError, ValueError, AttributeError, KeyError, TypeError):
            return None
        if dtypes := [dtype for dtype in found if dtype is not None]:
            return dtypes[0]
    return None
