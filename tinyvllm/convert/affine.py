"""MLX's affine quantization, as mlx.core.quantize computes it, bit for bit.

A group of neighboring columns shares a scale and a bias: w = scale * code + bias. The edge with the larger magnitude is
kept exactly, and so is zero where it lies between the edges (mlx/backend/cpu/quantized.cpp).
"""

from __future__ import annotations

import numpy as np

BITS = (2, 3, 4, 5, 6, 8)
GROUPS = (32, 64, 128)
SMALLEST = np.float32(1e-7)  # of a scale


def encode_affine(
    values: np.ndarray, bits: int, group: int, dtype: np.dtype
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(codes, scales, biases) of values, (N, K) float32: (N, K * bits / 32) uint32 and twice (N, K / group) `dtype`.

    `dtype` is that of the model's weights, to which the values are rounded first, as they are in MLX.
    """
    rows, columns = values.shape
    groups = values.astype(dtype).astype(np.float32).reshape(rows, columns // group, group)
    top = np.float32((1 << bits) - 1)
    low, high = groups.min(axis=-1), groups.max(axis=-1)
    is_low = np.abs(low) > np.abs(high)
    scale = np.maximum((high - low) / top, SMALLEST)
    scale = np.where(is_low, scale, -scale)
    edge = np.where(is_low, low, high)
    edge_code = np.rint(edge / scale)
    has_edge = edge_code != 0
    scale = np.where(has_edge, edge / np.where(has_edge, edge_code, 1), scale)
    bias = np.where(has_edge, edge, np.float32(0))
    codes = np.clip(np.rint((groups - bias[..., None]) / scale[..., None]), 0, top).astype(np.uint8)
    return pack_stream(codes.reshape(rows, columns), bits), scale.astype(dtype), bias.astype(dtype)


def pack_stream(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes, (N, K) uint8, as a stream of bits, lowest first, in words: (N, K * bits / 32) uint32."""
    rows, columns = codes.shape
    if 32 % bits == 0:
        words = codes.reshape(rows, -1, 32 // bits).astype(np.uint32)
        packed: np.ndarray = np.bitwise_or.reduce(words << np.arange(0, 32, bits, dtype=np.uint32), axis=-1)
        return packed
    each = np.unpackbits(codes[..., None], axis=-1, bitorder="little")[..., :bits]
    return np.packbits(each.reshape(rows, columns * bits), axis=-1, bitorder="little").view(np.uint32)
