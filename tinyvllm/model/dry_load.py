"""A family's own loading without values or a device: what is wrong with the tensors, from their headers alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
from tinygrad import Tensor

from tinyvllm.arrays import DENSE_BITS, Format, HostMatrix
from tinyvllm.config import ModelConfig
from tinyvllm.errors import UnsupportedModelError
from tinyvllm.model.registry import find_family
from tinyvllm.model.weights.checkpoint import Checkpoint
from tinyvllm.ops.backend import Backend
from tinyvllm.ops.formats.matrix import PANEL, Matrix


def require_tensors(config: ModelConfig, checkpoint: Checkpoint) -> None:
    """Raise what loading the checkpoint would raise: WeightMismatchError for a tensor that is missing, has another
    shape or is left over, UnsupportedModelError for a type that no format explains or a width that no kernel reads.

    The family's class loads zeros, so that this list of tensors is the one that the engine takes. Of the files, only
    biases that are left over are read: those of zeros are ignored.
    """
    find_family(config)(config, _Headers(checkpoint), cast(Backend, _NoBackend()), num_positions=1)


class _Headers:
    """A WeightSource of zeros: a matrix is one zero, seen everywhere."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint

    def take(self, name: str, shape: tuple[int, ...]) -> HostMatrix:
        self._checkpoint.find(name, shape)
        if len(shape) == 2 and shape[1] % PANEL:
            raise UnsupportedModelError(
                f"{name} has {shape[1]} columns, but kernels read {PANEL} at a time: hidden_size, "
                f"intermediate_size (of experts too) and num_attention_heads * head_dim must be multiples of {PANEL}"
            )
        return np.broadcast_to(np.float32(0), shape)

    def finish(self) -> None:
        self._checkpoint.finish()


class _NoDevice:
    def upload(self, array: np.ndarray) -> Tensor:
        return cast(Tensor, array)


class _NoBackend:
    """What `Decoder.__init__` calls of a backend, without memory."""

    device = _NoDevice()

    def matrix(self, host: HostMatrix) -> Matrix:
        rows, cols = host.shape
        form = Format("float32", DENSE_BITS["float32"])
        return Matrix(format=form, num_rows=rows, num_cols=cols, used_rows=rows, layout="row", planes=())

    def stacked(self, hosts: Sequence[HostMatrix], num_kv_heads: int | None = None) -> tuple[Matrix, ...]:
        return tuple(self.matrix(host) for host in hosts)

    def gate_up(self, gate: HostMatrix, up: HostMatrix) -> Matrix:
        return self.matrix(gate)

    def expert_gate_up(self, gate: HostMatrix, up: HostMatrix, num_experts: int) -> Matrix:
        return self.expert_matrix(gate, num_experts)

    def expert_matrix(self, host: HostMatrix, num_experts: int) -> Matrix:
        return self.matrix(host)
