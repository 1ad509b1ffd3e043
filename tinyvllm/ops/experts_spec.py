"""A layer's experts on the device, and which of them were chosen for a step's tokens."""

from __future__ import annotations

from dataclasses import dataclass

from tinygrad import Tensor

from tinyvllm.config import ExpertsKind
from tinyvllm.ops.formats.matrix import Matrix


@dataclass(frozen=True)
class ExpertLayer:
    """One layer's router and experts. E: experts, and one more if the shared expert is stacked with them.

    The router has a row for each expert, and then one for the gate of the shared expert, if that has a gate.
    """

    index: int  # the layer's number
    kind: ExpertsKind
    router: Matrix
    gate_up: Matrix  # (E * 2 * ffn, hidden), arranged as `Weights.expert_gate_up` has it
    down: Matrix  # (E * hidden, ffn)
    router_bias: Tensor | None = None  # (num_experts,) float32
    choice_bias: Tensor | None = None  # (num_experts,) float32
    expert_scale: Tensor | None = None  # (num_experts,) float32
    gate_up_bias: Tensor | None = None  # (E, 2 * ffn) float32, flat: the gate's, then the up projection's
    down_bias: Tensor | None = None  # (E, hidden) float32, flat
    stacks_shared: bool = False  # the shared expert is expert E - 1 of both matrices, chosen by every token

    @property
    def num_chosen(self) -> int:
        """k: experts that each token passes through, the shared one included if it is stacked."""
        return self.kind.top_k + self.stacks_shared


@dataclass(frozen=True)
class Routing:
    """Which experts a step's tokens pass through. Flat tensors; token t's are at [t * k, (t + 1) * k).

    A backend's own subclass may add in which order its products take the rows.
    """

    ids: Tensor  # (T * k,) int32; rows that pad a step have experts too
    weights: Tensor  # (T * k,) float32
    shared: Tensor | None = None  # (T,) float32: the weight of a shared expert that has a gate and is not stacked
