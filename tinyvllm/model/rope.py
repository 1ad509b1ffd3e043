"""Rotary position embeddings: the table of cosines and sines that the attention kernels read."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from tinyvllm.config import QueryScaling, Rope, RopeScaling
from tinyvllm.errors import UnsupportedModelError

RUN = 256  # positions


def inverse_frequencies(rope: Rope, head_dim: int, num_positions: int = 0) -> np.ndarray:
    """(R/2,) float64 of R rotated dimensions: theta**(-2i/R) (Su et al. 2021, sec. 3.2.2), stretched as `rope` says.

    `num_positions`: the longest context, by which longrope chooses its factors.
    """
    num_dims = rope.num_dims or head_dim
    exponents = np.arange(0, num_dims, 2, dtype=np.float64) / num_dims
    frequencies = rope.theta**-exponents
    if rope.divisors is not None:
        frequencies = frequencies / np.asarray(rope.divisors, np.float64)
    if rope.scaling is None:
        return frequencies
    scale = _SCALES.get(rope.scaling.kind)
    if scale is None:
        raise UnsupportedModelError(f"rope scaling {rope.scaling.kind!r} is not known; known: {', '.join(_SCALES)}")
    return scale(frequencies, rope, num_positions)


def _scaling(rope: Rope) -> RopeScaling:
    assert rope.scaling is not None
    return rope.scaling


def _linear(frequencies: np.ndarray, rope: Rope, num_positions: int) -> np.ndarray:
    """Chen et al. 2023: positions are divided by the factor."""
    return frequencies / _scaling(rope).factor


def _llama3(frequencies: np.ndarray, rope: Rope, num_positions: int) -> np.ndarray:
    """Llama 3.1's rule: long wavelengths are stretched by the factor, short ones kept, those between interpolated.

    `smooth` is 0 at the low-frequency limit and 1 at the high one (model card and reference code of Llama 3.1).
    """
    scaling = _scaling(rope)
    turns = scaling.original_max_position * frequencies / (2 * math.pi)  # full turns over the original context
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return frequencies * (smooth + (1.0 - smooth) / scaling.factor)


def _yarn(frequencies: np.ndarray, rope: Rope, num_positions: int) -> np.ndarray:
    """Peng et al. 2023, sec. 3.2 ("NTK-by-parts"): frequencies that turn often stay, those that turn less than once
    over the original context are divided by the factor, and those between are mixed by a ramp over the dimensions."""
    scaling, num_pairs = _scaling(rope), len(frequencies)

    def pair_of(turns: float) -> float:
        """The pair that turns so often over the original context."""
        return num_pairs * math.log(scaling.original_max_position / (turns * 2 * math.pi)) / math.log(rope.theta)

    first, last = pair_of(scaling.beta_fast), pair_of(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * num_pairs - 1)
    ramp = np.clip((np.arange(num_pairs) - first) / (last - first or 0.001), 0.0, 1.0)
    return frequencies * (1.0 - ramp + ramp / scaling.factor)


def _longrope(frequencies: np.ndarray, rope: Rope, num_positions: int) -> np.ndarray:
    """Ding et al. 2024: a searched factor for each frequency. Which set holds for all positions of all requests, as in
    vLLM and llama.cpp: keys in the cache cannot be rotated again when a sequence grows beyond the original context."""
    scaling = _scaling(rope)
    is_long = num_positions > scaling.original_max_position
    return frequencies / np.asarray(scaling.long_factors if is_long else scaling.short_factors, np.float64)


def _proportional(frequencies: np.ndarray, rope: Rope, num_positions: int) -> np.ndarray:
    """Gemma 4's: frequencies as of the whole head, of which the first pairs rotate and the others stand still."""
    scaling, num_pairs = _scaling(rope), len(frequencies)
    rotates = np.arange(num_pairs) < int(scaling.proportion * 2 * num_pairs // 2)
    return np.where(rotates, frequencies / scaling.factor, 0.0)


_SCALES: dict[str, Callable[[np.ndarray, Rope, int], np.ndarray]] = {
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
    "proportional": _proportional,
}


def rope_table(rope: Rope, head_dim: int, num_positions: int, query_scaling: QueryScaling | None = None) -> np.ndarray:
    """(num_positions, R) float32: cos of the R/2 angles, then their sin. With `query_scaling` a column more: the
    factor of a query at this position. Angles in float64."""
    frequencies = inverse_frequencies(rope, head_dim, num_positions)
    num_pairs = len(frequencies)
    table = np.empty((num_positions, 2 * num_pairs + (query_scaling is not None)), np.float32)
    # The angle of a position is that of a multiple of RUN plus that of a rest, so the turn by it is a product of two:
    # sine and cosine of all angles would take four times as long
    rests = rope.attention_factor * np.exp(1j * np.arange(RUN)[:, None] * frequencies)
    for start in range(0, num_positions, RUN):
        turns = (rests * np.exp(1j * start * frequencies))[: num_positions - start]
        table[start : start + RUN, :num_pairs] = turns.real
        table[start : start + RUN, num_pairs : 2 * num_pairs] = turns.imag
    if query_scaling is not None:
        spans = np.arange(num_positions) // query_scaling.span
        table[:, -1] = 1 + query_scaling.beta * np.log1p(spans)
    return table
