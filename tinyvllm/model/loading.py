"""Taking a model's tensors from its checkpoint and putting them on the device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from tinygrad import Tensor

from tinyvllm.arrays import HostMatrix, to_float32
from tinyvllm.config import ModelConfig
from tinyvllm.ops.backend import Backend, Norm

if TYPE_CHECKING:
    from tinyvllm.model.weights.checkpoint import WeightSource


@dataclass(frozen=True)
class Loader:
    """Takes tensors by the names that Hugging Face gives them. Raises WeightMismatchError for one that is missing, or
    has another shape."""

    config: ModelConfig
    checkpoint: WeightSource
    backend: Backend

    def take(self, name: str, rows: int, cols: int) -> HostMatrix:
        return self.checkpoint.take(name, (rows, cols))

    def vectors(self, sizes: Mapping[str, int]) -> Tensor:
        """The vectors of these names and sizes, side by side, float32."""
        taken = [to_float32(self.checkpoint.take(name, (size,))) for name, size in sizes.items()]
        return self.backend.device.upload(np.concatenate(taken).astype(np.float32))

    def array(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """float32, on the host."""
        return to_float32(self.checkpoint.take(name, shape))

    def norm(self, *names: str, size: int | None = None, factor: float = 1.0) -> Norm:
        """The norms of these names, side by side, each of `size` weights, or of hidden_size, times `factor`."""
        shape = (size or self.config.hidden_size,)
        weight = np.concatenate([to_float32(self.checkpoint.take(name, shape)) for name in names])
        weight = (weight.astype(np.float32) + np.float32(self.config.norm_offset)) * np.float32(factor)
        return Norm(self.backend.device.upload(weight), self.config.norm_eps)

    def optional_norm(self, prefix: str, name: str | None) -> Norm | None:
        return None if name is None else self.norm(f"{prefix}.{name}.weight")
