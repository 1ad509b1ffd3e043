"""Quantize float32 weights to ggml's blocks, as ggml's reference does without an importance matrix.

Every function takes blocks, (B, weights of a block) float32, and returns their bytes, (B, bytes of a block) uint8. The
search for scales is ggml's (make_qx_quants, make_qkx2_quants, quantize_row_iq4_nl_impl), for all blocks at once:
https://github.com/ggml-org/llama.cpp/blob/aca2e6ce7909064dbfbf3bd168e9ad3db1826e6c/ggml/src/ggml-quants.c
Sums are added in another order than there, so now and then one of two nearly equal scales wins instead of the other.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from gguf import quants
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from tinyvllm.errors import UnsupportedModelError

GROUP = 32  # weights that share a scale in Q4_K and Q5_K
SUPER = 256  # weights of a K quant's block
TINY = np.float32(1e-15)  # largest magnitude of a group that counts as zero
IQ4_VALUES = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)

Encoder = Callable[[np.ndarray], np.ndarray]


def encode(ggml_type: str, values: np.ndarray) -> np.ndarray:
    """A matrix, (N, K) float32, as rows of blocks: (N, bytes of a row) uint8. K must be whole blocks.

    Raises UnsupportedModelError for a type that is not in ENCODERS.
    """
    if ggml_type not in ENCODERS:
        raise UnsupportedModelError(f"no encoder for {ggml_type}; known: {', '.join(ENCODERS)}")
    rows, columns = values.shape
    block_size, _ = GGML_QUANT_SIZES[GGMLQuantizationType[ggml_type]]
    assert columns % block_size == 0, f"{columns=} {block_size=}"
    blocks = np.ascontiguousarray(values, np.float32).reshape(-1, block_size)
    with np.errstate(divide="ignore", invalid="ignore"):  # groups of zeros, whose results are replaced
        return ENCODERS[ggml_type](blocks).reshape(rows, -1)


def _by_gguf(ggml_type: str) -> Encoder:
    """The gguf package's encoder, which gives ggml's bits."""
    kind = GGMLQuantizationType[ggml_type]

    def encode_blocks(blocks: np.ndarray) -> np.ndarray:
        encoded: np.ndarray = quants.quantize(blocks.reshape(1, -1), kind)  # it takes 16 rows at a time
        return encoded.reshape(len(blocks), -1)

    return encode_blocks


# --- K quants with a minimum ---------------------------------------------------------------------------------------


def _q4_k(blocks: np.ndarray) -> np.ndarray:
    codes, header = _with_minimums(blocks, top=15, first=-1.0, num_steps=21)
    return np.concatenate([header, _nibbles(codes, 2 * GROUP)], axis=1)


def _q5_k(blocks: np.ndarray) -> np.ndarray:
    codes, header = _with_minimums(blocks, top=31, first=-0.5, num_steps=16)
    groups = np.arange(SUPER // GROUP, dtype=np.uint8)[None, :, None]
    fifth = np.bitwise_or.reduce((codes >> 4).reshape(-1, SUPER // GROUP, GROUP) << groups, axis=1)
    return np.concatenate([header, fifth, _nibbles(codes & 15, 2 * GROUP)], axis=1)


def _with_minimums(blocks: np.ndarray, top: int, first: float, num_steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes up to `top`, (B, 256) uint8, and the 16 bytes of bases and 6-bit steps before them."""
    groups = blocks.reshape(-1, SUPER // GROUP, GROUP)
    scales, minimums = _fit_minimums(groups, top, first, num_steps)
    base, steps = _six_bits(scales)
    base_min, steps_min = _six_bits(minimums)
    scale = (base.astype(np.float32)[:, None] * steps)[..., None]
    minimum = (base_min.astype(np.float32)[:, None] * steps_min)[..., None]
    codes = _clip(np.rint((groups + minimum) / np.where(scale == 0, 1, scale)), 0, top)
    # a group whose step rounds to zero keeps the minimum alone
    codes = np.where(scale == 0, 0, codes).astype(np.uint8).reshape(-1, SUPER)
    bases = np.stack([base, base_min], axis=1).view(np.uint8)
    return codes, np.concatenate([bases, _pack_steps(steps, steps_min)], axis=1)


def _six_bits(factors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Factors of a block's groups, (B, G), as a float16 base, (B,), times integers up to 63, (B, G) uint8."""
    largest = factors.max(axis=1, keepdims=True)
    steps = np.where(largest > 0, np.minimum(63, np.rint(63 / largest * factors)), 0)
    return (largest[:, 0] / np.float32(63)).astype(np.float16), steps.astype(np.uint8)


def _pack_steps(scales: np.ndarray, minimums: np.ndarray) -> np.ndarray:
    """Eight scales and eight minimums of six bits in 12 bytes; model/weights/quant.py has the layout."""
    first = scales[:, :4] | scales[:, 4:] >> 4 << 6
    second = minimums[:, :4] | minimums[:, 4:] >> 4 << 6
    return np.concatenate([first, second, scales[:, 4:] & 15 | (minimums[:, 4:] & 15) << 4], axis=1)


def _fit_minimums(groups: np.ndarray, top: int, first: float, num_steps: int) -> tuple[np.ndarray, np.ndarray]:
    """The scale and the minimum (subtracted, not negative) of each group, (B, G) each, by make_qkx2_quants.

    Candidates are scales of (max - min) / (top + first + 0.1 i), each refined by weighted least squares for the codes
    it gives; the smallest weighted error wins. Weights are |x| plus the group's root mean square.
    """
    weights = np.abs(groups) + np.sqrt((groups * groups).mean(axis=-1, keepdims=True))
    low, high = np.minimum(groups.min(axis=-1), 0), groups.max(axis=-1)
    is_flat, flat_minimum = high <= low, 0 - low
    sum_w, sum_x = weights.sum(axis=-1), (weights * groups).sum(axis=-1)
    scale, minimum = (high - low) / np.float32(top), low
    codes = _codes_above(groups, minimum, top / (high - low), top)
    best = _error(groups, weights, codes, scale, minimum)
    for index in range(num_steps):
        # as in ggml, the next candidate starts from the best minimum so far
        codes = _codes_above(groups, minimum, np.float32(first + 0.1 * index + top) / (high - minimum), top)
        weighted = weights * codes
        sum_l, sum_l2, sum_xl = weighted.sum(-1), (weighted * codes).sum(-1), (weighted * groups).sum(-1)
        determinant = sum_w * sum_l2 - sum_l * sum_l
        found = (sum_w * sum_xl - sum_x * sum_l) / determinant
        found_min = (sum_l2 * sum_x - sum_l * sum_xl) / determinant
        is_above = found_min > 0
        found, found_min = np.where(is_above, sum_xl / sum_l2, found), np.where(is_above, 0, found_min)
        error = _error(groups, weights, codes, found, found_min)
        is_better = (determinant > 0) & (error < best)  # false where a group of zeros gave NaN
        best = np.where(is_better, error, best)
        scale, minimum = np.where(is_better, found, scale), np.where(is_better, found_min, minimum)
    return np.where(is_flat, 0, scale), np.where(is_flat, flat_minimum, 0 - minimum)


def _codes_above(groups: np.ndarray, minimum: np.ndarray, inverse: np.ndarray, top: int) -> np.ndarray:
    return _clip(np.rint((groups - minimum[..., None]) * inverse[..., None]), 0, top)


def _error(
    groups: np.ndarray, weights: np.ndarray, codes: np.ndarray, scale: np.ndarray, minimum: np.ndarray
) -> np.ndarray:
    """The weighted squared error of each group."""
    difference = scale[..., None] * codes + minimum[..., None] - groups
    error: np.ndarray = (weights * difference * difference).sum(axis=-1)
    return error


# --- Q6_K ----------------------------------------------------------------------------------------------------------


def _q6_k(blocks: np.ndarray) -> np.ndarray:
    groups = blocks.reshape(-1, SUPER // 16, 16)
    scales = _fit_scales(groups, 32)
    at = np.abs(scales).argmax(axis=1)[:, None]
    largest = np.take_along_axis(scales, at, axis=1)
    is_zero = np.abs(largest) < TINY
    inverse = np.where(is_zero, 0, np.float32(-128) / np.where(is_zero, 1, largest))
    base = np.where(is_zero, 0, 1 / np.where(is_zero, 1, inverse)).astype(np.float16)
    steps = np.minimum(127, np.rint(inverse * scales)).astype(np.int8)
    scale = (base.astype(np.float32) * steps)[..., None]
    codes = np.where(scale == 0, 0, _clip(np.rint(groups / np.where(scale == 0, 1, scale)), -32, 31)) + 32
    codes = codes.astype(np.uint8).reshape(-1, 2, 4, 32)  # halves of 128, in each four runs of 32
    low = _nibbles((codes & 15).reshape(-1, SUPER), 128)
    high = codes >> 4
    high = high[:, :, 0] | high[:, :, 1] << 2 | high[:, :, 2] << 4 | high[:, :, 3] << 6
    high = high.reshape(-1, 64)
    encoded = np.concatenate([low, high, steps.view(np.uint8), base.view(np.uint8)], axis=1)
    return np.where(is_zero, np.uint8(0), encoded)


def _fit_scales(groups: np.ndarray, top: int) -> np.ndarray:
    """The scale of each group's codes in [-top, top), (B, G), by make_qx_quants: of 19 candidates, each refined by
    least squares with weights x * x, the one with the smallest error."""
    at = np.abs(groups).argmax(axis=-1)[..., None]
    largest = np.take_along_axis(groups, at, axis=-1)
    weights = groups * groups
    scale, best = np.zeros(groups.shape[:-1], np.float32), np.zeros(groups.shape[:-1], np.float32)
    for step in (0, *range(-9, 0), *range(1, 10)):
        codes = _clip(np.rint(groups * (np.float32(-(top + 0.1 * step)) / largest)), -top, top - 1)
        scale, best = _better_scale(groups, weights, codes, scale, best, is_first=step == 0)
    return np.where(np.abs(largest[..., 0]) < TINY, 0, scale)


def _better_scale(
    groups: np.ndarray,
    weights: np.ndarray,
    codes: np.ndarray,
    scale: np.ndarray,
    best: np.ndarray,
    *,
    is_first: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Take the least-squares scale of `codes` where it explains more of the group's square than `best` does."""
    weighted = weights * codes
    sum_lx, sum_l2 = (weighted * groups).sum(axis=-1), (weighted * codes).sum(axis=-1)
    is_better = (sum_l2 > 0) & (is_first | (sum_lx * sum_lx > best * sum_l2))
    found = sum_lx / np.where(sum_l2 > 0, sum_l2, 1)
    return np.where(is_better, found, scale), np.where(is_better, found * sum_lx, best)


# --- IQ4_NL --------------------------------------------------------------------------------------------------------


def _iq4_nl(blocks: np.ndarray) -> np.ndarray:
    at = np.abs(blocks).argmax(axis=1)[:, None]
    largest = np.take_along_axis(blocks, at, axis=1)
    is_zero = np.abs(largest[:, 0]) < TINY
    weights = blocks * blocks
    scale, best = np.zeros(len(blocks), np.float32), np.zeros(len(blocks), np.float32)
    for index, first in enumerate((-IQ4_VALUES[0], *(IQ4_VALUES[0] + step for step in range(-7, 8)))):
        values = IQ4_VALUES[_nearest(blocks * np.where(is_zero[:, None], 0, first / largest))]
        scale, best = _better_scale(blocks, weights, values, scale, best, is_first=index == 0)
    scale = np.where(is_zero, 0, scale)
    codes = _nearest(blocks * np.where(scale == 0, 0, 1 / scale)[:, None])
    return np.concatenate([scale.astype(np.float16)[:, None].view(np.uint8), _nibbles(codes, GROUP)], axis=1)


_MIDDLES = (IQ4_VALUES[1:] + IQ4_VALUES[:-1]) / 2


def _nearest(values: np.ndarray) -> np.ndarray:
    """Indices of the nearest entries of IQ4_VALUES, uint8; the upper one of two that are equally near."""
    return np.searchsorted(_MIDDLES, values, side="right").astype(np.uint8)


# --- Helpers -------------------------------------------------------------------------------------------------------


def _clip(codes: np.ndarray, low: int, high: int) -> np.ndarray:
    clipped: np.ndarray = np.clip(codes, low, high, out=codes)
    return clipped


def _nibbles(codes: np.ndarray, span: int) -> np.ndarray:
    """4-bit codes, (B, n) uint8, in n / 2 bytes. Of every `span` codes, the low halves of the bytes hold the first half
    and the high halves the second."""
    halves = codes.reshape(len(codes), -1, 2, span // 2)
    packed: np.ndarray = halves[:, :, 0] | halves[:, :, 1] << 4
    return packed.reshape(len(codes), -1)


ENCODERS: dict[str, Encoder] = {
    **{name: _by_gguf(name) for name in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")},
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_NL": _iq4_nl,
}
