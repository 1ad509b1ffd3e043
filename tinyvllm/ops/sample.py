"""Sampling in the captured graph: logits in, one packed int32 row a sequence out.

The kernels never sort. A token is drawn by an exponential race: argmax of w_i / E_i with E_i = -ln(u_i) draws i with
probability w_i / sum(w) (Devroye 1986, ch. 5; the Gumbel trick without the logarithm of w). u_i is a hash of the
request's seed, the number of tokens it has drawn, and i, so the same seed gives the same tokens whatever else is in the
batch. Min-p, top-k and top-p (in this order) keep the tokens whose weight reaches a threshold; the last two thresholds
are found by bisection over the bits of the weight, so ties at the threshold are all kept. Locally typical sampling
(Meister et al. 2022; adjusted steps only, see adjust.py) keeps, of what is left, those whose surprise is nearest to the
entropy, by the same bisection over the distance.

A row pays for what it asks: the length of each pass is data, and zero for a row that does not need it. `reference.py`
has the same in a few lines of NumPy, with the same tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tinygrad import Tensor, UOp, dtypes
from tinygrad.dtype import DType
from tinygrad.uop.ops import Ops

from tinyvllm.config import MAX_LOGPROBS, MAX_STOP_IDS
from tinyvllm.ops.kernel import (
    F32,
    I32,
    LN2,
    LOG2E,
    LOWEST,
    NEG_INF,
    U32,
    Body,
    KernelFn,
    balanced,
    cached_kernel,
    empty,
    exp2,
    finish,
    log2,
    run_kernel,
)
from tinyvllm.ops.step_inputs import StepLayout

CPU_LANES = 32  # accumulators of one core; a loop over them, which clang turns into vectors
GPU_LANES = 512  # threads of a threadgroup that has a row
GPU_WIDTH = 4  # neighbours that such a thread reads at once
TREE = 4  # results that one thread of them combines, until one is left
PART_LANES = 256  # threads of a threadgroup that has a part of a row
MAX_PARTS = 32
# words of an output row: the token, its logprob's bits, its rank (1: the likeliest), the likeliest ids (-1: the
# vocabulary has no more), the bits of their logprobs. Ranks and logprobs are those of the raw logits.
OUT_TOKEN, OUT_LOGPROB, OUT_RANK, OUT_TOP, OUT_TOP_LOGPROB = 0, 1, 2, 3, 3 + MAX_LOGPROBS
OUT_WIDTH = 3 + 2 * MAX_LOGPROBS
BISECTION_STEPS = 31  # weights lie in [0, 1]: positive floats order as their 31 bits do
COLDEST = 1e-6  # temperatures below are this one, as good as greedy: the reciprocal must stay finite
ABOVE_ONE_BITS = 0x3F800001  # the bits behind 1.0f
FARTHEST = 128.0  # bits: no two weights that exp2 tells apart are as far from each other

State = list[UOp]


@dataclass(frozen=True)
class SampleSpec:
    """Logits are (R, stride) float32, of which the first V of each row are real."""

    layout: StepLayout
    vocab_size: int  # V
    stride: int
    has_threads: bool  # a threadgroup a row (GPU), or the lanes of one core (CPU)
    is_adjusted: bool = False  # the raw logits lie beside those that are sampled from

    @property
    def num_parts(self) -> int:
        """Threadgroups that look for a row's largest logit: one row alone must not keep a whole GPU waiting."""
        return min(MAX_PARTS, max(1, 512 // self.layout.num_seqs)) if self.has_threads else 1


def sample(spec: SampleSpec, logits: Tensor, inputs: Tensor, out: Tensor | None = None) -> Tensor:
    """(R * OUT_WIDTH,) int32: tokens and logprobs, at the beginning of `out` where that is given. Changes the logits
    (held-back ids become -inf)."""
    seqs, device = spec.layout.num_seqs, logits.device
    out = empty(seqs * OUT_WIDTH, I32, device) if out is None else out
    norms = empty(seqs, F32, device)
    # the logits are passed on, so that they change only after they were read: held-back ids count in raw logprobs
    out, norms, logits = run_kernel(logprobs_kernel(spec), [out, norms, logits], [inputs])
    logits, held, leaders = hold_back(spec, logits, inputs)
    weights = empty(seqs * spec.stride, F32, device)
    return run_kernel(draw_kernel(spec), [out, weights], [logits, inputs, norms, held, *leaders])[0]


def hold_back(spec: SampleSpec, logits: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The logits, of which those that min_tokens holds back become -inf; those as they were (R, MAX_STOP_IDS); and,
    where threads share a row, what `draw_kernel` wants of them: the largest logit of each part of a row, and its id."""
    seqs, device = spec.layout.num_seqs, logits.device
    held = empty(seqs * MAX_STOP_IDS, F32, device)
    if not spec.has_threads:
        logits, held = run_kernel(hold_back_kernel(spec), [logits, held], [inputs])
        return logits, held, []
    leaders = [empty(seqs * spec.num_parts, kind, device) for kind in (F32, I32)]
    logits, held, *leaders = run_kernel(leaders_kernel(spec), [logits, held, *leaders], [inputs])
    return logits, held, leaders


class _Row:
    """Passes over one row of V values: each lane folds its share, then the lanes' results are combined."""

    def __init__(self, spec: SampleSpec, body: Body, inputs: UOp) -> None:
        self.spec, self.body, self.inputs = spec, body, inputs
        seqs = spec.layout.num_seqs
        # the rows are the GLOBAL axis: passes whose length is data cannot nest in a LOOP axis
        self.axis = body.grid(seqs) if seqs > 1 or spec.has_threads else body.loop(1)
        self.thread = body.threads(GPU_LANES) if spec.has_threads else None
        self.lanes = GPU_LANES if spec.has_threads else CPU_LANES
        self.axes = (self.axis,) if self.thread is None else (self.axis, self.thread)
        self.base = self.axis * spec.stride
        self.width = GPU_WIDTH if spec.has_threads else 1
        self.chunks = max(2, -(-spec.vocab_size // (self.lanes * self.width)))  # 2: see Body.fold_while

    def param(self, name: str) -> UOp:
        """This row's int32 word of a step input."""
        return self.inputs[self.spec.layout.offset(name) + self.axis].load()

    def number(self, name: str) -> UOp:
        """This row's float of a step input."""
        return self.param(name).bitcast(F32)

    def only_once(self, index: UOp) -> UOp:
        """An index to store at from one thread of the row."""
        return index if self.thread is None else index.valid(self.thread.eq(0))

    def keep(self, values: Sequence[UOp], kinds: Sequence[DType], *after: UOp) -> State:
        """Put values into registers, so that they are computed once and behind `after`."""
        regs = [self.body.registers(1, kind) for kind in kinds]
        stores = [r.after(*self.axes, *after)[0].store(v) for r, v in zip(regs, values, strict=True)]
        done = UOp.group(*stores)
        return [reg.after(done)[0].load() for reg in regs]

    def fold(
        self,
        is_wanted: UOp,
        init: tuple[float | int, ...],
        step: Callable[[UOp, UOp, State], State],
        combine: Callable[[State, State], State],
        *after: UOp,
    ) -> State:
        """Fold `step(index, is_inside, old) -> new` over the row; the combined state, the same in every thread.

        `is_wanted` (int32 0 or 1) multiplies the length of the pass: at 0 the state stays `init`. A state's dtype is
        int32 where its init is an int, else float32.
        """
        kinds = [I32 if isinstance(value, int) else F32 for value in init]
        regs = self._fresh(init, kinds, *self.axes, *after)
        chunk = self.body.fold_while(is_wanted * self.chunks)
        lane = self.thread if self.thread is not None else self.body.loop(self.lanes)
        at = 0 if self.thread is not None else lane
        new = [reg.after(chunk)[at].load() for reg in regs]
        for index, inside in self._indices(chunk, lane):
            new = step(index, inside, new)
        stores = UOp.group(*[reg.after(chunk)[at].store(value) for reg, value in zip(regs, new, strict=True)])
        end = stores.end(chunk) if self.thread is not None else stores.end(lane, chunk)
        return self._combine([reg.after(end) for reg in regs], kinds, init, combine, end)

    def _fresh(self, init: tuple[float | int, ...], kinds: Sequence[DType], *after: UOp) -> State:
        """Registers of each lane (all lanes' on a core), set to `init`."""
        count = 1 if self.thread is not None else self.lanes
        regs = [self.body.registers(count, kind) for kind in kinds]
        if self.thread is not None:
            done = UOp.group(*[reg.after(*after)[0].store(value) for reg, value in zip(regs, init, strict=True)])
        else:
            lane = self.body.loop(count)
            stores = [reg.after(*after)[lane].store(value) for reg, value in zip(regs, init, strict=True)]
            done = UOp.group(*stores).end(lane)
        return [reg.after(done) for reg in regs]

    def _indices(self, chunk: UOp, lane: UOp) -> list[tuple[UOp, UOp]]:
        """The neighbours that a lane looks at, bounded, and whether each is inside the row."""
        place = chunk.cast(dtypes.weakint) * self.lanes + lane
        return neighbours(self.spec, place, self.width, self.chunks * self.lanes)

    def _combine(
        self,
        regs: State,
        kinds: Sequence[DType],
        init: tuple[float | int, ...],
        combine: Callable[[State, State], State],
        end: UOp,
    ) -> State:
        """The lanes' results, in the order of the lanes on a core."""
        if self.thread is not None:
            return combine_threads(self.body, self.thread, self.lanes, [reg[0].load() for reg in regs], combine, end)
        totals = [self.body.registers(1, kind) for kind in kinds]
        start = UOp.group(*[t.after(end)[0].store(v) for t, v in zip(totals, init, strict=True)])
        totals = [t.after(start) for t in totals]
        lane = self.body.fold(self.lanes)
        new = combine([t.after(lane)[0].load() for t in totals], [reg[lane].load() for reg in regs])
        folded = UOp.group(*[t.after(lane)[0].store(v) for t, v in zip(totals, new, strict=True)]).end(lane)
        return [t.after(folded)[0].load() for t in totals]


def neighbours(spec: SampleSpec, place: UOp, count: int, limit: int) -> list[tuple[UOp, UOp]]:
    """`count` indices from place * count: bounded, and whether each is inside the row. `place` is below `limit`.

    They stay neighbours where they are bounded, so that they are read at once: a row's stride is a multiple of 32."""
    if limit * count == spec.vocab_size:
        return [(place * count + i, UOp.const(True, dtypes.bool)) for i in range(count)]
    bounded = (place < -(-spec.vocab_size // count)).where(place, 0) * count
    return [(bounded + i, place * count + i < spec.vocab_size) for i in range(count)]


def combine_threads(
    body: Body, thread: UOp, count: int, values: State, combine: Callable[[State, State], State], *after: UOp
) -> State:
    """The states of a threadgroup's `count` threads (a power of two) as one, in every thread: a tree through
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


def _first_best(a: State, b: State) -> State:
    """The larger (value, index); at a tie the lower index. An index of -1 stands for no value at all."""
    is_b = (b[1] >= 0) & ((b[0] > a[0]) | (b[0].eq(a[0]) & (b[1] < a[1])) | (a[1] < 0))
    return [is_b.where(b[0], a[0]), is_b.where(b[1], a[1])]


def _largest(a: State, b: State) -> State:
    return [a[0].maximum(b[0])]


def _added(a: State, b: State) -> State:
    return [a[0] + b[0]]


def _flag(condition: UOp) -> UOp:
    """A condition as int32 0 or 1: the length of a pass."""
    return condition.where(UOp.const(1, I32), UOp.const(0, I32))


@cached_kernel
def logprobs_kernel(spec: SampleSpec) -> KernelFn:
    """fn(out, norms (R), logits, inputs): log-sum-exp of the raw logits, and the likeliest ids with their logprobs, for
    the rows that ask for them."""

    def kernel(out: UOp, norms: UOp, logits: UOp, inputs: UOp) -> UOp:
        body = Body()
        row = _Row(spec, body, inputs)
        count = row.param("num_logprobs").maximum(-1).minimum(MAX_LOGPROBS)
        wanted = _flag(count >= 0)

        def larger(index: UOp, inside: UOp, old: State) -> State:
            return [inside.where(old[0].maximum(logits[row.base + index].load()), old[0])]

        (best,) = row.fold(wanted, (LOWEST,), larger, _largest)

        def add(index: UOp, inside: UOp, old: State) -> State:
            return [inside.where(old[0] + exp2((logits[row.base + index].load() - best) * LOG2E), old[0])]

        (total,) = row.fold(wanted, (0.0,), add, _added)
        (norm,) = row.keep([best + log2(total.maximum(1e-30)) * LN2], [F32])
        store_norm = norms[row.only_once(row.axis)].store(norm)

        rank = body.fold_while(count.maximum(0))
        last = [body.registers(1, F32), body.registers(1, I32)]  # the token found before, by value and index
        start = UOp.group(*[r.after(*row.axes)[0].store(v) for r, v in zip(last, (-LOWEST, -1), strict=True)])
        last = [r.after(start) for r in last]
        last_value, last_index = (r.after(rank)[0].load() for r in last)

        def next_best(index: UOp, inside: UOp, old: State) -> State:
            value, position = logits[row.base + index].load(), index.cast(I32)
            is_left = (value < last_value) | (value.eq(last_value) & (position > last_index))
            better = inside & is_left & ((value > old[0]) | (old[1] < 0))
            return [better.where(value, old[0]), better.where(position, old[1])]

        value, index = row.fold(UOp.const(1, I32), (LOWEST, -1), next_best, _first_best, rank)
        base = row.axis * OUT_WIDTH + rank.cast(dtypes.weakint)
        found = [
            out[row.only_once(base + OUT_TOP)].store(index),
            out[row.only_once(base + OUT_TOP_LOGPROB)].store((value - norm).bitcast(I32)),
            *[r.after(rank)[0].store(v) for r, v in zip(last, (value, index), strict=True)],
        ]
        stores = UOp.group(store_norm, UOp.group(*found).end(rank)).end(*reversed(row.axes))
        return finish(stores, f"logprobs_{spec.layout.num_seqs}x{spec.vocab_size}", nbytes=4 * spec.layout.num_seqs)

    return kernel


@cached_kernel
def hold_back_kernel(spec: SampleSpec) -> KernelFn:
    """fn(logits, held (R, MAX_STOP_IDS), inputs): the ids that min_tokens holds back get -inf; `held` keeps their raw
    logits."""

    def kernel(logits: UOp, held: UOp, inputs: UOp) -> UOp:
        body, seqs = Body(), spec.layout.num_seqs
        row = body.grid(seqs) if spec.has_threads else body.loop(seqs)
        slot = body.threads(MAX_STOP_IDS) if spec.has_threads else body.loop(MAX_STOP_IDS)
        token = inputs[spec.layout.offset("held_back") + row * MAX_STOP_IDS + slot].load()
        index = row * spec.stride + token.maximum(0).minimum(spec.vocab_size - 1).cast(dtypes.weakint)
        is_used = (token >= 0) & (token < spec.vocab_size)
        kept = held[row * MAX_STOP_IDS + slot].store(logits[index].load())
        store = logits.after(kept)[index.valid(is_used)].store(NEG_INF)
        return finish(store.end(slot, row), f"hold_back_{seqs}", nbytes=4 * seqs * MAX_STOP_IDS)

    return kernel


@cached_kernel
def leaders_kernel(spec: SampleSpec) -> KernelFn:
    """fn(logits, held (R, MAX_STOP_IDS), values (R, P), ids (R, P), inputs): `hold_back_kernel` and, of the P parts of
    each row, the largest logit and its id (-1: none is finite). A threadgroup a part."""

    def kernel(logits: UOp, held: UOp, values: UOp, ids: UOp, inputs: UOp) -> UOp:
        body, seqs, parts = Body(), spec.layout.num_seqs, spec.num_parts
        row, part, thread = body.grid(seqs), body.grid(parts), body.threads(PART_LANES)
        passes = max(2, -(-spec.vocab_size // (parts * PART_LANES * GPU_WIDTH)))
        span = passes * PART_LANES * GPU_WIDTH
        slot = row * MAX_STOP_IDS + thread % MAX_STOP_IDS
        token = inputs[spec.layout.offset("held_back") + slot].load()
        index = row * spec.stride + token.maximum(0).minimum(spec.vocab_size - 1).cast(dtypes.weakint)
        is_own = (token >= part * span) & (token < (part + 1) * span) & (token < spec.vocab_size)
        is_own = is_own & (thread < MAX_STOP_IDS)
        kept = held[slot.valid(is_own)].store(logits[index].load())
        stored = logits.after(kept)[index.valid(is_own)].store(NEG_INF)
        read = logits.after(UOp(Ops.BARRIER, src=(stored,)))

        best, place = body.registers(1, F32), body.registers(1, I32)
        start = UOp.group(*[r.after(row, part, thread)[0].store(v) for r, v in ((best, LOWEST), (place, -1))])
        best, place = best.after(start), place.after(start)
        step = body.fold(passes)
        quad = (part * passes + step) * PART_LANES + thread
        state = [best.after(step)[0].load(), place.after(step)[0].load()]
        for at, inside in neighbours(spec, quad, GPU_WIDTH, parts * passes * PART_LANES):
            value = read[row * spec.stride + at].load()
            is_better = inside & (value > state[0])
            state = [is_better.where(value, state[0]), is_better.where(at.cast(I32), state[1])]
        done = UOp.group(*[r.after(step)[0].store(v) for r, v in zip((best, place), state, strict=True)]).end(step)
        own = [r.after(done)[0].load() for r in (best, place)]
        value, at = combine_threads(body, thread, PART_LANES, own, _first_best, done)
        target = (row * parts + part).valid(thread.eq(0))
        stores = [values[target].store(value), ids[target].store(at)]
        name = f"leaders_{seqs}x{spec.vocab_size}"
        read_once = seqs * spec.vocab_size
        return finish(UOp.group(*stores).end(thread, part, row), name, ops=read_once, nbytes=4 * read_once)

    return kernel


@cached_kernel
def draw_kernel(spec: SampleSpec) -> KernelFn:
    """fn(out, weights (R, stride), logits, inputs, norms, raw[, values, ids]): choose each row's token; -1 where no
    logit is finite. `values` and `ids`: those of `leaders_kernel`.

    `raw`: the raw logits of the held-back ids (R, MAX_STOP_IDS), or, of an adjusted step, all of them (R, stride)."""

    def kernel(out: UOp, weights: UOp, logits: UOp, inputs: UOp, norms: UOp, raw: UOp, *leaders: UOp) -> UOp:
        body = Body()
        row = _Row(spec, body, inputs)

        def better(index: UOp, inside: UOp, old: State) -> State:
            value = logits[row.base + index].load()
            is_better = inside & (value > old[0])
            return [is_better.where(value, old[0]), is_better.where(index.cast(I32), old[1])]

        if leaders:
            first = row.axis * spec.num_parts
            found = [[leader[first + i].load() for leader in leaders] for i in range(spec.num_parts)]
            best, greedy = row.keep(balanced(found, _first_best), [F32, I32])
        else:
            best, greedy = row.fold(UOp.const(1, I32), (LOWEST, -1), better, _first_best)
        temperature = row.number("temperature")
        draws = _flag(temperature > 0.0)
        weights, is_kept = _weigh_and_filter(row, weights, logits, best, temperature, draws)
        drawn = _race(row, weights, is_kept, draws)
        forced = row.param("forced").minimum(spec.vocab_size - 1)
        # without a finite logit all weights are equal, or NaN: nobody may win such a race
        token = (forced >= 0).where(forced, ((draws > 0) & (greedy >= 0)).where(drawn, greedy))
        (token,) = row.keep([token], [I32])
        before = raw if spec.is_adjusted else logits
        chosen = before[row.base + token.maximum(0).cast(dtypes.weakint)].load()
        rank = _rank(row, before, None if spec.is_adjusted else raw, token, chosen)
        base = row.axis * OUT_WIDTH
        stores = [
            out[row.only_once(base + OUT_TOKEN)].store(token),
            out[row.only_once(base + OUT_LOGPROB)].store((chosen - norms[row.axis].load()).bitcast(I32)),
            out[row.only_once(base + OUT_RANK)].store(rank),
        ]
        seqs, vocab = spec.layout.num_seqs, spec.vocab_size
        return finish(
            UOp.group(*stores).end(*reversed(row.axes)),
            f"draw{'_adjusted' if spec.is_adjusted else ''}_{seqs}x{vocab}",
            ops=seqs * vocab,
            nbytes=4 * seqs * vocab,
        )

    return kernel


def _rank(row: _Row, logits: UOp, held: UOp | None, token: UOp, chosen: UOp) -> UOp:
    """1 and how many ids are ahead of the token, by raw logit and then by id; 1 in rows that ask for no logprobs.

    `held`: raw logits of ids whose own place in `logits` says -inf."""
    wanted = _flag((row.param("num_logprobs") >= 0) & (token >= 0))

    def is_ahead(value: UOp, index: UOp) -> UOp:
        return (value > chosen) | (value.eq(chosen) & (index < token))

    def count(index: UOp, inside: UOp, old: State) -> State:
        ahead = inside & is_ahead(logits[row.base + index].load(), index.cast(I32))
        return [old[0] + _flag(ahead)]

    (rank,) = row.fold(wanted, (1,), count, lambda a, b: [a[0] + b[0] - 1])
    if held is None:
        return rank
    total = row.body.registers(1, I32)
    total = total.after(total.after(*row.axes)[0].store(rank))
    slot = row.body.fold_while(wanted * MAX_STOP_IDS)
    at = row.axis * MAX_STOP_IDS + slot.cast(dtypes.weakint)
    index = row.inputs[row.spec.layout.offset("held_back") + at].load()
    ahead = (index >= 0) & (index < row.spec.vocab_size) & is_ahead(held[at].load(), index)
    step = total.after(slot)[0].store(total.after(slot)[0].load() + _flag(ahead))
    return total.after(step.end(slot))[0].load()


def _weigh_and_filter(
    row: _Row, weights: UOp, logits: UOp, best: UOp, temperature: UOp, draws: UOp
) -> tuple[UOp, Callable[[UOp, UOp], UOp]]:
    """Write weights exp((logit - best) / temperature); return them, and which (index, weight) may be drawn."""
    scale = temperature.maximum(COLDEST).reciprocal() * LOG2E
    (scale,) = row.keep([scale], [F32])

    def weigh(index: UOp, inside: UOp, old: State) -> State:
        weight = exp2((logits[row.base + index].load() - best) * scale)
        at = row.base + index
        # the weights themselves are the result; their sum is there to tie the stores to the pass
        written = weights[at if inside.op is Ops.CONST else at.valid(inside)].store(weight)
        return [old[0] + weights.after(written)[at].load()]

    (total,) = row.fold(draws, (0.0,), weigh, _added)
    weights = weights.after(total)
    floor = _threshold(row, weights, draws)
    if not row.spec.is_adjusted:
        return weights, lambda index, weight: weight >= floor
    is_typical = _typical(row, weights, floor, lambda index: (logits[row.base + index].load() - best) * scale, draws)
    return weights, lambda index, weight: (weight >= floor) & is_typical(index)


def _threshold(row: _Row, weights: UOp, draws: UOp) -> UOp:
    """The smallest weight that min-p, top-k and top-p keep."""
    floor = row.number("min_p")  # the best weight is 1
    top_k = row.param("top_k")

    def count(threshold: UOp, floor: UOp, *after: UOp) -> UOp:
        def step(index: UOp, inside: UOp, old: State) -> State:
            weight = weights[row.base + index].load()
            is_kept = inside & (weight >= threshold) & (weight >= floor)
            return [old[0] + is_kept.where(UOp.const(1, I32), UOp.const(0, I32))]

        return row.fold(UOp.const(1, I32), (0,), step, _added, *after)[0]

    def mass(threshold: UOp, wanted: UOp, *after: UOp) -> UOp:
        def step(index: UOp, inside: UOp, old: State) -> State:
            weight = weights[row.base + index].load()
            return [old[0] + (inside & (weight >= threshold)).where(weight, 0.0)]

        return row.fold(wanted, (0.0,), step, _added, *after)[0]

    uses_k = draws * _flag(top_k > 0)
    kth = _bisect(row, uses_k, lambda t, it: count(t, floor, it) >= top_k)
    (floor,) = row.keep([floor.maximum(kth)], [F32])
    top_p = row.number("top_p")
    uses_p = draws * _flag(top_p < 1.0)
    total = mass(floor, uses_p)
    (target,) = row.keep([total * top_p], [F32])
    edge = _bisect(row, uses_p, lambda t, it: mass(t.maximum(floor), UOp.const(1, I32), it) >= target)
    (floor,) = row.keep([floor.maximum(edge)], [F32])
    return floor


def _typical(row: _Row, weights: UOp, floor: UOp, exponent: Callable[[UOp], UOp], draws: UOp) -> Callable[[UOp], UOp]:
    """Which ids locally typical sampling keeps of those whose weight reaches `floor`.

    With p = w / Z and log2 w = x, surprise less entropy is (log2 Z - x) - (log2 Z - sum(p * x)): how far x is from its
    mean. The nearest are kept until they hold typical_p of the mass."""
    typical_p = row.number("typical_p")
    # a row without sampling state asks for nothing, whatever an earlier step left in its inputs
    uses = draws * _flag((typical_p < 1.0) & (row.param("state_rows") >= 0))

    def add(index: UOp, inside: UOp, old: State) -> State:
        weight = weights[row.base + index].load()
        kept = (inside & (weight >= floor)).where(weight, 0.0)
        return [old[0] + kept, old[1] + kept * exponent(index).maximum(-126.0)]

    total, moment = row.fold(uses, (0.0, 0.0), add, lambda a, b: [a[0] + b[0], a[1] + b[1]])
    target, mean = row.keep([total * typical_p, moment / total.maximum(1e-30)], [F32, F32])

    def distance(index: UOp) -> UOp:
        gap = exponent(index) - mean
        return gap.maximum(gap * -1.0) * (1.0 / FARTHEST)

    def nearer(edge: UOp, *after: UOp) -> UOp:
        def step(index: UOp, inside: UOp, old: State) -> State:
            weight = weights[row.base + index].load()
            is_near = inside & (weight >= floor) & (distance(index) < edge)
            return [old[0] + is_near.where(weight, 0.0)]

        return row.fold(UOp.const(1, I32), (0.0,), step, _added, *after)[0]

    # the largest edge in front of which the mass is missed lies at the last id that is needed
    edge = _bisect(row, uses, lambda t, it: nearer(t, it) < target)
    (edge,) = row.keep([(uses > 0).where(edge, UOp.const(float("inf"), F32))], [F32])
    return lambda index: distance(index) <= edge


def _bisect(row: _Row, wanted: UOp, holds: Callable[[UOp, UOp], UOp]) -> UOp:
    """The largest float t in [0, 1] for which `holds(t, iteration)`; 0 where the search is not wanted."""
    low, high = row.body.registers(1, I32), row.body.registers(1, I32)
    start = UOp.group(low.after(*row.axes)[0].store(0), high.after(*row.axes)[0].store(ABOVE_ONE_BITS))
    low, high = low.after(start), high.after(start)
    step = row.body.fold_while(wanted * BISECTION_STEPS)
    a, b = low.after(step)[0].load(), high.after(step)[0].load()
    (middle,) = row.keep([(a + b) >> 1], [I32], step, start)
    is_held = holds(middle.bitcast(F32), step)
    (flag,) = row.keep([_flag(is_held)], [I32], step)
    stores = UOp.group(
        low.after(step)[0].store((flag > 0).where(middle, a)), high.after(step)[0].store((flag > 0).where(b, middle))
    )
    return low.after(stores.end(step))[0].load().bitcast(F32)


def _race(row: _Row, weights: UOp, is_kept: Callable[[UOp, UOp], UOp], draws: UOp) -> UOp:
    """The index of the largest w_i / E_i among the weights that are kept; -1 where none is."""
    key = mix32(row.param("seed").bitcast(U32) + mix32(row.param("draw").bitcast(U32) + 0x9E3779B9))
    (key,) = row.keep([key], [U32])

    def run(index: UOp, inside: UOp, old: State) -> State:
        weight = weights[row.base + index].load()
        bits = mix32(index.cast(U32) * 0x9E3779B9 + key)
        # 23 bits: the largest u is 1 - 2**-24, a float, so that E is never 0
        uniform = ((bits >> 9).cast(I32).cast(F32) + 0.5) * 2.0**-23
        score = weight / (log2(uniform) * -1.0)
        is_better = inside & is_kept(index, weight) & (score > old[0])
        return [is_better.where(score, old[0]), is_better.where(index.cast(I32), old[1])]

    return row.fold(draws, (0.0, -1), run, _first_best)[1]


def mix32(x: UOp) -> UOp:
    """MurmurHash3's 32-bit finaliser (Appleby, public domain): a bijection that mixes every bit into every other."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)
