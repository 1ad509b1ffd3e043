"""Round float32 values to the unquantized types of files."""

from __future__ import annotations

import numpy as np

from tinyvllm.errors import ModelError
from tinyvllm.model.weights.stored import DENSE_DTYPES


def encode_dense(values: np.ndarray, dtype: str, what: str) -> np.ndarray:
    """float32 values as F32, F16 or BF16, rounded to nearest even.

    Raises ModelError for values that float16 cannot hold; `what` names the tensor."""
    with np.errstate(over="ignore"):
        rounded: np.ndarray = values.astype(DENSE_DTYPES[dtype])
    if dtype == "F16" and np.isinf(rounded).any() and not np.isinf(values).any():
        raise ModelError(
            f"tensor {what} has values up to {np.abs(values).max():g}, but float16 ends at 65504: use --to bf16 or f32"
        )
    return rounded
