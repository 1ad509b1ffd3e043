"""Activations of the CPU device, whose columns several cores may share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from tinygrad import Tensor


@dataclass(frozen=True)
class Sharded:
    """An activation whose columns are sharded over several cores: each holds (T * width,), in the order of the
    columns."""

    tensors: tuple[Tensor, ...]
    widths: tuple[int, ...]


Activation: TypeAlias = Tensor | Sharded  # a Tensor if there is one core


def sharded(tensors: Sequence[Tensor], widths: Sequence[int]) -> Activation:
    return tensors[0] if len(tensors) == 1 else Sharded(tuple(tensors), tuple(widths))


def tensors_of(x: Any) -> tuple[Tensor, ...]:
    """Each core's tensor of an activation or of a layer's pool."""
    if isinstance(x, Sharded):
        return x.tensors
    return x if isinstance(x, tuple) else (x,)


def widths_of(x: Activation, cols: int) -> tuple[int, ...]:
    """Each core's columns of an activation of `cols` columns."""
    return x.widths if isinstance(x, Sharded) else (cols,)
