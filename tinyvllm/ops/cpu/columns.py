"""Kernels of the CPU device over groups of an activation's columns: per-layer embeddings have one for each layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from tinygrad import UOp

from tinyvllm.ops.activation import gated
from tinyvllm.ops.cpu.product import CPU_ARITHMETIC
from tinyvllm.ops.kernel.body import Body, KernelFn, cached_kernel, clamp, fill, finish


@dataclass(frozen=True)
class GroupNormSpec:
    """RMSNorm of each group of columns of x (T, M), plus an addend of the same shape if there is one. Row t of the
    output begins at element start + t * stride; a stride of 0 stands for M."""

    num_tokens: int  # T
    x_cols: tuple[int, ...]  # columns of each shard of x and of the addend; they may end inside a group
    group: int  # columns
    eps: float
    has_addend: bool = True
    start: int = 0
    stride: int = 0


@cached_kernel
def norm_groups_kernel(spec: GroupNormSpec) -> KernelFn:
    """fn(out (T, M), *x shards, *addend shards, weight (group,))."""

    def kernel(out: UOp, *operands: UOp) -> UOp:
        body, count, group, cols = Body(), len(spec.x_cols), spec.group, sum(spec.x_cols)
        x, addend, weight = operands[:count], operands[count:-1], operands[-1]
        token, index = body.loop(spec.num_tokens), body.loop(cols // group)
        total = fill(body, body.registers(1), 0.0, token, index)
        k = body.fold(group)
        value = _read(x, spec.x_cols, token, index * group + k)
        inner = total.after(k)
        total = total.after(inner[0].store(inner[0].load() + value * value).end(k))
        scale = body.registers(1)
        found = (total[0].load() * (1.0 / group) + spec.eps).sqrt().reciprocal()
        scale = scale.after(scale.after(token, index)[0].store(found))
        i = body.loop(group)
        col = index * group + i
        value = _read(x, spec.x_cols, token, col) * scale[0].load() * weight[i].load()
        if spec.has_addend:
            value = value + _read(addend, spec.x_cols, token, col)
        size = spec.num_tokens * cols
        store = out[spec.start + token * (spec.stride or cols) + col].store(value).end(i, index, token)
        return finish(store, f"norm_groups_{spec.num_tokens}x{cols}", ops=5 * size, nbytes=12 * size)

    return kernel


def _read(shards: Sequence[UOp], widths: Sequence[int], token: UOp, col: UOp) -> UOp:
    """The value in column `col` of an activation, from the shard that holds it."""
    value: UOp | None = None
    for shard, width, end in zip(shards, widths, accumulate(widths), strict=True):
        start = end - width
        inside = col if len(shards) == 1 else (col - start).maximum(0).minimum(width - 1)
        here = shard[token * width + inside].load()
        value = here if value is None else (col < start).where(value, here)
    assert value is not None
    return value


@dataclass(frozen=True)
class GateSpec:
    """activation(gate (T, N)) * the N columns of factors (T, M) that begin `first_col` after a start that is data."""

    num_tokens: int  # T
    num_cols: int  # N, of this core
    first_col: int
    factor_cols: int  # M
    activation: str


@cached_kernel
def gate_columns_kernel(spec: GateSpec) -> KernelFn:
    """fn(out (T, N), gate (T, N), factors (T, M), start (1,) int32)."""

    def kernel(out: UOp, gate: UOp, factors: UOp, start: UOp) -> UOp:
        body = Body()
        token, col = body.loop(spec.num_tokens), body.loop(spec.num_cols)
        last = spec.factor_cols - spec.first_col - spec.num_cols
        at = token * spec.factor_cols + clamp(start[0].load(), 0, last) + spec.first_col + col
        factor, index = factors[at].load(), token * spec.num_cols + col
        (value,) = gated(spec.activation, [gate[index].load()], [factor], CPU_ARITHMETIC)
        size = spec.num_tokens * spec.num_cols
        store = out[index].store(value).end(col, token)
        return finish(store, f"gate_columns_{spec.num_tokens}x{spec.num_cols}", ops=8 * size, nbytes=12 * size)

    return kernel
