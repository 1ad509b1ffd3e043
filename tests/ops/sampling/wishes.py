"""What a request may want of its logits, by the formulas of the parameters' own documents."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from tinyvllm.ops.sampling.reference import typical


@dataclass(frozen=True)
class Wish:
    """What one request wants of its logits."""

    prompt: tuple[int, ...] = ()
    output: tuple[int, ...] = ()
    repetition: float = 1.0
    frequency: float = 0.0
    presence: float = 0.0
    bias: dict[int, float] = field(default_factory=dict)
    allowed: tuple[int, ...] | None = None
    temperature: float = 1.0
    typical_p: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0

    @property
    def is_counted(self) -> bool:
        return (self.repetition, self.frequency, self.presence) != (1.0, 0.0, 0.0)

    def logits(self, raw: np.ndarray) -> np.ndarray:
        """By the formulas of the parameters' own documents, an id at a time."""
        out = raw.astype(np.float64)
        for token in range(len(out)):
            value, times = out[token] + self.bias.get(token, 0.0), self.output.count(token)
            if token in self.prompt or times:
                value = value / self.repetition if value > 0 else value * self.repetition
            value -= self.frequency * times + (self.presence if times else 0.0)
            out[token] = value if self.allowed is None or token in self.allowed else -math.inf
        return out

    def probabilities(self, raw: np.ndarray) -> np.ndarray:
        """Of each id to be drawn: min-p, top-k, top-p and typical-p by sorting, in this order."""
        weights = np.exp((processed := self.logits(raw) / self.temperature) - processed.max())
        order = np.argsort(-weights)
        ranked = np.where(weights[order] >= self.min_p, weights[order], 0.0)
        if self.top_k:
            ranked[self.top_k :] = 0.0
        if self.top_p < 1:
            mass = ranked.cumsum()
            ranked[mass - ranked >= self.top_p * mass[-1]] = 0.0
        kept = np.zeros(len(weights))
        kept[order] = ranked
        kept = np.where(typical(kept, self.typical_p), kept, 0.0)
        return kept / kept.sum()
