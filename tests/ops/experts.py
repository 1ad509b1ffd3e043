"""Layers of experts for tests: seeded weights of every format, and rows that make the router choose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.ops.builders import make_host, normal
from tinyvllm.config import ExpertsKind
from tinyvllm.ops.backend import PLAIN, Backend, Epilogue, Norm
from tinyvllm.ops.experts_spec import ExpertLayer, Routing

if TYPE_CHECKING:
    from tinygrad import Tensor

HIDDEN, FFN = 256, 64


@dataclass(frozen=True)
class Case:
    """A layer of experts, and the rows of a step."""

    kind: ExpertsKind
    fmt: str = "float32"
    num_tokens: int = 7
    stacks_shared: bool = False
    hidden: int = HIDDEN

    @property
    def stacked(self) -> int:
        return self.kind.num_experts + self.stacks_shared


def make_kind(num_experts: int = 8, top_k: int = 2, **fields: Any) -> ExpertsKind:
    return ExpertsKind(num_experts, top_k, FFN, **fields)


def make_layer(backend: Backend, case: Case) -> ExpertLayer:
    kind, upload, count = case.kind, backend.device.upload, case.stacked
    rows, ffn = kind.num_experts + kind.has_shared_gate, kind.ffn_size
    router = normal(rows, case.hidden, seed=1) * 2 / np.sqrt(case.hidden)
    gate, up = (make_host(case.fmt, count * ffn, case.hidden, seed=seed) for seed in (2, 3))

    def table(has: bool, size: int, seed: int) -> Tensor | None:
        return upload(0.3 * normal(size, seed=seed)) if has else None

    return ExpertLayer(
        index=0,
        kind=kind,
        router=backend.matrix(router.astype(np.float32)),
        gate_up=backend.expert_gate_up(gate, up, count),
        down=backend.expert_matrix(make_host(case.fmt, count * case.hidden, ffn, seed=4), count),
        router_bias=table(kind.has_router_bias, kind.num_experts, 5),
        choice_bias=table(kind.has_choice_bias, kind.num_experts, 6),
        expert_scale=table(kind.has_expert_scale, kind.num_experts, 7),
        gate_up_bias=table(kind.has_biases, count * 2 * ffn, 8),
        down_bias=table(kind.has_biases, count * case.hidden, 9),
        stacks_shared=case.stacks_shared,
    )


@dataclass(frozen=True)
class Result:
    ids: np.ndarray  # (T, k)
    weights: np.ndarray  # (T, k)
    out: np.ndarray  # (T, hidden)
    shared: np.ndarray | None


def run_layer(backend: Backend, case: Case, epilogue: str = "", x: np.ndarray | None = None) -> Result:
    """`epilogue`: r(esidual), n(orm), s(cale)."""
    layer, upload, tokens = make_layer(backend, case), backend.device.upload, case.num_tokens
    rows = upload(normal(tokens, case.hidden, seed=10) if x is None else x)
    norm = Norm(upload(1 + 0.3 * normal(case.hidden, seed=11)), 1e-5)
    routing = backend.route(rows, layer, tokens, norm)
    end = PLAIN
    if epilogue:
        end = Epilogue(
            post_norm=Norm(upload(1 + 0.3 * normal(case.hidden, seed=12)), 0.05) if "n" in epilogue else None,
            scale=0.7 if "s" in epilogue else 1.0,
            residual=rows if "r" in epilogue else None,
        )
    out = backend.experts(rows, routing, layer, tokens, norm, end)
    return read_result(routing, out.numpy(), tokens)


def read_result(routing: Routing, out: np.ndarray, tokens: int) -> Result:
    shared = None if routing.shared is None else routing.shared.numpy()
    ids, weights = routing.ids.numpy(), routing.weights.numpy()
    return Result(ids.reshape(tokens, -1), weights.reshape(tokens, -1), out.reshape(tokens, -1), shared)
