"""A tensor in a file that has not been read yet."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from ml_dtypes import bfloat16

from tinyvllm.arrays import HostMatrix

# Unquantized types, whose names are the same in safetensors and GGUF
DENSE_DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(bfloat16),
}
DENSE_NAMES = {name: str(dtype) for name, dtype in DENSE_DTYPES.items()}  # our names of the formats


@dataclass(frozen=True)
class StoredTensor:
    """`read` returns the values; unquantized ones as a view of the file's memory map wherever the order allows.

    A matrix of experts has three dimensions; where it is quantized, `read` gives the rows of all experts one after
    another.
    """

    shape: tuple[int, ...]
    read: Callable[[], HostMatrix]
    # what users call the format: "float16", "Q4_K", "mlx-4bit-g64"; of raw codes the file's name for the type ("U32")
    format_name: str
    num_bytes: int  # in the file
    is_converted: bool = False  # no packed format holds its values: `read` gives them as float16


def view_dense(raw: np.ndarray, type_name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Bytes, (num_bytes,) uint8, as an array of a type in DENSE_DTYPES, without a copy."""
    return raw.view(DENSE_DTYPES[type_name]).reshape(shape)
