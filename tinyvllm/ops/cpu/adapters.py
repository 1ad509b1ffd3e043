"""Adapters' kernels on the CPU device (ops/adapter_spec.py).

Each core shrinks the columns of x that it owns, so that nothing is copied between cores; whoever expands adds up the
cores' partial results, and applies the scale of x's norm, which is linear in A x. Each core expands the columns of the
product that it owns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import gcd

from tinygrad import UOp, dtypes

from tinyvllm.ops.activation import gated
from tinyvllm.ops.adapter_spec import ExpandSpec, ShrinkSpec, SiteShape
from tinyvllm.ops.cpu.product import CPU_ARITHMETIC
from tinyvllm.ops.formats.matrix import HALF, PANEL
from tinyvllm.ops.kernel.body import Body, KernelFn, balanced, cached_kernel, clamp, fill, finish

LANES = 16  # columns that are computed side by side


@dataclass(frozen=True)
class CpuShrinkSpec(ShrinkSpec):
    """One core's part of A x: S * R sums over its columns of norm weight * x, and with a norm the sum of x's squares in
    one more column."""

    @property
    def num_cols(self) -> int:
        """Of the result."""
        return self.shape.num_shrunk + (self.norm_eps is not None)

    @property
    def lanes(self) -> int:
        return gcd(self.own_cols, LANES)


@dataclass(frozen=True)
class Segment:
    """Columns of a product's shard whose rows of B are of one section: `num_chunks` runs of as many columns as the
    spec has lanes. Run c begins at column first_col + c * stride, and at B's row first_row + c * lanes."""

    section: int
    first_col: int
    first_row: int
    num_chunks: int
    stride: int


@dataclass(frozen=True)
class CpuExpandSpec(ExpandSpec):
    """One core's columns. `num_cols`: those of its shard."""

    segments: tuple[Segment, ...] = ()
    lanes: int = LANES
    num_partials: int = 1  # results of cores that shrank
    norm_eps: float | None = None  # of x

    @property
    def name(self) -> str:
        return f"adapter_expand_{self.num_tokens}x{self.num_cols}x{self.shape.max_rank}"


def runs_of(rows: Sequence[tuple[int, int, int]]) -> tuple[tuple[Segment, ...], int]:
    """(segments, lanes) of a shard whose columns are runs of B's rows. rows: (section, first row, count) of each."""
    lanes = gcd(LANES, *[count for _, _, count in rows])
    segments, col = [], 0
    for section, first, count in rows:
        segments.append(Segment(section, col, first, count // lanes, lanes))
        col += count
    return tuple(segments), lanes


def gate_up_runs(first: int, count: int, num_rows: int) -> tuple[tuple[Segment, ...], int]:
    """The same of a shard of gate and up, whose panels have 16 rows of each: rows [first, first + count) of both.
    num_rows: of the gate."""
    halves = ((0, 0, first), (1, HALF, num_rows + first))
    return tuple(Segment(part, col, row, count // HALF, PANEL) for part, col, row in halves), HALF


def _rows(body: Body, num_tokens: int) -> UOp:
    """The loop over token rows: a GLOBAL axis, because the lengths of the loops inside depend on the row."""
    return body.grid(num_tokens) if num_tokens > 1 else body.loop(1)


class _Row:
    """A token row's slot, and the rank that it has in each section."""

    def __init__(self, shape: SiteShape, slots_at: int, token: UOp, ranks: UOp, inputs: UOp) -> None:
        self.shape = shape
        self.slot = clamp(inputs[slots_at + token].load(), 0, shape.num_slots)
        self.place = (self.slot - 1).maximum(0)  # in A and B
        self._ranks = ranks

    def rank(self, section: int) -> UOp:
        rank = self._ranks[self.slot * self.shape.num_sections + section].load()
        return rank.maximum(0).minimum(self.shape.max_rank)


@cached_kernel
def shrink_kernel(spec: CpuShrinkSpec) -> KernelFn:
    """fn(out (T, num_cols), x (T, own_cols), ranks, A, inputs[, norm weight (K,)])."""

    def kernel(out: UOp, x: UOp, ranks: UOp, a: UOp, inputs: UOp, *weight: UOp) -> UOp:
        shape, body = spec.shape, Body()
        token = _rows(body, spec.num_tokens)
        row = _Row(shape, spec.slots_at, token, ranks, inputs)

        def load(col: UOp) -> UOp:
            value = x[token * spec.own_cols + col].load()
            return value * weight[0][spec.first_col + col].load() if weight else value

        stores = []
        for section in range(shape.num_sections):
            loop = body.fold_while(row.rank(section))
            j = loop.cast(dtypes.weakint)
            start = ((row.place * shape.num_sections + section) * shape.max_rank + j) * shape.num_cols + spec.first_col
            total = _sum(body, spec, (token, loop), partial(_product, a, start, load))
            at = token * spec.num_cols + section * shape.max_rank + j
            stores.append(out[at].store(total).end(loop))
        if spec.norm_eps is not None:
            squares = _sum(body, spec, (token,), lambda col: _square(x[token * spec.own_cols + col].load()))
            stores.append(out[token * spec.num_cols + shape.num_shrunk].store(squares))
        ops = 2 * spec.num_tokens * shape.num_shrunk * spec.own_cols
        nbytes = 4 * shape.num_shrunk * spec.own_cols
        return finish(UOp.group(*stores).end(token), spec.name, ops=ops, nbytes=nbytes)

    return kernel


def _product(a: UOp, start: UOp, load: Callable[[UOp], UOp], col: UOp) -> UOp:
    """An element of a row of A, times that of x."""
    return a[start + col].load() * load(col)


def _square(value: UOp) -> UOp:
    return value * value


def _sum(body: Body, spec: CpuShrinkSpec, loops: tuple[UOp, ...], value: Callable[[UOp], UOp]) -> UOp:
    """The sum of `value(column)` over the core's columns."""
    lanes = spec.lanes
    sums = fill(body, body.registers(lanes), 0.0, *loops)
    k = body.fold(spec.own_cols // lanes)
    inner = sums.after(k)
    stores = [inner[i].store(inner[i].load() + value(k * lanes + i)) for i in range(lanes)]
    sums = sums.after(UOp.group(*stores).end(k))
    return balanced(sums[i].load() for i in range(lanes))


@cached_kernel
def expand_kernel(spec: CpuExpandSpec) -> KernelFn:
    """fn(y (T, num_cols), ranks, B, inputs, *partial results of the shrink): adds to y."""

    def kernel(y: UOp, ranks: UOp, b: UOp, inputs: UOp, *partials: UOp) -> UOp:
        body = Body()
        token = _rows(body, spec.num_tokens)
        row = _Row(spec.shape, spec.slots_at, token, ranks, inputs)
        shrunk = {
            section: _add_partials(body, spec, token, row.rank(section), partials, section)
            for section in sorted({segment.section for segment in spec.segments})
        }
        place = (token, row)
        stores = [_expand(body, spec, place, y, b, shrunk[segment.section], segment) for segment in spec.segments]
        ops = 2 * spec.num_tokens * spec.shape.max_rank * spec.num_cols
        nbytes = 4 * spec.shape.max_rank * spec.num_cols
        return finish(UOp.group(*stores).end(token), spec.name, ops=ops, nbytes=nbytes)

    return kernel


def _add_partials(body: Body, spec: CpuExpandSpec, token: UOp, rank: UOp, partials: Sequence[UOp], section: int) -> UOp:
    """Registers (R,) with a row's scaled A x in one section."""
    shape, has_norm = spec.shape, spec.norm_eps is not None
    width = shape.num_shrunk + has_norm
    factor = UOp.const(spec.scale, dtypes.float)
    if spec.norm_eps is not None:
        squares = balanced(part[token * width + shape.num_shrunk].load() for part in partials)
        factor = (squares * (1.0 / shape.num_cols) + spec.norm_eps).sqrt().reciprocal() * spec.scale
    found = body.registers(shape.max_rank)
    loop = body.fold_while(rank)
    j = loop.cast(dtypes.weakint)
    total = balanced(part[token * width + section * shape.max_rank + j].load() for part in partials)
    return found.after(found.after(token)[j].store(total * factor).end(loop))


def _expand(
    body: Body, spec: CpuExpandSpec, place: tuple[UOp, _Row], y: UOp, b: UOp, shrunk: UOp, segment: Segment
) -> UOp:
    """The stores that add a segment's columns."""
    (token, row), shape, lanes = place, spec.shape, spec.lanes
    rank = row.rank(segment.section)
    is_many = segment.num_chunks > 1
    loop = body.fold_while((rank > 0).where(segment.num_chunks, 0)) if is_many else None
    chunk = UOp.const(0, dtypes.weakint) if loop is None else loop.cast(dtypes.weakint)
    around = (token,) if loop is None else (token, loop)
    sums = fill(body, body.registers(lanes), 0.0, *around, shrunk)
    inner_loop = body.fold_while(rank)
    j = inner_loop.cast(dtypes.weakint)
    first = (row.place * shape.max_rank + j) * shape.num_rows + segment.first_row + chunk * lanes
    inner, factor = sums.after(inner_loop), shrunk[j].load()
    adds = [inner[i].store(inner[i].load() + b[first + i].load() * factor) for i in range(lanes)]
    sums = sums.after(UOp.group(*adds).end(inner_loop))
    at = token * spec.num_cols + segment.first_col + chunk * segment.stride
    stores = UOp.group(*[y[at + i].store(y[at + i].load() + sums[i].load()) for i in range(lanes)])
    return stores if loop is None else stores.end(loop)


@dataclass(frozen=True)
class ActivateSpec:
    """activation(gate) * up of a shard (T, 2 * num_cols) whose panels have 16 columns of each."""

    num_tokens: int
    num_cols: int
    activation: str
    # where the biases of the shard's gate and up columns begin; None: no biases
    bias_starts: tuple[int, int] | None = None


@cached_kernel
def activate_kernel(spec: ActivateSpec) -> KernelFn:
    """fn(out (T, num_cols), y (T, 2 * num_cols)[, bias])."""

    def kernel(out: UOp, y: UOp, *bias: UOp) -> UOp:
        body, size = Body(), spec.num_tokens * spec.num_cols
        token, chunk, i = body.loop(spec.num_tokens), body.loop(spec.num_cols // HALF), body.loop(HALF)
        halves = []
        for half in range(2):
            value = y[token * 2 * spec.num_cols + chunk * PANEL + half * HALF + i].load()
            if spec.bias_starts is not None:
                value = value + bias[0][spec.bias_starts[half] + chunk * HALF + i].load()
            halves.append(value)
        (value,) = gated(spec.activation, halves[:1], halves[1:], CPU_ARITHMETIC)
        store = out[token * spec.num_cols + chunk * HALF + i].store(value).end(i, chunk, token)
        name = f"adapter_{spec.activation}_{spec.num_tokens}x{spec.num_cols}"
        return finish(store, name, ops=8 * size, nbytes=12 * size)

    return kernel
