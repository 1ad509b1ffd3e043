"""Which class runs which architecture. A further family is one file beside llama.py and one line here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from tinygrad import Tensor

from tinyvllm.config import ModelConfig
from tinyvllm.errors import UnsupportedModelError
from tinyvllm.model.llama import Llama
from tinyvllm.model.qwen3 import Qwen3
from tinyvllm.model.weights.checkpoint import WeightSource
from tinyvllm.ops.backend import AttentionShape, Backend, KVPool, Norm
from tinyvllm.ops.formats.matrix import Matrix
from tinyvllm.ops.step_inputs import StepLayout


class Model(Protocol):
    """What execution needs of a family."""

    config: ModelConfig
    shape: AttentionShape
    embedding: Matrix
    norm: Norm  # the last one
    head: Matrix  # the embedding itself where the two are tied
    rope: Tensor  # (positions, D) float32

    @property
    def matrices(self) -> list[Matrix]: ...

    @property
    def logit_stride(self) -> int: ...

    def __call__(
        self, layout: StepLayout, inputs: Tensor, pool: KVPool, *, is_decode: bool, newest: Tensor | None = None
    ) -> Tensor: ...


FAMILIES: dict[str, Callable[..., Model]] = {"llama": Llama, "qwen3": Qwen3}


def make_model(
    config: ModelConfig,
    checkpoint: WeightSource,
    backend: Backend,
    num_positions: int,
    progress: Callable[[int, int], None],
) -> Model:
    """Load a model's weights onto the backend's device. Raises UnsupportedModelError, WeightMismatchError."""
    family = FAMILIES.get(config.architecture)
    if family is None:
        raise UnsupportedModelError(
            f"architecture {config.architecture!r} is not known; known: {', '.join(sorted(FAMILIES))}"
        )
    return family(config, checkpoint, backend, num_positions, progress)
