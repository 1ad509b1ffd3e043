"""The operations that a transformer layer is made of, as each kind of device has them.

Activations are flat tensors, (T * columns,): rows side by side. A model is written against `Backend` alone, so that
what differs by device (layouts, fusion, kernels) stays in this room.
`reference.py` has each operation in plain Tensor arithmetic.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from tinygrad import Tensor

from tinyvllm.arrays import HostMatrix, stack_rows, to_float32
from tinyvllm.device.handle import DeviceHandle
from tinyvllm.ops.formats.matrix import Matrix
from tinyvllm.ops.sampling.logits_processing import SamplingState, sample_processed
from tinyvllm.ops.sampling.sample import OUT_WIDTH, SampleSpec, sample
from tinyvllm.ops.step_inputs import StepLayout

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class AttentionShape:
    """What attention must know of a model."""

    num_heads: int  # H
    num_kv_heads: int  # K
    head_dim: int  # D


@dataclass
class KVPool:
    """The paged cache: one key and one value tensor a layer, flat; block b of a layer lies at b * block_elements."""

    keys: list[Tensor]
    values: list[Tensor]
    num_blocks: int
    dtype: str

    @property
    def tensors(self) -> list[Tensor]:
        """Every tensor: of a layer that several cores share, each core's."""
        layers = [entry if isinstance(entry, tuple) else (entry,) for entry in (*self.keys, *self.values)]
        return [tensor for layer in layers for tensor in layer]


@dataclass(frozen=True)
class Norm:
    """An RMSNorm: its weight (columns,) float32, and epsilon."""

    weight: Tensor
    eps: float


class Backend(Protocol):
    """A device's way to load weights and to run the operations of a layer."""

    device: DeviceHandle

    def matrix(self, host: HostMatrix) -> Matrix:
        """Put one matrix on the device."""

    def stacked(self, hosts: Sequence[HostMatrix]) -> tuple[Matrix, ...]:
        """Matrices that share their input, fused by rows: one where their formats agree, else as few as possible."""

    def gate_up(self, gate: HostMatrix, up: HostMatrix) -> Matrix:
        """The two halves of a gated feed-forward, fused as `gated` wants them."""

    def kv_dtype(self, wanted: str, stored: str) -> str:
        """The dtype of the pool: `wanted`, or for "auto" what suits the device and the checkpoint's dtype."""

    def embed(self, table: Matrix, inputs: Tensor, layout: StepLayout, newest: Tensor | None = None) -> Tensor:
        """(T * K,): the rows of `table` named by the step's token ids. An id of -1 - r stands for the token in row r of
        `newest`, the output of the step before."""

    def norm_linear(
        self, name: str, x: Tensor, norm: Norm, matrices: Sequence[Matrix], num_tokens: int
    ) -> list[Tensor]:
        """RMSNorm, then one product for each matrix: [(T * N,)]."""

    def linear_add(self, name: str, x: Tensor, matrix: Matrix, residual: Tensor, num_tokens: int) -> Tensor:
        """residual + x @ matrix.T, (T * N,)."""

    def norm_gated(self, name: str, x: Tensor, norm: Norm, matrix: Matrix, num_tokens: int) -> Tensor:
        """RMSNorm, then silu(x @ gate.T) * (x @ up.T), (T * N / 2,)."""

    def attend(
        self,
        qkv: Sequence[Tensor],
        widths: Sequence[int],
        shape: AttentionShape,
        pool: KVPool,
        layer: int,
        inputs: Tensor,
        rope: Tensor,
        layout: StepLayout,
        *,
        is_decode: bool,
        head_norm: Norm | None = None,
    ) -> Tensor:
        """Rotate, write keys and values to their slots, attend: (T * H * D,). `head_norm`: each head of queries and
        keys is normed before it is rotated; its weight (2 * D,) is the queries', then the keys'."""

    def take_rows(self, x: Tensor, inputs: Tensor, layout: StepLayout, num_cols: int) -> Tensor:
        """(R * columns,): the rows whose logits are wanted."""

    def parts_of(self, x: Tensor) -> Sequence[Tensor]:
        """The tensors of an activation, whose columns lie side by side."""

    def join(self, logits: Tensor, stride: int, layout: StepLayout) -> Tensor:
        """(R * stride,): logits in one piece, as they are sampled from."""

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

    def make_pool(self, num_layers: int, num_blocks: int, block_size: int, shape: AttentionShape, dtype: str) -> KVPool:
        """A zeroed pool."""


def head_tables(rope: Tensor, head_norm: Norm | None) -> tuple[list[Tensor], float | None]:
    """What a kernel that rotates heads takes of a model: its tables, and the epsilon of the heads' norm."""
    return ([rope], None) if head_norm is None else ([rope, head_norm.weight], head_norm.eps)


def sample_rows(
    device: DeviceHandle,
    logits: Tensor,
    vocab_size: int,
    stride: int,
    inputs: Tensor,
    layout: StepLayout,
    out: Tensor | None = None,
    state: SamplingState | None = None,
) -> Tensor:
    """`Backend.sample`, the same for every device."""
    spec = SampleSpec(layout, vocab_size, (stride,), device.has_threads)
    if state is None:
        return sample(spec, [logits], inputs, out)
    return sample_processed(spec, [logits], inputs, state, out)


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
    "AttentionShape",
    "Backend",
    "KVPool",
    "Norm",
    "gate_over_up",
    "sample_rows",
]
