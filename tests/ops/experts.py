"""Layers of experts for tests: seeded weights of every format, and what NumPy makes of the same weights."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.ops.builders import make_host, normal
from tinyvllm.arrays import HostMatrix, to_float32
from tinyvllm.config import ExpertsKind
from tinyvllm.ops.backend import Backend, Epilogue, Norm
from tinyvllm.ops.experts_spec import ExpertLayer, Routing

if TYPE_CHECKING:
    from tinygrad import Tensor

SEEDS = {"router_bias": 5, "choice_bias": 6, "expert_scale": 7, "gate_up_bias": 8, "down_bias": 9}
EPS, POST_EPS, SCALE = 1e-5, 0.05, 0.7


@dataclass(frozen=True)
class Case:
    """A layer of experts, and the rows of a step."""

    kind: ExpertsKind
    fmt: str = "float32"
    num_tokens: int = 7
    stacks_shared: bool = False
    hidden: int = 256
    epilogue: str = ""  # of r(esidual), n(orm), s(cale)
    dead: frozenset[int] = frozenset()  # experts whose weights are NaN

    @property
    def num_stacked(self) -> int:
        return self.kind.num_experts + self.stacks_shared

    @property
    def table_sizes(self) -> dict[str, int]:
        """The sizes of the vectors that the layer has, by name."""
        kind, count = self.kind, self.num_stacked
        sizes = {
            "router_bias": kind.has_router_bias * kind.num_experts,
            "choice_bias": kind.has_choice_bias * kind.num_experts,
            "expert_scale": kind.has_expert_scale * kind.num_experts,
            "gate_up_bias": kind.has_biases * count * 2 * kind.ffn_size,
            "down_bias": kind.has_biases * count * self.hidden,
        }
        return {name: size for name, size in sizes.items() if size}

    def table(self, name: str) -> np.ndarray | None:
        size = self.table_sizes.get(name)
        return None if size is None else 0.3 * normal(size, seed=SEEDS[name])

    @property
    def router(self) -> np.ndarray:
        """Rows of which some are the same, so that their experts' scores are."""
        rows = normal(self.kind.num_experts + self.kind.has_shared_gate, self.hidden, seed=1)
        rows[1] = rows[3]
        return (2 * rows / math.sqrt(self.hidden)).astype(np.float32)

    @property
    def x(self) -> np.ndarray:
        return normal(self.num_tokens, self.hidden, seed=10)

    @property
    def norms(self) -> tuple[np.ndarray, np.ndarray]:
        """Weights of the norm before the layer, and of the one after it."""
        return 1 + 0.3 * normal(self.hidden, seed=11), 1 + 0.3 * normal(self.hidden, seed=12)

    @property
    def hosts(self) -> tuple[HostMatrix, HostMatrix, HostMatrix]:
        """Gate, up, down of all experts."""
        ffn, count = self.kind.ffn_size, self.num_stacked
        shapes = [(count * ffn, self.hidden), (count * ffn, self.hidden), (count * self.hidden, ffn)]
        hosts = [make_host(self.fmt, *shape, seed=seed) for seed, shape in enumerate(shapes, 2)]
        for host in hosts:
            for expert in self.dead:
                assert isinstance(host, np.ndarray)
                host.reshape(count, -1)[expert] = np.nan
        return hosts[0], hosts[1], hosts[2]


def make_kind(num_experts: int = 8, top_k: int = 2, ffn_size: int = 64, **fields: Any) -> ExpertsKind:
    return ExpertsKind(num_experts, top_k, ffn_size, **fields)


def make_layer(backend: Backend, case: Case) -> ExpertLayer:
    gate, up, down = case.hosts
    tables: dict[str, Tensor] = {}
    for name in case.table_sizes:
        table = case.table(name)
        assert table is not None
        tables[name] = backend.device.upload(table.astype(np.float32))
    return ExpertLayer(
        index=0,
        kind=case.kind,
        router=backend.matrix(case.router),
        gate_up=backend.expert_gate_up(gate, up, case.num_stacked),
        down=backend.expert_matrix(down, case.num_stacked),
        stacks_shared=case.stacks_shared,
        **tables,
    )


@dataclass(frozen=True)
class Result:
    ids: np.ndarray  # (T, k)
    weights: np.ndarray  # (T, k)
    shared: np.ndarray | None  # (T,)
    out: np.ndarray | None = None  # (T, hidden)


def run_routing(backend: Backend, case: Case, x: np.ndarray | None = None) -> Result:
    """Of the case's rows, or of others."""
    x = case.x if x is None else x
    rows, norm, tokens = backend.device.upload(x), Norm(backend.device.upload(case.norms[0]), EPS), len(x)
    return _read(backend.route(rows, make_layer(backend, case), tokens, norm), tokens)


def run_layer(backend: Backend, case: Case, x: Any = None) -> Result:
    """`x`: the case's rows as an activation, if they are not in one tensor."""
    layer, upload, tokens = make_layer(backend, case), backend.device.upload, case.num_tokens
    rows, norm = upload(case.x) if x is None else x, Norm(upload(case.norms[0]), EPS)
    routing = backend.route(rows, layer, tokens, norm)
    end = Epilogue(
        post_norm=Norm(upload(case.norms[1]), POST_EPS) if "n" in case.epilogue else None,
        scale=SCALE if "s" in case.epilogue else 1.0,
        residual=rows if "r" in case.epilogue else None,
    )
    out = backend.experts(rows, routing, layer, tokens, norm, end)
    found = np.concatenate([part.numpy().reshape(tokens, -1) for part in backend.parts_of(out)], axis=1)
    return replace(_read(routing, tokens), out=found)


def _read(routing: Routing, tokens: int) -> Result:
    shared = None if routing.shared is None else routing.shared.numpy()
    return Result(
        routing.ids.numpy().reshape(tokens, -1), routing.weights.numpy().reshape(tokens, -1).astype(np.float32), shared
    )


# -- in NumPy --------------------------------------------------------------------------------------------------------


def expected_routing(case: Case, x: np.ndarray | None = None) -> Result:
    """What transformers' routers compute, in float32."""
    kind = case.kind
    logits = _normed(case.x if x is None else x, case.norms[0], EPS) @ case.router.T
    experts, gate = logits[:, : kind.num_experts], logits[:, kind.num_experts :]
    experts = experts + (0.0 if (bias := case.table("router_bias")) is None else bias)
    powers = np.exp(experts - experts.max(1, keepdims=True))
    scores = _sigmoid(experts) if kind.score == "sigmoid" else powers / powers.sum(1, keepdims=True)
    choice = scores + (0.0 if (bias := case.table("choice_bias")) is None else bias)
    if kind.num_groups > 1:
        groups = choice.reshape(len(choice), kind.num_groups, -1)
        best = np.argsort(-np.sort(groups, axis=2)[..., -2:].sum(2), axis=1, kind="stable")[:, : kind.top_groups]
        is_in = np.zeros(groups.shape[:2], bool)
        np.put_along_axis(is_in, best, True, axis=1)
        choice = np.where(is_in[..., None], groups, -np.inf).reshape(choice.shape)
    ids = np.argsort(-choice, axis=1, kind="stable")[:, : kind.top_k]
    weights = np.take_along_axis(scores, ids, axis=1)
    if kind.renormalizes:
        weights = weights / (weights.sum(1, keepdims=True) + 1e-20)
    weights = weights * kind.scale
    if (scale := case.table("expert_scale")) is not None:
        weights = weights * scale[ids]
    shared = _sigmoid(gate[:, 0]) if kind.has_shared_gate else None
    if case.stacks_shared:
        ids = np.pad(ids, ((0, 0), (0, 1)), constant_values=kind.num_experts)
        weights = np.concatenate([weights, np.ones((len(ids), 1)) if shared is None else shared[:, None]], axis=1)
        shared = None
    return Result(ids, weights, shared)


def expected_layer(case: Case) -> Result:
    kind, routing, count = case.kind, expected_routing(case), case.num_stacked
    gate, up, down = (to_float32(host).reshape(count, -1, host.shape[1]) for host in case.hosts)
    x, out = _normed(case.x, case.norms[0], EPS), np.zeros(case.x.shape, np.float32)
    biases, after = case.table("gate_up_bias"), case.table("down_bias")
    for token, (ids, weights) in enumerate(zip(routing.ids, routing.weights, strict=True)):
        for expert, weight in zip(ids, weights, strict=True):
            both = [gate[expert] @ x[token], up[expert] @ x[token]]
            if biases is not None:
                both = list(np.stack(both) + biases.reshape(count, 2, -1)[expert])
            y = down[expert] @ _gated(kind.activation, both[0], both[1])
            out[token] += weight * (y if after is None else y + after.reshape(count, -1)[expert])
    if "n" in case.epilogue:
        out = _normed(out, case.norms[1], POST_EPS)
    out = out * SCALE if "s" in case.epilogue else out
    return replace(routing, out=out + case.x if "r" in case.epilogue else out)


def _gated(activation: str, gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    if activation == "silu":
        return gate * _sigmoid(gate) * up
    if activation == "gelu_tanh":
        return gate * _sigmoid(2 * math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)) * up
    assert activation == "clamped_swiglu"
    gate = np.minimum(gate, 7.0)
    return gate * _sigmoid(1.702 * gate) * (np.clip(up, -7.0, 7.0) + 1.0)


def _normed(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x * x).mean(1, keepdims=True) + eps) * weight


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -x))
