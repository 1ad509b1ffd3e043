"""What the headers of safetensors files say, for settings that do not say it: the dtype of the weights."""

from __future__ import annotations

from pathlib import Path

from tinyvllm.errors import ModelError
from tinyvllm.storage.safetensors_header import read_header

DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # by safetensors' names


def stored_dtype(directory: Path) -> str | None:
    """That of the first matrix of floats in the safetensors, by which transformers goes too; None if there is none. A
    damaged file counts as none: the reader of weights will name it."""
    for path in sorted(directory.glob("*.safetensors")):
        try:
            header = read_header(path)
        except ModelError:
            return None
        found = [DTYPES.get(entry.dtype) for entry in header.values() if len(entry.shape) > 1]
        if dtypes := [dtype for dtype in found if dtype is not None]:
            return dtypes[0]
    return None
