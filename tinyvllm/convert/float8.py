"""FP8 weights: e4m3 codes with a scale for each row, or for each block of 128 x 128."""

from __future__ import annotations

import numpy as np
from ml_dtypes import float8_e4m3fn

BLOCK = 128
LARGEST = np.float32(448)  # of e4m3


def encode_by_channel(values: np.ndarray, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """(codes, scales) of values, (N, K) float32: (N, K) float8_e4m3fn and (N, 1) `dtype`. The codes are computed with
    the scales as they are stored, like llm-compressor's."""
    largest = np.abs(values).max(axis=1, keepdims=True)
    scale = np.where(largest > 0, largest / LARGEST, np.float32(1)).astype(dtype)
    return _round(values / scale.astype(np.float32)), scale


def encode_by_block(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(codes, scales) of values, (N, K) float32: (N, K) float8_e4m3fn and (ceil(N / 128), ceil(K / 128)) float32, which
    Hugging Face's files call weight_scale_inv. Rows must begin at a block."""
    rows, columns = values.shape
    largest = np.maximum.reduceat(np.abs(values), range(0, columns, BLOCK), axis=1)
    largest = np.maximum.reduceat(largest, range(0, rows, BLOCK), axis=0)
    scale = np.where(largest > 0, largest / LARGEST, np.float32(1))
    expanded = np.repeat(np.repeat(scale, BLOCK, axis=0)[:rows], BLOCK, axis=1)[:, :columns]
    return _round(values / expanded), scale


def _round(values: np.ndarray) -> np.ndarray:
    rounded: np.ndarray = np.clip(values, -LARGEST, LARGEST).astype(float8_e4m3fn)
    return rounded
