"""Reductions over the values of a row, for the sampling kernels: each lane accumulates its values, then the lanes'
accumulators are combined into one.

On a GPU the lanes are the threads of a threadgroup, which read neighbors at once. On a CPU core they are accumulators
that clang turns into vectors. Which lane reads which value depends only on the row's length, so a sum is rounded the
same way whatever else is in the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from tinygrad import UOp, dtypes
from tinygrad.dtype import DType

from tinyvllm.ops.kernel.body import F32, I32, Body, balanced

CPU_LANES = 32
VECTOR_WIDTH = 4  # neighbors that a thread reads at once
UNROLL = 4  # such reads that it has in flight: one threadgroup's pass is bound by memory latency, not by bandwidth
FAN_IN = 4  # accumulators that one thread combines at each level of the tree

State = list[UOp]  # an accumulator's values
Combine = Callable[[State, State], State]


@dataclass(frozen=True)
class Item:
    """One value of a reduction."""

    value: UOp
    id: UOp  # int32
    inside: UOp  # whether it counts
    at: UOp | None = None  # its index in the buffer
    noise: UOp | None = None  # the value at the same index of the noise buffer


Accumulate = Callable[[Item, State], State]  # (item, old) -> new


class RowValues(Protocol):
    """Values that a reduction reads."""

    @property
    def span(self) -> int:
        """How many there are, including those that do not count."""

    def items(self, place: UOp, width: int, num_places: int) -> list[Item]:
        """`width` neighbors from place * width on; `place` is below `num_places`."""


@dataclass(frozen=True)
class RowSlice:
    """Consecutive values of a row. A value's id is its place in the row; ids below `limit` count."""

    buffer: UOp
    row: UOp  # index of the row's first value
    span: int
    limit: int
    offset: UOp | int = 0  # of the slice's first value in the row
    noises: UOp | None = None  # a buffer with the same rows

    def items(self, place: UOp, width: int, num_places: int) -> list[Item]:
        at, limit, bounds = place * width + self.offset, self.limit, []
        if num_places * width > self.span:
            bounds.append((place * width, self.span))
        if not isinstance(self.offset, int) or self.offset + self.span > limit:
            bounds.append((at, limit))
        # bounded as a whole, and a multiple of the width: so the neighbors are read by one load
        first = place + self.offset // width
        start = self.row + (_all([value < end for value, end in bounds]).where(first, 0) * width if bounds else at)
        return [
            Item(
                value=self.buffer[start + i].load(),
                id=(at + i).cast(I32),
                inside=_all([value + i * (end % width > 0) < end for value, end in bounds]),  # neighbors end together
                at=start + i,
                noise=None if self.noises is None else self.noises[start + i].load(),
            )
            for i in range(width)
        ]

    def value_of(self, index: UOp) -> UOp:
        """The value of an id; the first or the last value for an id outside the slice."""
        at = index.maximum(0).minimum(self.span - 1)
        return self.buffer[self.row + at.cast(dtypes.weakint)].load()


def _all(conditions: list[UOp]) -> UOp:
    return balanced(conditions, lambda a, b: a & b) if conditions else UOp.const(True, dtypes.bool)


class RowLanes:
    """The lanes that share a row's reductions."""

    def __init__(self, body: Body, axes: tuple[UOp, ...], num_threads: int) -> None:
        """`axes`: the axes over rows and splits. `num_threads`: threads of a threadgroup; 0 on a CPU core."""
        self.body = body
        self.thread = body.threads(num_threads) if num_threads else None
        self.count = num_threads or CPU_LANES
        self.axes = axes if self.thread is None else (*axes, self.thread)
        self.width = VECTOR_WIDTH if num_threads else 1

    def only_once(self, index: UOp) -> UOp:
        """An index that only the first thread stores to."""
        return index if self.thread is None else index.valid(self.thread.eq(0))

    def to_registers(self, values: Sequence[UOp], kinds: Sequence[DType], *after: UOp) -> State:
        """Store values in registers, so that they are computed once, after `after`."""
        regs = [self.body.registers(1, kind) for kind in kinds]
        stores = [r.after(*self.axes, *after)[0].store(v) for r, v in zip(regs, values, strict=True)]
        done = UOp.group(*stores)
        return [reg.after(done)[0].load() for reg in regs]

    def only_if(self, wanted: UOp) -> UOp:
        """A loop that runs once or never, as `wanted` (int32 0 or 1) says: a branch around code that may contain
        reductions. Pass it in `after`, and end it after the stores inside."""
        # through a register, because tinygrad drops a loop whose length it can prove to be at most 1
        return self.body.fold_while(self.to_registers([wanted], [I32])[0])

    def reduce(
        self,
        is_wanted: UOp,
        row: RowValues,
        init: tuple[float | int, ...],
        step: Accumulate,
        combine: Combine,
        *after: UOp,
        effects: list[UOp] | None = None,
    ) -> State:
        """Reduce `row` with `step`; returns the combined state, the same in every thread. `effects`: a list in which
        `step` leaves the stores that it makes.

        `is_wanted` (int32 0 or 1) multiplies the pass's length: at 0 nothing is read and the state stays `init`. A
        state's dtype is int32 where its init is an int, else float32.
        """
        kinds = [I32 if isinstance(value, int) else F32 for value in init]
        regs = self._fresh(init, kinds, *self.axes, *after)
        regs = self._accumulate(row, is_wanted, regs, step, [] if effects is None else effects)
        return self._combine(regs, kinds, init, combine)

    def _accumulate(self, row: RowValues, is_wanted: UOp, regs: State, step: Accumulate, effects: list[UOp]) -> State:
        per_chunk = self.count * self.width
        unroll = 1 if self.thread is None else max(1, min(UNROLL, row.span // (2 * per_chunk)))
        chunks = max(2, -(-row.span // (per_chunk * unroll)))  # 2: see Body.fold_while
        chunk = self.body.fold_while(is_wanted * chunks)
        # a loop of one read: the compiler unrolls it, and tinygrad rewrites a quarter of the nodes
        loops = [chunk] if unroll == 1 else [self.body.fold(unroll), chunk]
        lane = self.thread if self.thread is not None else self.body.loop(self.count)
        at = 0 if self.thread is not None else lane
        place = chunk.cast(dtypes.weakint) if unroll == 1 else chunk.cast(dtypes.weakint) * unroll + loops[0]
        new = [reg.after(*loops)[at].load() for reg in regs]
        for item in row.items(place * self.count + lane, self.width, chunks * unroll * self.count):
            new = step(item, new)
        stores = UOp.group(
            *[reg.after(*loops)[at].store(value) for reg, value in zip(regs, new, strict=True)], *effects
        )
        effects.clear()
        end = stores.end(*loops) if self.thread is not None else stores.end(lane, *loops)
        return [reg.after(end) for reg in regs]

    def _fresh(self, init: tuple[float | int, ...], kinds: Sequence[DType], *after: UOp) -> State:
        """Registers of each lane (on a CPU, of all lanes), set to `init`."""
        count = 1 if self.thread is not None else self.count
        regs = [self.body.registers(count, kind) for kind in kinds]
        if self.thread is not None:
            done = UOp.group(*[reg.after(*after)[0].store(value) for reg, value in zip(regs, init, strict=True)])
        else:
            lane = self.body.loop(count)
            stores = [reg.after(*after)[lane].store(value) for reg, value in zip(regs, init, strict=True)]
            done = UOp.group(*stores).end(lane)
        return [reg.after(done) for reg in regs]

    def _combine(self, regs: State, kinds: Sequence[DType], init: tuple[float | int, ...], combine: Combine) -> State:
        """The lanes' states as one; on a CPU in the order of the lanes."""
        if self.thread is not None:
            return combine_threads(self.body, self.thread, self.count, [reg[0].load() for reg in regs], combine, *regs)
        totals = [self.body.registers(1, kind) for kind in kinds]
        start = UOp.group(*[t.after(*regs)[0].store(v) for t, v in zip(totals, init, strict=True)])
        totals = [t.after(start) for t in totals]
        lane = self.body.fold(self.count)
        new = combine([t.after(lane)[0].load() for t in totals], [reg[lane].load() for reg in regs])
        folded = UOp.group(*[t.after(lane)[0].store(v) for t, v in zip(totals, new, strict=True)]).end(lane)
        return [t.after(folded)[0].load() for t in totals]


def combine_threads(body: Body, thread: UOp, count: int, values: State, combine: Combine, *after: UOp) -> State:
    """Combine the states of a threadgroup's first `count` threads (a power of two), by a tree through threadgroup
    memory. Every thread gets the result."""
    while True:
        shared = [body.shared(count, value.dtype) for value in values]
        stores = [s.after(*after)[thread.valid(thread < count)].store(v) for s, v in zip(shared, values, strict=True)]
        shared = [s.after(UOp.group(*stores)) for s in shared]
        width = min(FAN_IN, count)
        count //= width
        at = thread % count if count > 1 else UOp.const(0, dtypes.weakint)
        values = balanced([[s[at + i * count].load() for s in shared] for i in range(width)], combine)
        if count == 1:
            return values


class LoopState:
    """Named values that a loop carries in registers from one iteration to the next."""

    def __init__(self, lanes: RowLanes, **values: tuple[DType, UOp]) -> None:
        self._regs = {name: lanes.body.registers(1, kind) for name, (kind, _) in values.items()}
        done = UOp.group(*[self._regs[name].after(*lanes.axes)[0].store(value) for name, (_, value) in values.items()])
        self._regs = {name: reg.after(done) for name, reg in self._regs.items()}

    def read(self, name: str, *after: UOp) -> UOp:
        return self._regs[name].after(*after)[0].load()

    def write(self, new: dict[str, UOp], *loops: UOp) -> UOp:
        """Store new values. Each store comes after the reads of all values that are written."""
        old = [self.read(name, *loops) for name in new]
        return UOp.group(*[self._regs[name].after(*loops, *old)[0].store(value) for name, value in new.items()])


# -- combining states --------------------------------------------------------------------------------------------------


def combine_argmax(a: State, b: State) -> State:
    """The larger (value, index); at a tie the lower index. An index of -1 stands for no value at all."""
    is_b = (b[1] >= 0) & ((b[0] > a[0]) | (b[0].eq(a[0]) & (b[1] < a[1])) | (a[1] < 0))
    return [is_b.where(b[0], a[0]), is_b.where(b[1], a[1])]


def combine_max(a: State, b: State) -> State:
    return [a[0].maximum(b[0])]


def combine_sum(a: State, b: State) -> State:
    return [x + y for x, y in zip(a, b, strict=True)]


def flag(condition: UOp) -> UOp:
    """A condition as int32 0 or 1, to multiply a pass's length by."""
    return condition.where(UOp.const(1, I32), UOp.const(0, I32))
