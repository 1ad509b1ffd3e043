"""Embeddings from hidden states on the host: the final norm, which a step fuses into the head's product; pooling."""

from __future__ import annotations

import numpy as np


def final_norm(states: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """RMS norm of each row. states (T, hidden), weight (hidden,), both float32 -> (T, hidden). Zhang & Sennrich 2019,
    eq. 4."""
    normed: np.ndarray = states / np.sqrt(np.mean(states**2, axis=1, keepdims=True) + eps) * weight
    return normed


def pool(states: np.ndarray, pooling: str, score: np.ndarray | None = None) -> np.ndarray:
    """One sequence's rows of a step, (T, hidden), as one (hidden,): "mean" gives their sum, since a prompt may take
    several steps, "cls" the first row, "last" the last one. "score" gives (labels,): the last row times a classifier's
    head (labels, hidden)."""
    if pooling == "mean":
        pooled: np.ndarray = states.sum(axis=0)
        return pooled
    row = states[0 if pooling == "cls" else -1]
    return row.copy() if pooling != "score" or score is None else score @ row
