"""What a layer consists of: something that mixes tokens (attention, a recurrence), and then a feed-forward."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from tinygrad import Tensor

from tinyvllm.ops.backend import Operations, Step
from tinyvllm.ops.formats.matrix import Matrix


class Mixer(Protocol):
    """Attention, or what a layer has in its place."""

    @property
    def matrices(self) -> Mapping[str, tuple[Matrix, ...]]:
        """By role."""

    def run(self, ops: Operations, x: Tensor, step: Step) -> Tensor:
        """(T * hidden,): x plus the layer's output for x and the tokens before."""


class FeedForward(Protocol):
    """A feed-forward, dense or sparse."""

    @property
    def matrices(self) -> Mapping[str, tuple[Matrix, ...]]:
        """By role."""

    def run(self, ops: Operations, x: Tensor, step: Step, out_scale: Tensor | None = None) -> Tensor:
        """(T * hidden,): x plus the layer's output for x; the sum times `out_scale` (1,) float32."""


@dataclass(frozen=True)
class Layer:
    mixer: Mixer
    feed_forward: FeedForward

    @property
    def matrices(self) -> dict[str, tuple[Matrix, ...]]:
        """By role."""
        return {**self.mixer.matrices, **self.feed_forward.matrices}
