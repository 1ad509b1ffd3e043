"""Plain-Tensor references of the kernels: the same arguments, the same results, written to be read and not to be fast."""

from __future__ import annotations

import numpy as np


def rope_table(inverse_frequencies: np.ndarray, num_positions: int) -> np.ndarray:
    """(num_positions, D) float32: cos of D/2 angles, then their sin. Angles in float64."""
    angles = np.arange(num_positions, dtype=np.float64)[:, None] * inverse_frequencies[None, :]
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
