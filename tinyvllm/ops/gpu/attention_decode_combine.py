"""How the decode kernel combines its warps' softmaxes, and on CUDA the splits of a row's context."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tinygrad import UOp

from tinyvllm.ops.gpu.attention_decode_row import Buffers, DecodeSpec, Row, Threadgroup
from tinyvllm.ops.gpu.attention_decode_stage import StagedHeads
from tinyvllm.ops.gpu.attention_fused import RUN
from tinyvllm.ops.gpu.attention_split import NOTHING, arrive
from tinyvllm.ops.kernel.body import F32, I32, balanced
from tinyvllm.ops.kernel.hopper import hidden
from tinyvllm.ops.kernel.lanes import carry
from tinyvllm.ops.kernel.tiles import quick_division, quick_log2


@dataclass(frozen=True)
class StagedOwn:
    """The row's own token in threadgroup memory: its scores (G), and its value."""

    scores: UOp
    store: UOp
    heads: StagedHeads

    @classmethod
    def of(cls, row: Row, heads: StagedHeads, score: UOp) -> StagedOwn:
        """`score`: that for the lane's head."""
        group = row.group
        memory = group.body.shared(row.spec.tile_heads)
        leads = group.is_first_warp & (row.head < row.spec.tile_heads) & row.column.eq(0)
        store = memory[row.head.valid(leads)].store(group.adds_own.where(score, NOTHING))
        return cls(memory, store, heads)


def combine_warps(row: Row, buffers: Buffers, state: list[UOp], own: StagedOwn | None) -> list[UOp]:
    """Stores of the threadgroup's result: the row's attention, or that over its split of the context. `own`: the row's
    own token, unless the state has it."""
    states, elements = _share_states(row, state, own), row.group.elements()
    if not row.spec.is_split:
        return [_store_whole(row, buffers, states, *element) for element in elements]
    splits = _Splits(row, buffers)
    stores = [store for element in elements for store in splits.stores(states, *element)]
    return splits.combine(stores) if row.spec.combines_splits else stores


@dataclass(frozen=True)
class _WarpStates:
    """The warps' states in threadgroup memory: sums of weighted values (warps, G, D), and for each head the maximum and
    the sum of weights (warps, G, 2)."""

    spec: DecodeSpec
    values: UOp
    scales: UOp
    own: StagedOwn | None

    def combined(self, index: UOp) -> tuple[UOp, UOp, UOp]:
        """(maximum, sum of weights, sum of weighted values) over all warps, for one of the G * D elements."""
        group, dim = self.spec.tile_heads, self.spec.head_dim
        warp_range, head = range(self.spec.num_warps), index // dim
        bests = [self.scales[(w * group + head) * 2].load() for w in warp_range]
        totals = [self.scales[(w * group + head) * 2 + 1].load() for w in warp_range]
        at = head * self.spec.state_stride + self.spec.state_place(index % dim)
        values = [self.values[w * group * self.spec.state_stride + at].load() for w in warp_range]
        if self.own is not None:
            bests.append(self.own.scores[head].load())
            totals.append(UOp.const(1.0, F32))
            values.append(self.own.heads.value(index % dim))
        top = balanced(bests, self.spec.maximum)
        factors = [self.spec.exp2(b - top) for b in bests]
        total = balanced(f * t for f, t in zip(factors, totals, strict=True))
        return top, total, balanced(f * v for f, v in zip(factors, values, strict=True))


def _share_states(row: Row, state: list[UOp], own: StagedOwn | None) -> _WarpStates:
    """Put the warps' states into threadgroup memory."""
    spec, group, (best, total, *acc) = row.spec, row.group, state
    total = spec.lanes.sum(total, spec.mma.row_masks)
    dim, count = spec.head_dim, spec.num_warps * spec.tile_heads
    values = group.body.shared(count * spec.state_stride)
    scales = group.body.shared(count * 2)
    is_real = row.head < spec.tile_heads
    leads = is_real & row.column.eq(0)
    at = group.warp * spec.tile_heads + row.head
    stores = [
        values[(at * spec.state_stride + spec.state_place(spec.value_dim(row.column + e, j))).valid(is_real)].store(
            acc[j * 2 + e]
        )
        for e in range(2)
        for j in range(dim // RUN)
    ]
    stores += [scales[(at * 2).valid(leads)].store(best), scales[(at * 2 + 1).valid(leads)].store(total)]
    if own is not None:
        stores.append(own.store)
    done = UOp.group(*stores)
    own = None if own is None else replace(own, scores=own.scores.after(done))
    return _WarpStates(spec, values.after(done), scales.after(done), own)


def _store_whole(row: Row, buffers: Buffers, states: _WarpStates, index: UOp, is_inside: UOp | None) -> UOp:
    """The store of an element of a context that is not split."""
    assert buffers.out is not None
    _, total, value = states.combined(index)
    whole = quick_division(value, total, row.spec.lanes.kind)
    return buffers.out[_gate(_output(row.group, index), is_inside)].store(row.spec.result(whole, buffers.out))


def _output(group: Threadgroup, index: UOp) -> UOp:
    """Where an element of the group of heads lies in (T, H * D)."""
    spec = group.spec
    return group.row * (spec.num_heads * spec.head_dim) + group.heads * (spec.tile_heads * spec.head_dim) + index


class _Splits:
    """The results of the threadgroups that share a row and heads."""

    def __init__(self, row: Row, buffers: Buffers) -> None:
        assert buffers.split_values is not None and buffers.split_sums is not None
        split, index = row.spec.split, row.group.split
        assert isinstance(index, UOp), "there is more than one split"
        self.index = index
        self.spec, self.group, self.buffers = row.spec, row.group, buffers
        self.values, self.sums = buffers.split_values, buffers.split_sums
        self.used = split.used(split.shared(row.past))

    def stores(self, states: _WarpStates, index: UOp, is_inside: UOp | None) -> list[UOp]:
        """Stores of an element: of the split's value and log-sum-exp, and where the kernel combines the splits but only
        one is in use, of the result itself."""
        spec, group = self.spec, self.group
        dim, target = spec.head_dim, _output(group, index)
        top, total, value = states.combined(index)
        safe, is_shared, results = (total > 0.0).where(total, 1.0), None, []
        share = quick_division(value, safe, spec.lanes.kind)
        if self.buffers.out is not None:
            is_alone, out = self.index.eq(0) & self.used.eq(1), self.buffers.out
            results.append(out[_gate(target, is_inside, is_alone)].store(spec.result(share, out)))
            is_shared = self._is_shared
        row_size = spec.layout.num_tokens * (spec.num_heads * dim)
        lse = (total > 0.0).where(top + quick_log2(safe, spec.lanes.kind), NOTHING)
        head = (self.index * spec.layout.num_tokens + group.row) * spec.num_heads + group.heads * spec.tile_heads
        head = head + index // dim
        results.append(self.values[_gate(self.index * row_size + target, is_inside, is_shared)].store(share))
        results.append(self.sums[_gate(head, is_inside, is_shared, (index % dim).eq(0))].store(lse))
        return results

    @property
    def _is_shared(self) -> UOp:
        """Whether the row's context takes several splits, and this threadgroup has one of them."""
        return (self.used > 1) & (self.index < self.used)

    def combine(self, stores: list[UOp]) -> list[UOp]:
        """`stores`, after which the last of the row's threadgroups combines the splits and resets the counter."""
        spec, group, arrivals, out = self.spec, self.group, self.buffers.arrivals, self.buffers.out
        assert arrivals is not None and out is not None
        counter = group.row * spec.head_groups + group.heads
        is_last, seen = arrive(group.body, arrivals, counter, self._is_shared, self.used, *stores)
        elements = group.elements()
        states = self._add_up([index for index, _ in elements], is_last, seen)
        results = list(stores)
        for (index, is_inside), (_, total, acc) in zip(elements, states, strict=True):
            start = counter * (spec.tile_heads * spec.head_dim)
            value = quick_division(acc, total, spec.lanes.kind)
            results.append(out[_gate(start + index, is_inside, is_last)].store(spec.result(value, out)))
        zero, thread = UOp.const(0, arrivals.dtype), group.thread
        reset = arrivals.after(seen)[_gate(counter + 0 * thread, is_last, thread.eq(0))].store(zero)
        return [*results, reset]

    def _add_up(self, indices: list[UOp], is_last: UOp, seen: UOp) -> list[list[UOp]]:
        """(maximum, sum, sum of values) over the splits in use, for each element; nothing is read unless `is_last`."""
        spec, group, dim = self.spec, self.group, self.spec.head_dim
        values, sums = self.values.after(seen), self.sums.after(seen)

        def read(number: int, index: UOp) -> tuple[UOp, UOp]:
            # a split that is not in use counts nothing, but is read, so that no load waits for another
            place = (self.used - 1).minimum(number) * spec.layout.num_tokens + group.row
            head = place * spec.num_heads + group.heads * spec.tile_heads + index // dim
            lse = (self.used > number).where(sums[head].load(), NOTHING)
            return lse, values[head * dim + index % dim].load()

        def once(_: UOp | int, old: list[UOp]) -> list[UOp]:
            new = []
            for index in indices:
                splits = [read(number, index) for number in range(spec.num_splits)]
                top = balanced([lse for lse, _ in splits], spec.maximum)
                factors = [spec.exp2(lse - top) for lse, _ in splits]
                total = balanced(f * value for f, (_, value) in zip(factors, splits, strict=True))
                new += [top, balanced(factors), total]
            return new

        init = [UOp.const(v, F32) for _ in indices for v in (NOTHING, 0.0, 0.0)]
        count = hidden(is_last.cast(I32))  # a branch: tinygrad has none
        last = carry(group.body, init, count, group.axes, once)
        return [last[i : i + 3] for i in range(0, len(last), 3)]


def _gate(at: UOp, *conditions: UOp | None) -> UOp:
    """The index, valid only if all the conditions hold."""
    for condition in conditions:
        at = at if condition is None else at.valid(condition)
    return at
