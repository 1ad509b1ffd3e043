"""Passes over the values of a row, for kernels that sample: each lane folds its share, then the lanes' results are one.

On a GPU the lanes are the threads of a threadgroup, which read neighbours at once; on a core they are accumulators that
clang turns into vectors. Which lane has which value hangs on the row's length alone, so a sum is rounded alike whatever
else is in the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from tinygrad import UOp, dtypes
from tinygrad.dtype import DType

from tinyvllm.ops.kernel.body import F32, I32, Body, balanced

CPU_LANES = 32
WIDTH = 4  # neighbours that a thread reads at once
UNROLLED = 4  # such reads that it has in flight: a pass of one threadgroup waits for memory's delay, not for its rate
TREE = 4  # results that one thread combines, until one is left

State = list[UOp]
Combine = Callable[[State, State], State]


@dataclass(frozen=True)
class Item:
    """One value of a pass."""

    value: UOp
    id: UOp  # int32
    inside: UOp  # whether it counts
    at: UOp | None = None  # where it lies in its buffer
    beside: UOp | None = None  # what lies there in the buffer beside


Step = Callable[[Item, State], State]  # (item, old) -> new


class Run(Protocol):
    """Values that a pass goes over."""

    @property
    def span(self) -> int:
        """How many, those that do not count among them."""

    def items(self, place: UOp, width: int, num_places: int) -> list[Item]:
        """`width` neighbours from place * width; `place` is below `num_places`."""


@dataclass(frozen=True)
class Slice:
    """Neighbours in a row of a buffer, whose ids are neighbours too: those below `limit` count."""

    buffer: UOp
    row: UOp  # where the row begins
    origin: int  # the row's first id
    span: int
    limit: int
    offset: UOp | int = 0  # in the row, of the slice's first
    beside: UOp | None = None  # another buffer with the same rows

    def items(self, place: UOp, width: int, num_places: int) -> list[Item]:
        at, limit, bounds = place * width + self.offset, self.limit - self.origin, []
        if num_places * width > self.span:
            bounds.append((place * width, self.span))
        if not isinstance(self.offset, int) or self.offset + self.span > limit:
            bounds.append((at, limit))
        # they stay neighbours where they are bounded, so that they are read at once
        start = self.row + (_all([value < end for value, end in bounds]).where(at, 0) if bounds else at)
        return [
            Item(
                self.buffer[start + i].load(),
                (at + (self.origin + i)).cast(I32),
                _all([value + i < end for value, end in bounds]),
                start + i,
                None if self.beside is None else self.beside[start + i].load(),
            )
            for i in range(width)
        ]

    def value_of(self, index: UOp) -> UOp:
        """The value of an id; of the first or the last one for an id that is not here."""
        at = (index - self.origin).maximum(0).minimum(self.span - 1)
        return self.buffer[self.row + at.cast(dtypes.weakint)].load()


def _all(conditions: list[UOp]) -> UOp:
    return balanced(conditions, lambda a, b: a & b) if conditions else UOp.const(True, dtypes.bool)


class Lanes:
    """Those that share a row's passes."""

    def __init__(self, body: Body, axes: tuple[UOp, ...], num_threads: int) -> None:
        """`axes`: what is a row's; `num_threads`: of its threadgroup, 0 on a core."""
        self.body = body
        self.thread = body.threads(num_threads) if num_threads else None
        self.count = num_threads or CPU_LANES
        self.axes = axes if self.thread is None else (*axes, self.thread)
        self.width = WIDTH if num_threads else 1

    def only_once(self, index: UOp) -> UOp:
        """An index to store at from one thread."""
        return index if self.thread is None else index.valid(self.thread.eq(0))

    def keep(self, values: Sequence[UOp], kinds: Sequence[DType], *after: UOp) -> State:
        """Put values into registers, so that they are computed once and behind `after`."""
        regs = [self.body.registers(1, kind) for kind in kinds]
        stores = [r.after(*self.axes, *after)[0].store(v) for r, v in zip(regs, values, strict=True)]
        done = UOp.group(*stores)
        return [reg.after(done)[0].load() for reg in regs]

    def section(self, wanted: UOp) -> UOp:
        """A loop around what runs where `wanted` (int32 0 or 1): named among `after`, and ended behind its stores."""
        # through a register, because a loop that runs at most once for all that tinygrad can see is none
        return self.body.fold_while(self.keep([wanted], [I32])[0])

    def fold(
        self,
        is_wanted: UOp,
        runs: Sequence[Run],
        init: tuple[float | int, ...],
        step: Step,
        combine: Combine,
        *after: UOp,
        effects: list[UOp] | None = None,
    ) -> State:
        """Fold `step` over the runs; the combined state, the same in every thread. `effects`: where `step` puts stores
        that it makes on the way.

        `is_wanted` (int32 0 or 1) multiplies the length of the pass: at 0 the state stays `init`. A state's dtype is
        int32 where its init is an int, else float32.
        """
        kinds = [I32 if isinstance(value, int) else F32 for value in init]
        regs = self._fresh(init, kinds, *self.axes, *after)
        for run in runs:
            regs = self._fold_run(run, is_wanted, regs, step, [] if effects is None else effects)
        return self._combine(regs, kinds, init, combine)

    def _fold_run(self, run: Run, is_wanted: UOp, regs: State, step: Step, effects: list[UOp]) -> State:
        per_chunk = self.count * self.width
        unrolled = 1 if self.thread is None else max(1, min(UNROLLED, run.span // (2 * per_chunk)))
        chunks = max(2, -(-run.span // (per_chunk * unrolled)))  # 2: see Body.fold_while
        chunk = self.body.fold_while(is_wanted * chunks)
        lane = self.thread if self.thread is not None else self.body.loop(self.count)
        at = 0 if self.thread is not None else lane
        new = [reg.after(chunk)[at].load() for reg in regs]
        for part in range(unrolled):
            place = (chunk.cast(dtypes.weakint) * unrolled + part) * self.count + lane
            for item in run.items(place, self.width, chunks * unrolled * self.count):
                new = step(item, new)
        stores = UOp.group(*[reg.after(chunk)[at].store(value) for reg, value in zip(regs, new, strict=True)], *effects)
        effects.clear()
        end = stores.end(chunk) if self.thread is not None else stores.end(lane, chunk)
        return [reg.after(end) for reg in regs]

    def _fresh(self, init: tuple[float | int, ...], kinds: Sequence[DType], *after: UOp) -> State:
        """Registers of each lane (all lanes' on a core), set to `init`."""
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
        """The lanes' results, in the order of the lanes on a core."""
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
    """The states of a threadgroup's first `count` threads (a power of two) as one, in every thread: a tree through
    threadgroup memory."""
    while True:
        shared = [body.shared(count, value.dtype) for value in values]
        stores = [s.after(*after)[thread.valid(thread < count)].store(v) for s, v in zip(shared, values, strict=True)]
        shared = [s.after(UOp.group(*stores)) for s in shared]
        width = min(TREE, count)
        count //= width
        at = thread % count if count > 1 else UOp.const(0, dtypes.weakint)
        values = balanced([[s[at + i * count].load() for s in shared] for i in range(width)], combine)
        if count == 1:
            return values


class Carried:
    """Named values that a loop carries from one iteration to the next, in registers."""

    def __init__(self, lanes: Lanes, **values: tuple[DType, UOp]) -> None:
        self._regs = {name: lanes.body.registers(1, kind) for name, (kind, _) in values.items()}
        done = UOp.group(*[self._regs[name].after(*lanes.axes)[0].store(value) for name, (_, value) in values.items()])
        self._regs = {name: reg.after(done) for name, reg in self._regs.items()}

    def read(self, name: str, *after: UOp) -> UOp:
        return self._regs[name].after(*after)[0].load()

    def write(self, new: dict[str, UOp], *loops: UOp) -> UOp:
        """Stores, each behind the reading of all that is written."""
        old = [self.read(name, *loops) for name in new]
        return UOp.group(*[self._regs[name].after(*loops, *old)[0].store(value) for name, value in new.items()])


# -- states ------------------------------------------------------------------------------------------------------------


def first_best(a: State, b: State) -> State:
    """The larger (value, index); at a tie the lower index. An index of -1 stands for no value at all."""
    is_b = (b[1] >= 0) & ((b[0] > a[0]) | (b[0].eq(a[0]) & (b[1] < a[1])) | (a[1] < 0))
    return [is_b.where(b[0], a[0]), is_b.where(b[1], a[1])]


def largest(a: State, b: State) -> State:
    return [a[0].maximum(b[0])]


def added(a: State, b: State) -> State:
    return [x + y for x, y in zip(a, b, strict=True)]


def flag(condition: UOp) -> UOp:
    """A condition as int32 0 or 1: the length of a pass."""
    return condition.where(UOp.const(1, I32), UOp.const(0, I32))
