"""Adapters' kernels for any device with threadgroups (ops/adapter_spec.py).

Shrink: a threadgroup for each row and 4 rows of A, whose threads divide the columns of x; an RMSNorm of x is part of
it. Expand: a thread for some columns of a row. Groups of rows without an adapter return after reading their slot.
"""

from __future__ import annotations

from collections.abc import Callable
from math import gcd

from tinygrad import UOp, dtypes

from tinyvllm.ops.activation import gated
from tinyvllm.ops.adapter_spec import ExpandSpec, ShrinkSpec, SiteShape
from tinyvllm.ops.kernel.body import F32, Body, KernelFn, balanced, cached_kernel, clamp, fill, finish

SHRINK_THREADS = 256
SUM_LANES = 16  # threads that add up each sum of a threadgroup; with ROWS + 1 sums they are fewer than SHRINK_THREADS
ROWS = 4  # rows of A of one threadgroup
EXPAND_THREADS = 64
VECTOR = 8  # elements of x and A that a thread loads at once
COLUMNS = 4  # columns that a thread expands
# Loads that are in flight together, because their latency is most of the time of a step with few rows: runs of x in a
# pass of the shrink, and ranks in a pass of the expand
RUNS_AT_ONCE, RANKS_AT_ONCE = 4, 8


class _Row:
    """A token row's slot."""

    def __init__(self, shape: SiteShape, slots_at: int, token: UOp, ranks: UOp, inputs: UOp) -> None:
        self.shape = shape
        self.given = inputs[slots_at + token].load()
        self.slot = clamp(self.given, 0, shape.num_slots)
        self.place = (self.slot - 1).maximum(0)  # in A and B
        self._ranks = ranks

    def rank(self, section: UOp | int) -> UOp:
        rank = self._ranks[self.slot * self.shape.num_sections + section].load()
        return rank.maximum(0).minimum(self.shape.max_rank)


@cached_kernel
def shrink_kernel(spec: ShrinkSpec) -> KernelFn:
    """fn(out (T, S * R) float32, x (T, K), ranks, A, inputs[, norm weight (K,)])."""

    def kernel(out: UOp, x: UOp, ranks: UOp, a: UOp, inputs: UOp, *weight: UOp) -> UOp:
        shape, body = spec.shape, Body()
        groups = shape.max_rank // ROWS  # of each section
        token, group = body.grid(spec.num_tokens), body.grid(shape.num_sections * groups)
        thread = body.threads(SHRINK_THREADS)
        row = _Row(shape, spec.slots_at, token, ranks, inputs)
        section, first = group // groups, group % groups * ROWS
        sums = _partial_sums(body, spec, (token, group, thread), (row, section, first), x, a, weight)
        total = _group_sums(body, sums, thread, ROWS + bool(weight))
        value = total(thread % ROWS)
        if spec.norm_eps is not None:
            value = value * (total(ROWS) * (1.0 / shape.num_cols) + spec.norm_eps).sqrt().reciprocal()
        at = token * shape.num_shrunk + group * ROWS + thread
        store = out[at.valid((thread < ROWS) & (first < row.rank(section)))].store(value)
        ops = 2 * spec.num_tokens * shape.num_shrunk * shape.num_cols
        nbytes = 2 * shape.num_shrunk * shape.num_cols
        return finish(store.end(thread, group, token), spec.name, ops=ops, nbytes=nbytes)

    return kernel


def _partial_sums(
    body: Body,
    spec: ShrinkSpec,
    axes: tuple[UOp, UOp, UOp],
    place: tuple[_Row, UOp, UOp],
    x: UOp,
    a: UOp,
    weight: tuple[UOp, ...],
) -> list[UOp]:
    """A thread's sums: of the products of each row of A, and with a norm of x's squares."""
    (token, _, thread), (row, section, first), shape = axes, place, spec.shape
    vector = gcd(shape.num_cols, VECTOR)
    num_runs = shape.num_cols // vector
    sums = fill(body, body.registers(ROWS + 1), 0.0, *axes)
    at_once = min(RUNS_AT_ONCE, -(-num_runs // SHRINK_THREADS))
    num_passes = -(-num_runs // (SHRINK_THREADS * at_once))
    rank = row.rank(section)
    # the second term is never 1, but tinygrad does not know: it would drop a loop of at most one pass
    loop = body.fold_while((first < rank).where(num_passes, 0) + (row.given < 0).where(1, 0))
    start = ((row.place * shape.num_sections + section) * shape.max_rank + first) * shape.num_cols
    added: list[list[UOp]] = [[] for _ in range(ROWS + bool(weight))]
    for number in range(at_once):
        run = (loop.cast(dtypes.weakint) * at_once + number) * SHRINK_THREADS + thread
        is_inside = run < num_runs
        col = is_inside.where(run, 0) * vector
        raw = [is_inside.where(x[token * shape.num_cols + col + i].load().cast(F32), 0.0) for i in range(vector)]
        values = [value * weight[0][col + i].load().cast(F32) for i, value in enumerate(raw)] if weight else raw
        for j in range(ROWS):
            row_of_a = [a[start + j * shape.num_cols + col + i].load().cast(F32) for i in range(vector)]
            added[j].append(balanced(one * value for one, value in zip(row_of_a, values, strict=True)))
        if weight:
            added[ROWS].append(balanced(value * value for value in raw))
    inner = sums.after(loop)
    stores = [inner[j].store(inner[j].load() + balanced(parts)) for j, parts in enumerate(added)]
    sums = sums.after(UOp.group(*stores).end(loop))
    return [sums[j].load() for j in range(ROWS + bool(weight))]


def _group_sums(body: Body, sums: list[UOp], thread: UOp, count: int) -> Callable[[UOp | int], UOp]:
    """A function that gives the sum over all threads of the sum with a given number."""
    shared = body.shared(count * SHRINK_THREADS)
    shared = shared.after(UOp.group(*[shared[i * SHRINK_THREADS + thread].store(v) for i, v in enumerate(sums)]))
    each = SHRINK_THREADS // SUM_LANES
    number, lane = (thread // SUM_LANES).minimum(count - 1), thread % SUM_LANES
    some = balanced(shared[number * SHRINK_THREADS + lane * each + i].load() for i in range(each))
    lanes = body.shared(count * SUM_LANES)
    lanes = lanes.after(lanes[number * SUM_LANES + lane].store(some))
    return lambda index: balanced(lanes[index * SUM_LANES + i].load() for i in range(SUM_LANES))


@cached_kernel
def expand_kernel(spec: ExpandSpec) -> KernelFn:
    """fn(y (T, num_cols), ranks, B, inputs, shrunk (T, S * R) float32): adds to y, in rows with an adapter."""

    def kernel(y: UOp, ranks: UOp, b: UOp, inputs: UOp, shrunk: UOp) -> UOp:
        shape, body = spec.shape, Body()
        width = gcd(COLUMNS, *[block.num_rows for block in spec.blocks])
        runs = spec.used_cols // width
        token, chunk = body.grid(spec.num_tokens), body.grid(-(-runs // EXPAND_THREADS))
        thread = body.threads(EXPAND_THREADS)
        row = _Row(shape, spec.slots_at, token, ranks, inputs)
        run = chunk * EXPAND_THREADS + thread
        is_inside = run < runs
        col = is_inside.where(run, 0) * width
        section = _section_of(spec, col)
        rank = row.rank(section)
        acc = _expanded(
            body, spec, (token, chunk, thread), (row, section, rank), b, shrunk, spec.first_row + col, width
        )
        at, is_changed = token * spec.num_cols + col, is_inside & (rank > 0)
        places = [(at + i).valid(is_changed) for i in range(width)]
        stores = [
            y[place].store((y[place].load().cast(F32) + value * spec.scale).cast(y.dtype))
            for place, value in zip(places, acc, strict=True)
        ]
        return _finish(spec, UOp.group(*stores).end(thread, chunk, token))

    return kernel


@cached_kernel
def gated_expand_kernel(spec: ExpandSpec) -> KernelFn:
    """fn(out (T, F), y (T, num_cols), ranks, B, inputs, shrunk[, bias (2 * F,)]): activation(gate) * up, with what the
    row's adapter adds to both."""

    def kernel(out: UOp, y: UOp, ranks: UOp, b: UOp, inputs: UOp, shrunk: UOp, *bias: UOp) -> UOp:
        assert spec.activation is not None
        shape, body, size = spec.shape, Body(), spec.blocks[0].num_rows
        width = gcd(COLUMNS, size)
        runs = size // width
        token, chunk = body.grid(spec.num_tokens), body.grid(-(-runs // EXPAND_THREADS))
        thread = body.threads(EXPAND_THREADS)
        row = _Row(shape, spec.slots_at, token, ranks, inputs)
        run = chunk * EXPAND_THREADS + thread
        is_inside = run < runs
        col, halves = is_inside.where(run, 0) * width, []
        for half in range(2):
            place = (row, half, row.rank(half))
            acc = _expanded(body, spec, (token, chunk, thread), place, b, shrunk, half * size + col, width)
            at = token * spec.num_cols + half * size + col
            values = [y[at + i].load().cast(F32) + value for i, value in enumerate(acc)]
            if spec.has_bias:
                values = [value + bias[0][half * size + col + i].load() for i, value in enumerate(values)]
            halves.append(values)
        results = gated(spec.activation, halves[0], halves[1])
        at = token * size + col
        stores = [out[(at + i).valid(is_inside)].store(value.cast(out.dtype)) for i, value in enumerate(results)]
        return _finish(spec, UOp.group(*stores).end(thread, chunk, token))

    return kernel


def _section_of(spec: ExpandSpec, col: UOp) -> UOp | int:
    """The section of a column of the part."""
    section: UOp | int = spec.blocks[-1].section
    end = spec.used_cols
    for block, before in zip(reversed(spec.blocks), [*reversed(spec.blocks[:-1]), None], strict=True):
        end -= block.num_rows
        if before is not None:
            section = (col < end).where(before.section, section) if before.section != section else section
    return section


def _expanded(
    body: Body,
    spec: ExpandSpec,
    axes: tuple[UOp, UOp, UOp],
    place: tuple[_Row, UOp | int, UOp],
    b: UOp,
    shrunk: UOp,
    b_row: UOp,
    width: int,
) -> list[UOp]:
    """What the row's adapter adds to `width` columns, whose rows of B begin at `b_row`."""
    (row, section, rank), shape = place, spec.shape
    acc = fill(body, body.registers(width), 0.0, *axes)
    at_once = min(RANKS_AT_ONCE, shape.max_rank // 2)
    loop = body.fold_while((rank + (at_once - 1)) // at_once)
    added: list[list[UOp]] = [[] for _ in range(width)]
    for number in range(at_once):
        j = loop.cast(dtypes.weakint) * at_once + number
        at = axes[0] * shape.num_shrunk + section * shape.max_rank + j
        factor = (j < rank).where(shrunk[at].load(), 0.0)  # beyond the rank nothing was written
        start = (row.place * shape.max_rank + j) * shape.num_rows + b_row
        for i in range(width):
            added[i].append(b[start + i].load().cast(F32) * factor)
    inner = acc.after(loop)
    stores = [inner[i].store(inner[i].load() + balanced(parts)) for i, parts in enumerate(added)]
    acc = acc.after(UOp.group(*stores).end(loop))
    return [acc[i].load() for i in range(width)]


def _finish(spec: ExpandSpec, stores: UOp) -> UOp:
    ops = 2 * spec.num_tokens * spec.shape.max_rank * spec.used_cols
    nbytes = 2 * spec.shape.max_rank * spec.used_cols
    return finish(stores, spec.name, ops=ops, nbytes=nbytes)
