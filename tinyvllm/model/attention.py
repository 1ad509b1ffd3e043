"""Grouped-query attention over keys and values in the pool: its weights, and its equations."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from tinygrad import Tensor

from tinyvllm.arrays import HostMatrix, take_rows
from tinyvllm.config import LayerKind
from tinyvllm.model.adapted import adapted_product
from tinyvllm.model.loading import Loader
from tinyvllm.ops.adapter_spec import AdapterSite
from tinyvllm.ops.attention_spec import AttentionLayer
from tinyvllm.ops.backend import Epilogue, Norm, Operations, Step
from tinyvllm.ops.formats.matrix import Matrix, without_values


@dataclass(frozen=True)
class OutputGate:
    """What attention returns is multiplied by the sigmoid of this product (Qwen3-Next)."""

    matrix: Matrix  # (H * D, hidden)
    start: Tensor  # (1,) int32: zero


@dataclass(frozen=True)
class Attention:
    """`qkv` is one matrix, or several where their formats differ (Q4_K_M keeps V in Q6_K)."""

    attention: AttentionLayer
    attention_norm: Norm | None
    qkv: tuple[Matrix, ...]
    attention_out: Matrix
    out_bias: Tensor | None
    attention_post_norm: Norm | None  # of the output, before it is added to the residual
    residual_scale: float
    output_gate: OutputGate | None = None
    qkv_adapters: AdapterSite | None = None  # of q, k, v and the output gate
    out_adapters: AdapterSite | None = None

    @property
    def matrices(self) -> dict[str, tuple[Matrix, ...]]:
        gate = {} if self.output_gate is None else {"output_gate": (self.output_gate.matrix,)}
        return {"qkv": self.qkv, **gate, "attention_out": (self.attention_out,)}

    def run(self, ops: Operations, x: Tensor, step: Step) -> Tensor:
        tokens, gate = step.num_tokens, self.output_gate
        matrices = self.qkv if gate is None else (*self.qkv, gate.matrix)
        qkv = ops.linear("qkv", x, matrices, tokens, self.attention_norm)  # (T * (H + 2K) * D,) in all, and the gate's
        if self.qkv_adapters is not None and step.layout.has_adapters:
            qkv = ops.adapt(x, qkv, self.qkv_adapters, step, self.attention_norm)
        heads = ops.attend(qkv[: len(self.qkv)], self.attention, step)  # (T * H * D,)
        if gate is not None:
            heads = ops.gate_columns(qkv[-1], heads, gate.start, tokens, "sigmoid")
        epilogue = Epilogue(
            bias=self.out_bias, post_norm=self.attention_post_norm, scale=self.residual_scale, residual=x
        )
        return adapted_product(ops, "attention_out", heads, self.attention_out, self.out_adapters, step, epilogue)


@dataclass(frozen=True)
class Placed:
    """Where a layer's attention finds what layers share: its rope's table, and its group of the pool."""

    index: int  # the layer's number
    rope: Tensor | None
    pool_group: int


def load_attention(load: Loader, kind: LayerKind, placed: Placed, norm: str | None, post_norm: str | None) -> Attention:
    """`norm`, `post_norm`: the names of the norms before and after it; None: it has no such norm."""
    prefix, config, ops = f"model.layers.{placed.index}", load.config, load.backend
    hosts = _load_qkv(load, f"{prefix}.self_attn", kind)
    gate = None
    if kind.has_output_gate:
        hosts[0], rows = _split_gate(hosts[0], kind)
        gate = OutputGate(ops.stacked([rows], kind.num_kv_heads)[0], ops.device.upload(np.zeros(1, np.int32)))
    qkv = ops.stacked(hosts, kind.num_kv_heads)
    has_out_bias, hidden = "out" in config.biases, config.hidden_size
    out = ops.matrix(load.take(f"{prefix}.self_attn.o_proj.weight", hidden, kind.q_size))
    tables = _load_tables(load, kind, placed, tuple(matrix.num_rows for matrix in qkv))
    return Attention(
        attention=replace(tables, reader=without_values(out) if gate is None else None),
        attention_norm=load.optional_norm(prefix, norm),
        qkv=qkv,
        attention_out=out,
        out_bias=load.vectors({f"{prefix}.self_attn.o_proj.bias": hidden}) if has_out_bias else None,
        attention_post_norm=load.optional_norm(prefix, post_norm),
        residual_scale=config.residual_scale,
        output_gate=gate,
    )


def _split_gate(host: HostMatrix, kind: LayerKind) -> tuple[HostMatrix, HostMatrix]:
    """(the queries' rows, the gate's) of a matrix that has those of each head in turn."""
    rows = np.arange(2 * kind.q_size).reshape(kind.num_heads, 2, kind.head_dim)
    return take_rows(host, rows[:, 0].reshape(-1)), take_rows(host, rows[:, 1].reshape(-1))


def _load_qkv(load: Loader, prefix: str, kind: LayerKind) -> list[HostMatrix]:
    hidden, rows = load.config.hidden_size, _qkv_rows(kind)
    if kind.has_output_gate:
        rows["q"] *= 2
    matrices = [load.take(f"{prefix}.{name}_proj.weight", count, hidden) for name, count in rows.items()]
    return [*matrices, matrices[1]] if kind.has_v_from_k else matrices  # the rows of k a second time


def _load_tables(load: Loader, kind: LayerKind, placed: Placed, qkv_cols: tuple[int, ...]) -> AttentionLayer:
    prefix, bias = f"model.layers.{placed.index}.self_attn", None
    if kind.has_bias:
        bias = load.vectors({f"{prefix}.{name}_proj.bias": size for name, size in _qkv_rows(kind).items()})
    return AttentionLayer(
        index=placed.index,
        kind=kind,
        qkv_cols=qkv_cols,
        pool_group=placed.pool_group,
        rope=placed.rope,
        head_norm=None if kind.head_norm_eps is None else _load_head_norm(load, prefix, kind),
        bias=bias,
        sinks=load.vectors({f"{prefix}.sinks": kind.num_heads}) if kind.has_sinks else None,
    )


def _load_head_norm(load: Loader, prefix: str, kind: LayerKind) -> Tensor:
    """The weights of the norm of queries, and of keys."""
    key_norm = "k_norm" if kind.kv_layer is None else "q_norm"  # read only with keys of its own
    names = [f"{prefix}.q_norm.weight", f"{prefix}.{key_norm}.weight"]
    if not kind.head_norm_is_whole:
        return load.norm(*names, size=kind.head_dim).weight
    return load.vectors(dict(zip(names, (kind.q_size, kind.kv_size), strict=True)))


def _qkv_rows(kind: LayerKind) -> dict[str, int]:
    """The rows of q, then of k and v; without v where k serves for both, and of q alone where another layer's keys and
    values are read."""
    if kind.kv_layer is not None:
        return {"q": kind.q_size}
    if kind.has_v_from_k:
        return {"q": kind.q_size, "k": kind.kv_size}
    return {"q": kind.q_size, "k": kind.kv_size, "v": kind.kv_size}
