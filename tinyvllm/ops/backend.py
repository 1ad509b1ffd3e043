"""The operations that a transformer layer is made of, as each kind of device has them.

Activations are flat tensors, (T * columns,): rows side by side. A model is written against `Backend` alone, so that
what differs by device (layouts, fusion, kernels) stays in this room. `reference.py` has each operation in plain Tensor
arithmetic.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

import numpy as np
from tinygrad import Tensor

from tinyvllm.arrays import HostMatrix, stack_rows, to_float32
from tinyvllm.config import LayerKind
from tinyvllm.device.handle import FLOATS, DeviceHandle
from tinyvllm.ops.attention_spec import AttentionLayer
from tinyvllm.ops.coverage import Coverage, in_words
from tinyvllm.ops.formats.matrix import Matrix
from tinyvllm.ops.sampling.logits_processing import SamplingState, sample_processed
from tinyvllm.ops.sampling.sample import OUT_WIDTH, SampleSpec, sample
from tinyvllm.ops.step_inputs import StepLayout

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PoolGroup:
    """Layers whose keys and values have the same shape. A layer that reads another's is in no group."""

    layers: tuple[int, ...]
    num_kv_heads: int  # K
    head_dim: int  # D

    @property
    def slot_elements(self) -> int:
        """Elements of one token's keys (or values) in one layer."""
        return self.num_kv_heads * self.head_dim


def pool_groups(layers: Sequence[LayerKind]) -> tuple[PoolGroup, ...]:
    """The groups of a model's layers, by the shape of their keys."""
    found: dict[tuple[int, int], list[int]] = {}
    for index, kind in enumerate(layers):
        if kind.kv_layer is None:
            found.setdefault((kind.num_kv_heads, kind.head_dim), []).append(index)
    return tuple(PoolGroup(tuple(indexes), *shape) for shape, indexes in found.items())


Stored: TypeAlias = Tensor | tuple[Tensor, ...]  # a layer's keys or values: of a CPU, each core's


@dataclass
class KVPool:
    """The paged cache. Block b of a layer lies at b * block_elements of its flat tensor of keys, or of values."""

    keys: dict[int, Stored]  # by layer
    values: dict[int, Stored]
    num_blocks: int
    dtype: str

    @property
    def tensors(self) -> list[Tensor]:
        """Every tensor: of a layer that several cores share, each core's."""
        layers = [
            entry if isinstance(entry, tuple) else (entry,) for entry in (*self.keys.values(), *self.values.values())
        ]
        return [tensor for layer in layers for tensor in layer]


def zeroed_pool(
    device: DeviceHandle, groups: Sequence[PoolGroup], num_blocks: int, block_size: int, dtype: str
) -> KVPool:
    """A pool with one tensor of keys and one of values for each layer."""
    slots, float_type = num_blocks * block_size, FLOATS[dtype]
    sizes = {layer: slots * group.slot_elements for group in groups for layer in group.layers}
    keys, values = ({layer: device.zeros(sizes[layer], float_type) for layer in sorted(sizes)} for _ in range(2))
    return KVPool(keys, values, num_blocks, dtype)


@dataclass(frozen=True)
class Step:
    """One step as its operations see it. `kept`: what an operation computed from the inputs for all layers, by name."""

    layout: StepLayout
    inputs: Tensor  # int32, fields as in StepLayout
    pool: KVPool
    is_decode: bool  # every row is the last token of a sequence of its own
    previous_output: Tensor | None = None  # of the step before, for tokens that the host does not know yet
    kept: dict[str, Tensor] = field(default_factory=dict, compare=False)

    @property
    def num_tokens(self) -> int:
        return self.layout.num_tokens


@dataclass(frozen=True)
class Norm:
    """An RMSNorm: its weight (columns,) float32, and epsilon."""

    weight: Tensor
    eps: float


@dataclass(frozen=True, eq=False)
class Epilogue:
    """What follows a product y = x @ w.T, in this order: y + bias; activation(gate) * up, where y's columns are both
    (`Weights.gate_up`); RMSNorm; * scale; + residual; softcap * tanh(y / softcap)."""

    bias: Tensor | None = None  # (N,) float32
    activation: str | None = None  # a name of ops/activation.py
    post_norm: Norm | None = None
    scale: float = 1.0
    residual: Tensor | None = None  # (T * N,)
    softcap: float | None = None

    @property
    def is_plain(self) -> bool:
        """Whether nothing follows the product."""
        return self.activation is None and self.residual is None and not self.uncovered()

    def features(self) -> dict[str, bool]:
        """What there is beyond an activation and a residual, in words."""
        return {
            "a bias": self.bias is not None,
            "a norm after it": self.post_norm is not None,
            "a scale": self.scale != 1.0,
            "a softcap": self.softcap is not None,
        }

    def uncovered(self, covered: Sequence[str] = ()) -> str:
        """The features that are not among `covered`, in words; "" where all are."""
        return in_words([name for name, has in self.features().items() if has and name not in covered])


PLAIN = Epilogue()


class Weights(Protocol):
    """How matrices come to a device."""

    device: DeviceHandle

    def matrix(self, host: HostMatrix) -> Matrix:
        """Put one matrix on the device."""

    def stacked(self, hosts: Sequence[HostMatrix], num_kv_heads: int | None = None) -> tuple[Matrix, ...]:
        """Matrices that share their input, fused by rows: one where their formats agree, else as few as possible.
        `num_kv_heads`: they are q, k and v of so many KV heads."""

    def gate_up(self, gate: HostMatrix, up: HostMatrix) -> Matrix:
        """The two halves of a gated feed-forward, fused as an epilogue's activation wants them."""

    def kv_dtype(self, wanted: str, stored: str) -> str:
        """The dtype of the pool: `wanted`, or for "auto" what suits the device and the checkpoint's dtype."""

    def make_pool(self, groups: Sequence[PoolGroup], num_blocks: int, block_size: int, dtype: str) -> KVPool:
        """A zeroed pool."""


class Operations(Protocol):
    """What a layer computes. Every operation has a general form that takes whatever its arguments can say; what a
    device's fused kernels do not cover runs in it, and is noted in `coverage`."""

    coverage: Coverage

    def embed(self, table: Matrix, step: Step, scale: float = 1.0) -> Tensor:
        """(T * K,): the rows of `table` named by the step's token ids, times `scale`. An id of -1 - r stands for the
        token in row r of the step's `previous_output`."""

    def linear(
        self,
        name: str,
        x: Tensor,
        matrices: Sequence[Matrix],
        num_tokens: int,
        norm: Norm | None = None,
        epilogue: Epilogue = PLAIN,
    ) -> list[Tensor]:
        """epilogue(norm(x) @ w.T) for each matrix: [(T * N,)]. Several matrices have the plain epilogue."""

    def attend(self, qkv: Sequence[Tensor], layer: AttentionLayer, step: Step) -> Tensor:
        """Rotate, write keys and values to their slots, attend: (T * H * D,)."""

    def take_rows(self, x: Tensor, step: Step, num_cols: int) -> Tensor:
        """(R * columns,): the rows whose logits are wanted."""

    def parts_of(self, x: Tensor) -> Sequence[Tensor]:
        """The tensors of an activation, whose columns lie side by side."""

    def join(self, logits: Tensor, stride: int, layout: StepLayout) -> Tensor:
        """(R * stride,): logits in one piece, as they are sampled from."""


class Sampling(Protocol):
    """What turns logits into tokens."""

    def sample(
        self,
        logits: Tensor,
        vocab_size: int,
        stride: int,
        inputs: Tensor,
        layout: StepLayout,
        out: Tensor | None = None,
        state: SamplingState | None = None,
    ) -> Tensor:
        """(R * OUT_WIDTH,) int32, at the beginning of `out` if that is given. With a `state`: of processed logits."""


class Backend(Weights, Operations, Sampling, Protocol):
    """A device's way to load weights, to run the operations of a layer, and to sample."""


class DeviceSampling:
    """`Sampling` by kernels that every device has."""

    device: DeviceHandle

    def join(self, logits: Tensor, stride: int, layout: StepLayout) -> Tensor:
        return logits

    def sample(
        self,
        logits: Tensor,
        vocab_size: int,
        stride: int,
        inputs: Tensor,
        layout: StepLayout,
        out: Tensor | None = None,
        state: SamplingState | None = None,
    ) -> Tensor:
        logits = self.join(logits, stride, layout)
        spec = SampleSpec(layout, vocab_size, stride, self.device.has_threads)
        if state is None:
            return sample(spec, logits, inputs, out)
        return sample_processed(spec, logits, inputs, state, out)


def gate_over_up(gate: HostMatrix, up: HostMatrix) -> HostMatrix:
    """The gate's rows, then the up projection's, as one matrix: both in float16, with a warning, where their formats
    differ, since one kernel reads both."""
    stacked = stack_rows([gate, up])
    if len(stacked) > 1:
        logger.warning("gate and up projections have different formats: both are kept as float16")
        stacked = stack_rows([to_float32(gate).astype(np.float16), to_float32(up).astype(np.float16)])
    return stacked[0]


__all__ = [
    "OUT_WIDTH",
    "PLAIN",
    "Backend",
    "DeviceSampling",
    "Epilogue",
    "KVPool",
    "Norm",
    "PoolGroup",
    "Step",
    "gate_over_up",
    "pool_groups",
    "zeroed_pool",
]
