"""ggml's blocks whose codes are indices into tables of vectors: IQ1, IQ2 and IQ3.

An index has 8 to 11 bits and stands for 4 or 8 weights. Signs are apart: one bit per weight, of which some kinds leave
out every eighth, because the number of negative weights is always even there. IQ1 has no signs but a bit that shifts
weights by an eighth up or down; here it is the 12th bit of the index.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tinyvllm.arrays import Format, Grid, ScaleFormat, Scales
from tinyvllm.model.weights.blocks import BlockKind, Parts, float16, whole_rows

SUPER = 256  # weights of a block
SHIFTED = 1 << 11  # the bit of an index of IQ1 that says whether weights are shifted down


def _grid_kind(name: str, group: int, unit: float, grid: Grid, split: Callable[[np.ndarray], Parts]) -> BlockKind:
    scale = ScaleFormat(SUPER, has_steps=True, unit=unit)
    return BlockKind(Format(name, grid.bits, group, scale=scale, grid=grid), split)


def _iq2_xxs(blocks: np.ndarray) -> Parts:
    """d f16 · for each 32 weights: 4 bytes of indices, then 28 bits of signs and 4 of a scale."""
    words = np.ascontiguousarray(blocks[..., 2:]).view(np.uint32)  # (N, B, 16)
    indices, rest = np.ascontiguousarray(words[..., 0::2]), words[..., 1::2]
    return _parts(indices.view(np.uint8), float16(blocks, 0), rest >> 28, _packed_signs(rest))


def _iq3_xxs(blocks: np.ndarray) -> Parts:
    """d f16 · 64 bytes of indices · for each 32 weights, 28 bits of signs and 4 of a scale."""
    rest = np.ascontiguousarray(blocks[..., 66:]).view(np.uint32)  # (N, B, 8)
    return _parts(blocks[..., 2:66], float16(blocks, 0), rest >> 28, _packed_signs(rest))


def _iq2_xs(blocks: np.ndarray) -> Parts:
    """d f16 · 32 times 9 bits of an index and 7 of signs · 8 bytes of scales."""
    packed = np.ascontiguousarray(blocks[..., 2:66]).view(np.uint16)  # (N, B, 32)
    return _parts(packed & 511, float16(blocks, 0), _scales(blocks[..., 66:]), _all_signs(packed >> 9))


def _iq2_s(blocks: np.ndarray) -> Parts:
    """d f16 · 32 bytes of indices' low bits · 32 of signs · 8 of their high two bits · 8 of scales."""
    indices = blocks[..., 2:34] | _high_bits(blocks[..., 66:74], 2)
    return _parts(indices, float16(blocks, 0), _scales(blocks[..., 74:]), blocks[..., 34:66])


def _iq3_s(blocks: np.ndarray) -> Parts:
    """d f16 · 64 bytes of indices' low bits · 8 of their high bits · 32 of signs · 4 of scales."""
    indices = blocks[..., 2:66] | _high_bits(blocks[..., 66:74], 1)
    return _parts(indices, float16(blocks, 0), _scales(blocks[..., 106:]), blocks[..., 74:106])


def _iq1_s(blocks: np.ndarray) -> Parts:
    """d f16 · 32 bytes of indices' low bits · for each 32 weights, 16 bits: four times 3 high bits, 3 of a scale, the
    shift."""
    rest = np.ascontiguousarray(blocks[..., 34:]).view(np.uint16)  # (N, B, 8)
    high = rest[..., None] >> np.array([0, 3, 6, 9], np.uint16) & 7
    high = high << 8 | (rest >> 15)[..., None] * np.uint16(SHIFTED)
    indices = blocks[..., 2:34] | high.reshape(*rest.shape[:2], -1)
    return _parts(indices, float16(blocks, 0), rest >> 12 & 7)


def _iq1_m(blocks: np.ndarray) -> Parts:
    """32 bytes of indices' low bits · 16 of two times 3 high bits and the shift · 4 times four scales of 3 bits and, on
    top, 4 bits of d f16, lowest first."""
    rest = np.ascontiguousarray(blocks[..., 48:]).view(np.uint16)  # (N, B, 4)
    base = (rest >> 12 << np.array([0, 4, 8, 12], np.uint16)).sum(-1, dtype=np.uint16).view(np.float16)
    nibbles = np.repeat(blocks[..., 32:48], 2, axis=-1) >> np.resize(np.array([0, 4], np.uint8), 32)
    high = (nibbles & 7).astype(np.uint16) << 8 | (nibbles >> 3 & 1) * np.uint16(SHIFTED)
    steps = rest[..., None] >> np.array([0, 3, 6, 9], np.uint16) & 7
    return _parts(blocks[..., :32] | high, base, steps.reshape(*rest.shape[:2], -1))


GRID_KINDS = (
    _grid_kind("IQ2_XXS", 32, 1 / 8, Grid("IQ2_XXS", 8, 8, has_signs=True), _iq2_xxs),
    _grid_kind("IQ2_XS", 16, 1 / 8, Grid("IQ2_XS", 9, 8, has_signs=True), _iq2_xs),
    _grid_kind("IQ2_S", 16, 1 / 8, Grid("IQ2_S", 10, 8, has_signs=True), _iq2_s),
    _grid_kind("IQ3_XXS", 32, 1 / 4, Grid("IQ3_XXS", 8, 4, has_signs=True), _iq3_xxs),
    _grid_kind("IQ3_S", 32, 1.0, Grid("IQ3_S", 9, 4, has_signs=True), _iq3_s),
    _grid_kind("IQ1_S", 32, 1 / 8, Grid("IQ1_S", 12, 8, has_signs=False), _iq1_s),
    _grid_kind("IQ1_M", 16, 1 / 8, Grid("IQ1_S", 12, 8, has_signs=False), _iq1_m),
)


def _parts(indices: np.ndarray, base: np.ndarray, scales: np.ndarray, signs: np.ndarray | None = None) -> Parts:
    """Indices (N, B, codes), bases (N, B), scales (N, B, groups), of which twice one more counts, signs (N, B, 32)."""
    steps = whole_rows(2 * scales.astype(np.uint8) + np.uint8(1))
    codes = whole_rows(indices.astype(np.uint16))
    return codes, Scales(base, steps), None, None if signs is None else whole_rows(signs)


def _scales(packed: np.ndarray) -> np.ndarray:
    """Two scales of 4 bits in each byte, (N, B, 2 * bytes)."""
    scales: np.ndarray = packed[..., None] >> np.array([0, 4], np.uint8) & 0x0F
    return scales.reshape(*packed.shape[:2], -1)


def _high_bits(packed: np.ndarray, width: int) -> np.ndarray:
    """The bits of indices above the eighth, `width` of each, in place, (N, B, 8 / width * bytes) uint16."""
    bits = packed[..., None].astype(np.uint16) >> np.arange(0, 8, width, dtype=np.uint16) & ((1 << width) - 1)
    return bits.reshape(*packed.shape[:2], -1) << 8


def _packed_signs(words: np.ndarray) -> np.ndarray:
    """Four times 7 bits in each word, as bytes of 8 signs, (N, B, 4 * words)."""
    signs = words[..., None] >> np.array([0, 7, 14, 21], np.uint32) & 127
    return _all_signs(signs.reshape(*words.shape[:2], -1))


def _all_signs(seven: np.ndarray) -> np.ndarray:
    """Seven signs, with the eighth that makes the number of negative weights even, as uint8."""
    signs = seven.astype(np.uint8)
    parity: np.ndarray = np.bitwise_count(signs) & 1
    return signs | parity << 7
