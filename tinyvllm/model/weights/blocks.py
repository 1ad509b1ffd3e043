"""Helpers that split ggml's blocks of quantized weights into codes and scales.

Blocks come as (N, B, bytes of a block) uint8: B blocks in each of N rows, so that K = B * weights of a block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from tinyvllm.arrays import Format, Scales

# Codes (N, K), scales and minimums; of a grid, codes (N, K // width), scales, None and signs (N, K // 8)
Parts: TypeAlias = (
    tuple[np.ndarray, Scales, Scales | None] | tuple[np.ndarray, Scales, Scales | None, np.ndarray | None]
)

LOW_HALVES = np.uint64(0x0F0F0F0F0F0F0F0F)  # of eight bytes
FOUR = np.uint64(4)


@dataclass(frozen=True)
class BlockKind:
    """A kind of block: its format, under ggml's name, and the function that splits a matrix of such blocks."""

    format: Format
    split: Callable[[np.ndarray], Parts]


def whole_rows(parts: np.ndarray) -> np.ndarray:
    """(N, B, parts of a block) -> (N, all parts of a row)."""
    return parts.reshape(parts.shape[0], -1)


def nibbles(packed: np.ndarray, span: int) -> np.ndarray:
    """4-bit codes, (N, B, 2 * bytes). Of every `span` codes, the low halves of the bytes hold the first half and the
    high halves the second."""
    rows, per_row, num_bytes = packed.shape
    words = _as_words(packed).reshape(rows, per_row, num_bytes * 2 // span, span // 16)  # eight bytes each
    codes = np.empty((*words.shape[:3], 2, words.shape[3]), np.uint64)
    for i in range(words.shape[3]):  # NumPy's inner loop is then over blocks: over a block's bytes it would be short
        np.bitwise_and(words[..., i], LOW_HALVES, out=codes[..., 0, i])
        np.bitwise_and(words[..., i] >> FOUR, LOW_HALVES, out=codes[..., 1, i])
    return codes.view(np.uint8).reshape(rows, per_row, num_bytes * 2)


def _as_words(part: np.ndarray) -> np.ndarray:
    """A part of each block, (N, B, bytes), copied as (N, B, bytes / 8) uint64, in as few pieces as its place allows."""
    places = (part.ctypes.data, *part.strides[:2])
    size = next((size for size in (8, 4, 2) if not any(place % size for place in places)), 1)
    if size == 1:
        return np.ascontiguousarray(part).view(np.uint64)
    pieces = part.view(f"u{size}")
    copied = np.empty(pieces.shape, pieces.dtype)
    for i in range(pieces.shape[2]):
        copied[..., i] = pieces[..., i]
    return copied.view(np.uint64)


def bit_fields(packed: np.ndarray, width: int, span: int) -> np.ndarray:
    """Fields of `width` bits, (N, B, fields): like `nibbles`, the lowest bits of the bytes that hold `span` fields come
    first."""
    rows, per_row, num_bytes = packed.shape
    shifts = np.arange(0, 8, width, dtype=np.uint8)[:, None]
    packed = packed.reshape(rows, per_row, num_bytes * len(shifts) // span, 1, span // len(shifts))
    fields: np.ndarray = packed >> shifts & np.uint8((1 << width) - 1)
    return fields.reshape(rows, per_row, num_bytes * len(shifts))


def uint16(blocks: np.ndarray, begin: int) -> np.ndarray:
    """The 16-bit number at byte `begin` of each block, (N, B)."""
    return np.ascontiguousarray(blocks[..., begin : begin + 2].view(np.uint16)[..., 0])


def float16(blocks: np.ndarray, begin: int) -> np.ndarray:
    """The half-precision number at byte `begin` of each block, (N, B)."""
    return np.ascontiguousarray(blocks[..., begin : begin + 2].view(np.float16)[..., 0])
