"""A sparse feed-forward: a router chooses a few of many gated feed-forwards for each token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from tinygrad import Tensor

from tinyvllm.arrays import HostMatrix, format_of, join_rows, to_float32
from tinyvllm.config import ExpertsKind
from tinyvllm.device.recording import keep
from tinyvllm.model.loading import Loader
from tinyvllm.ops.backend import Epilogue, Norm, Operations, Step
from tinyvllm.ops.experts_spec import ExpertLayer
from tinyvllm.ops.formats.matrix import Matrix


@dataclass(frozen=True)
class SharedExpert:
    """An expert that every token passes through, of another size or format than the others."""

    gate_up: Matrix
    down: Matrix


@dataclass(frozen=True)
class SparseFeedForward:
    layer: ExpertLayer
    ffn_norm: Norm | None  # of the experts' input
    router_norm: Norm | None  # of the router's
    shared: SharedExpert | None
    ffn_post_norm: Norm | None  # of the output, before it is added to the residual
    residual_scale: float

    @property
    def matrices(self) -> dict[str, tuple[Matrix, ...]]:
        layer, shared = self.layer, self.shared
        roles = {"router": layer.router, "experts gate_up": layer.gate_up, "experts down": layer.down}
        if shared is not None:
            roles |= {"shared gate_up": shared.gate_up, "shared down": shared.down}
        return {role: (matrix,) for role, matrix in roles.items()}

    def run(self, ops: Operations, x: Tensor, step: Step, out_scale: Tensor | None = None) -> Tensor:
        return self.compute(ops, x, step, residual=x, out_scale=out_scale)

    def compute(
        self, ops: Operations, x: Tensor, step: Step, residual: Tensor, out_scale: Tensor | None = None
    ) -> Tensor:
        """(T * hidden,): `residual` plus the output for x."""
        tokens, norm, scale = step.num_tokens, self.ffn_norm, self.residual_scale
        routing = ops.route(x, self.layer, tokens, self.router_norm)
        keep(routing.ids)  # profiles read them
        last = Epilogue(post_norm=self.ffn_post_norm, scale=scale, residual=residual, out_scale=out_scale)
        if self.shared is None:
            return ops.experts(x, routing, self.layer, tokens, norm, last)
        added = ops.experts(x, routing, self.layer, tokens, norm, replace(last, out_scale=None))
        gate = Epilogue(activation=self.layer.kind.activation)
        (hidden,) = ops.linear("shared_gate_up", x, [self.shared.gate_up], tokens, norm, gate)
        if routing.shared is not None:
            hidden = ops.scale_rows(hidden, routing.shared, tokens)
        return ops.linear("shared_down", hidden, [self.shared.down], tokens, None, replace(last, residual=added))[0]


def load_sparse(
    load: Loader, index: int, kind: ExpertsKind, norm: str | None, post_norm: str | None
) -> SparseFeedForward:
    """`norm`, `post_norm`: the names of the norms before and after it; None: it has no such norm."""
    prefix = f"model.layers.{index}"
    before, experts = load.optional_norm(prefix, norm), load_experts(load, index, kind)
    # each of the two sums, the experts' and the shared expert's, has the epilogue: a norm would not be of both
    assert experts.shared is None or post_norm is None, f"layer {index} has a norm after a shared expert of its own"
    return SparseFeedForward(
        layer=experts.layer,
        ffn_norm=before,
        router_norm=before,
        shared=experts.shared,
        ffn_post_norm=load.optional_norm(prefix, post_norm),
        residual_scale=load.config.residual_scale,
    )


@dataclass(frozen=True)
class LoadedExperts:
    layer: ExpertLayer
    shared: SharedExpert | None


def load_experts(load: Loader, index: int, kind: ExpertsKind) -> LoadedExperts:
    """The router, the experts and the shared expert, which is stacked with them if its size and formats are theirs."""
    prefix, ops, hidden = f"model.layers.{index}.mlp", load.backend, load.config.hidden_size
    count, ffn = kind.num_experts, kind.ffn_size
    stacks = _take_gated(load, f"{prefix}.experts", count, ffn)
    shared = None if not kind.shared_size else _take_gated(load, f"{prefix}.shared_expert", 1, kind.shared_size)
    stacks_shared = shared is not None and bool(kind.num_shared) and not kind.has_biases and _fits(stacks, shared)
    if stacks_shared and shared is not None:
        stacks = _Gated(*[join_rows(pair) for pair in zip(stacks.all, shared.all, strict=True)])
        count, shared = count + 1, None
    layer = ExpertLayer(
        index=index,
        kind=kind,
        router=ops.matrix(_take_router(load, prefix, kind)),
        gate_up=ops.expert_gate_up(stacks.gate, stacks.up, count),
        down=ops.expert_matrix(stacks.down, count),
        router_bias=_vector(load, kind.has_router_bias, f"{prefix}.gate.bias", kind.num_experts),
        choice_bias=_vector(load, kind.has_choice_bias, f"{prefix}.gate.e_score_correction_bias", kind.num_experts),
        expert_scale=_vector(load, kind.has_expert_scale, f"{prefix}.gate.per_expert_scale", kind.num_experts),
        gate_up_bias=_gate_up_bias(load, prefix, kind) if kind.has_biases else None,
        down_bias=_vector(load, kind.has_biases, f"{prefix}.experts.down_proj.bias", kind.num_experts * hidden),
        stacks_shared=stacks_shared,
    )
    if shared is None:
        return LoadedExperts(layer, None)
    return LoadedExperts(layer, SharedExpert(ops.gate_up(shared.gate, shared.up), ops.matrix(shared.down)))


@dataclass(frozen=True)
class _Gated:
    """The matrices of gated feed-forwards, their rows one after another."""

    gate: HostMatrix
    up: HostMatrix
    down: HostMatrix

    @property
    def all(self) -> tuple[HostMatrix, HostMatrix, HostMatrix]:
        return self.gate, self.up, self.down


def _take_gated(load: Loader, prefix: str, count: int, ffn: int) -> _Gated:
    hidden = load.config.hidden_size
    gate, up = (load.take(f"{prefix}.{name}_proj.weight", count * ffn, hidden) for name in ("gate", "up"))
    return _Gated(gate, up, load.take(f"{prefix}.down_proj.weight", count * hidden, ffn))


def _fits(experts: _Gated, shared: _Gated) -> bool:
    return all(format_of(a) == format_of(b) for a, b in zip(experts.all, shared.all, strict=True))


def _take_router(load: Loader, prefix: str, kind: ExpertsKind) -> HostMatrix:
    """A row for each expert, and one for the gate of the shared expert."""
    hidden = load.config.hidden_size
    rows: Sequence[HostMatrix] = [load.take(f"{prefix}.gate.weight", kind.num_experts, hidden)]
    if kind.has_shared_gate:
        rows = [*rows, load.take(f"{prefix}.shared_expert_gate.weight", 1, hidden)]
        if len({format_of(matrix) for matrix in rows}) > 1:
            rows = [to_float32(matrix) for matrix in rows]
    return join_rows(rows)


def _vector(load: Loader, is_there: bool, name: str, size: int) -> Tensor | None:
    return load.vectors({name: size}) if is_there else None


def _gate_up_bias(load: Loader, prefix: str, kind: ExpertsKind) -> Tensor:
    """(E, 2 * ffn), flat: for each expert the gate's, then the up projection's."""
    size = kind.num_experts * kind.ffn_size
    taken = [to_float32(load.checkpoint.take(f"{prefix}.experts.{name}_proj.bias", (size,))) for name in ("gate", "up")]
    biases = [bias.reshape(kind.num_experts, kind.ffn_size) for bias in taken]
    return load.backend.device.upload(np.concatenate(biases, axis=1).reshape(-1))
