"""Rotary position embeddings: the table of cosines and sines that the attention kernels read."""

from __future__ import annotations

import math

import numpy as np

from tinyvllm.config import Rope, RopeScaling
from tinyvllm.errors import UnsupportedModelError


def inverse_frequencies(rope: Rope, head_dim: int) -> np.ndarray:
    """(R/2,) float64 of R rotated dimensions: theta**(-2i/R) (Su et al. 2021, sec. 3.2.2), stretched as `rope` says."""
    num_dims = rope.num_dims or head_dim
    exponents = np.arange(0, num_dims, 2, dtype=np.float64) / num_dims
    frequencies = rope.theta**-exponents
    if rope.divisors is not None:
        frequencies = frequencies / np.asarray(rope.divisors, np.float64)
    if rope.scaling is not None:
        frequencies = _scale(frequencies, rope.scaling)
    return frequencies


def _scale(frequencies: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    if scaling.kind == "linear":  # Chen et al. 2023: positions are divided by the factor
        return frequencies / scaling.factor
    if scaling.kind == "llama3":
        return _scale_llama3(frequencies, scaling)
    raise UnsupportedModelError(f"rope scaling {scaling.kind!r} is not known; known: linear, llama3")


def _scale_llama3(frequencies: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """Llama 3.1's rule: long wavelengths are stretched by the factor, short ones kept, those between interpolated.

    `smooth` is 0 at the low-frequency limit and 1 at the high one (model card and reference code of Llama 3.1).
    """
    turns = scaling.original_max_position * frequencies / (2 * math.pi)  # full turns over the original context
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return frequencies * (smooth + (1.0 - smooth) / scaling.factor)


def rope_table(rope: Rope, head_dim: int, num_positions: int) -> np.ndarray:
    """(num_positions, R) float32: cos of the R/2 angles, then their sin. Angles in float64."""
    angles = np.arange(num_positions, dtype=np.float64)[:, None] * inverse_frequencies(rope, head_dim)[None, :]
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
