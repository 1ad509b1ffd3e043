"""Sampling in the captured graph: logits in, one packed int32 row a sequence out.

The kernels never sort, and read logits once. A token is drawn by an exponential race: argmax of w_i / E_i with
E_i = -ln(u_i) draws i with probability w_i / sum(w) (Devroye 1986, ch. 5; the Gumbel trick without the logarithm of w).
u_i is a hash of the request's seed, the number of tokens it has drawn, and i, so the same seed gives the same tokens
whatever else is in the batch.

`leaders_kernel` looks at parts of rows, each by itself: on a GPU threadgroups share a row, on a CPU each core has the
part of the vocabulary that it made the logits of. It leaves of each part what is likeliest, the winner of the part's
race, and what logprobs take. `draw_kernel` makes a row's token of its parts. Only rows that cut the distribution
(min-p, top-k, top-p: see keep.py) or count a token's rank look at the logits again.

A row pays for what it asks: the length of each pass is data, and zero for a row that does not need it.
`reference_sample.py` has the same in a few lines of NumPy, with the same tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from tinygrad import Tensor, UOp, dtypes
from tinygrad.dtype import DType
from tinygrad.uop.ops import Ops

from tinyvllm.config import MAX_LOGPROBS, MAX_STOP_IDS
from tinyvllm.ops.kernel.body import (
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
from tinyvllm.ops.sampling.keep import Cuts, Heat, KeptRace, logit_of, noise_key, noise_of, scale_of
from tinyvllm.ops.sampling.passes import (
    WIDTH,
    Combine,
    Item,
    Lanes,
    Run,
    Slice,
    State,
    added,
    combine_threads,
    first_best,
    flag,
    largest,
)
from tinyvllm.ops.step_inputs import StepLayout

ROW_LANES = 512  # threads of a threadgroup that has a row
PART_LANES = 256  # of one that has a part of a row
MAX_PARTS = 32  # a power of two
GROUPS_WANTED = 512
CACHED_LOGITS = 16384  # 64 KiB
# words of an output row: the token, its logprob's bits, its rank (1: the likeliest), the likeliest ids (-1: the
# vocabulary has no more), the bits of their logprobs. Ranks and logprobs are those of the raw logits.
OUT_TOKEN, OUT_LOGPROB, OUT_RANK, OUT_TOP, OUT_TOP_LOGPROB = 0, 1, 2, 3, 3 + MAX_LOGPROBS
OUT_WIDTH = 3 + 2 * MAX_LOGPROBS
# words that are left of a part, floats as their bits: its largest logit and that one's id (-1: none is finite); where
# the row draws the winner's score, its id, and the mass of all, of weights relative to the largest logit, in other
# words where the row cuts; the raw logits of ids that are suppressed (NaN: not in this part); and for logprobs of the
# raw logits the likeliest ids with their logits, the largest, and the mass relative to it. What is stored in different
# passes stays apart, because tinygrad makes one store of neighbours.
BEST, BEST_ID = 0, 1
WON, WON_CUT = 4, 8  # the first of three words
HELD = 12
TOP_ID = HELD + MAX_STOP_IDS
TOP_LOGIT = TOP_ID + MAX_LOGPROBS
RAW_BEST, RAW_MASS = TOP_LOGIT + MAX_LOGPROBS, TOP_LOGIT + MAX_LOGPROBS + 1
LEADER_WIDTH = 72
NAN_BITS = 0x7FC00000
ONE = UOp.const(1, I32)


@dataclass(frozen=True)
class SampleSpec:
    """Logits are float32: (R, width) for each of the `widths`, which are shares of the vocabulary, side by side. Of all
    their columns the first V are real."""

    layout: StepLayout
    vocab_size: int  # V
    widths: tuple[int, ...]
    has_threads: bool  # a threadgroup a part (GPU), or the lanes of one core (CPU)
    raw_widths: tuple[int, ...] = ()  # with logits processing: the raw logits lie beside the processed ones

    @property
    def is_processed(self) -> bool:
        return bool(self.raw_widths)

    @cached_property
    def num_parts(self) -> int:
        """Of a share, a power of two: few rows must not keep a whole GPU waiting, and a part must fit into the caches,
        since whoever draws reads it twice."""
        wanted = max(GROUPS_WANTED // self.layout.num_seqs, self.vocab_size // CACHED_LOGITS)
        parts = 1
        while self.has_threads and parts < min(wanted, MAX_PARTS) and 2 * parts * PART_LANES * WIDTH <= self.vocab_size:
            parts *= 2
        return parts

    def start(self, share: int) -> int:
        """The first id of a share."""
        return sum(self.widths[:share])


@dataclass(frozen=True)
class LeadersSpec:
    """What is looked for in a share of a step's logits."""

    sample: SampleSpec
    share: int
    ranks: bool = True  # what logprobs take
    draws: bool = True  # what a token takes, after the ids that min_tokens holds back became -inf in the logits


def sample(spec: SampleSpec, logits: Sequence[Tensor], inputs: Tensor, out: Tensor | None = None) -> Tensor:
    """(R * OUT_WIDTH,) int32: tokens and logprobs, at the beginning of `out` where that is given. Changes the logits
    (held-back ids become -inf)."""
    parts = [look_at_share(LeadersSpec(spec, share), tensor, inputs) for share, tensor in enumerate(logits)]
    out = empty(spec.layout.num_seqs * OUT_WIDTH, I32, str(inputs.device)) if out is None else out
    return run_kernel(draw_kernel(spec), [out], [inputs, *[tensor for part in parts for tensor in part]])[0]


def look_at_share(spec: LeadersSpec, logits: Tensor, inputs: Tensor) -> list[Tensor]:
    """The leaders of a share's parts, its logits, and where something is drawn its noises: where the share lies."""
    device, size = str(logits.device), spec.sample.layout.num_seqs * spec.sample.num_parts * LEADER_WIDTH
    leaders = empty(size, I32, device)
    if not spec.draws:
        return [*run_kernel(leaders_kernel(spec), [leaders], [logits, inputs]), logits]
    noises = empty(logits.numel(), F32, device)
    return run_kernel(leaders_kernel(spec), [leaders, logits, noises], [inputs])


class Row:
    """One row inside a kernel: its settings, and the lanes that look at it."""

    def __init__(self, spec: SampleSpec, body: Body, inputs: UOp, *, num_parts: int, num_threads: int) -> None:
        self.spec, self.body, self.inputs = spec, body, inputs
        seqs = spec.layout.num_seqs
        # rows are the GLOBAL axis: passes whose length is data cannot nest in a LOOP axis
        self.axis = body.grid(seqs) if seqs > 1 or spec.has_threads else body.loop(1)
        self.part = body.grid(num_parts) if spec.has_threads and num_parts > 1 else None
        axes = (self.axis,) if self.part is None else (self.axis, self.part)
        self.lanes = Lanes(body, axes, num_threads if spec.has_threads else 0)

    def param(self, name: str) -> UOp:
        """This row's int32 word of a step input."""
        return self.inputs[self.spec.layout.offset(name) + self.axis].load()

    def number(self, name: str) -> UOp:
        """This row's float of a step input."""
        return self.param(name).bitcast(F32)

    def held_id(self, slot: UOp) -> UOp:
        """A suppressed id; below 0: none."""
        return self.inputs[self.spec.layout.offset("suppressed_ids") + self.axis * MAX_STOP_IDS + slot].load()

    @property
    def num_logprobs(self) -> UOp:
        return self.param("num_logprobs").maximum(-1).minimum(MAX_LOGPROBS)

    def runs(self, logits: Sequence[UOp], widths: Sequence[int], noises: Sequence[UOp] | None = None) -> list[Slice]:
        """This row of each share."""
        slices = row_slices(logits, widths, self.axis, self.spec.vocab_size)
        if noises is None:
            return slices
        return [replace(part, beside=noise) for part, noise in zip(slices, noises, strict=True)]

    def heat(self, best: UOp) -> Heat:
        return Heat(best, self.lanes.keep([scale_of(self.number("temperature"))], [F32])[0])

    @property
    def key(self) -> UOp:
        """Of the noise of this row's token."""
        return self.lanes.keep([noise_key(self.param("seed"), self.param("draw"))], [U32])[0]

    @property
    def cuts(self) -> Cuts:
        return Cuts(self.number("min_p"), self.param("top_k"), self.number("top_p"))

    def likeliest(self, count: UOp, runs: Sequence[Run], emit: Callable[[UOp, UOp, UOp], list[UOp]]) -> UOp:
        """`emit(rank, id, logit)`, which returns stores, for the `count` largest in their order, ties by id."""
        lanes = self.lanes
        rank = self.body.fold_while(count)
        last = [self.body.registers(1, F32), self.body.registers(1, I32)]  # the one found before
        start = UOp.group(*[r.after(*lanes.axes)[0].store(v) for r, v in zip(last, (-LOWEST, -1), strict=True)])
        last = [r.after(start) for r in last]
        last_value, last_index = (r.after(rank)[0].load() for r in last)

        def next_best(item: Item, old: State) -> State:
            is_left = (item.value < last_value) | (item.value.eq(last_value) & (item.id > last_index))
            is_open = item.inside & is_left & (item.id >= 0)
            return first_best(old, [item.value, is_open.where(item.id, -1)])

        value, index = lanes.fold(ONE, runs, (LOWEST, -1), next_best, first_best, rank)
        found = emit(rank.cast(dtypes.weakint), index, value)
        found += [r.after(rank)[0].store(v) for r, v in zip(last, (value, index), strict=True)]
        return UOp.group(*found).end(rank)


def row_slices(logits: Sequence[UOp], widths: Sequence[int], row: UOp, vocab_size: int) -> list[Slice]:
    """A row of each share of logits."""
    starts = [sum(widths[:share]) for share in range(len(widths))]
    shares = zip(logits, starts, widths, strict=True)
    return [Slice(part, row * width, start, width, vocab_size) for part, start, width in shares]


# -- parts -------------------------------------------------------------------------------------------------------------


@cached_kernel
def leaders_kernel(wanted: LeadersSpec) -> KernelFn:
    """fn(leaders (R, P, LEADER_WIDTH), logits, noises, inputs): what is left of each part of a share; of rows that cut,
    the noise of each id beside its logit. Where nothing is drawn, the logits are only read and no noises are given."""
    spec, share = wanted.sample, wanted.share

    def kernel(leaders: UOp, logits: UOp, *rest: UOp) -> UOp:
        *noises, inputs = rest
        body, seqs, width = Body(), spec.layout.num_seqs, spec.widths[share]
        row = Row(spec, body, inputs, num_parts=spec.num_parts, num_threads=PART_LANES)
        part = row.part if row.part is not None else 0
        quads = PART_LANES * WIDTH
        span = -(-width // (spec.num_parts * quads)) * quads if spec.has_threads else width
        base = (row.axis * spec.num_parts + part) * LEADER_WIDTH

        def run(after: list[UOp]) -> list[Slice]:
            read = logits.after(*after) if after else logits
            return [Slice(read, row.axis * width, spec.start(share), span, spec.vocab_size, part * span)]

        def store(word: int | UOp, value: UOp) -> UOp:
            return leaders[row.lanes.only_once(base + word)].store(value)

        stores = _rank_part(row, run([]), store) if wanted.ranks else []
        if wanted.draws:
            (raw,) = run(stores)
            held = _hold_back(row, raw, leaders, base)
            stores += _draw_part(row, run([held]), noises[0], store)
        kinds = "leaders" if wanted.draws else "logprobs"
        read_once = seqs * width
        end = UOp.group(*stores).end(*reversed(row.lanes.axes))
        return finish(end, f"{kinds}_{seqs}x{width}", ops=read_once, nbytes=4 * read_once)

    return kernel


def _rank_part(row: Row, runs: list[Slice], store: Callable[[int | UOp, UOp], UOp]) -> list[UOp]:
    """Log-sum-exp of the raw logits, and the likeliest, of rows that ask for logprobs."""
    lanes, count = row.lanes, row.num_logprobs
    section = lanes.section(flag(count >= 0))

    def larger(item: Item, old: State) -> State:
        return [item.inside.where(old[0].maximum(item.value), old[0])]

    (best,) = lanes.keep(lanes.fold(ONE, runs, (LOWEST,), larger, largest, section), [F32], section)

    def add(item: Item, old: State) -> State:
        return [item.inside.where(old[0] + exp2((item.value - best) * LOG2E), old[0])]

    (mass,) = lanes.fold(ONE, runs, (0.0,), add, added, section)
    sums = UOp.group(store(RAW_BEST, best.bitcast(I32)), store(RAW_MASS, mass.bitcast(I32))).end(section)

    def emit(rank: UOp, index: UOp, value: UOp) -> list[UOp]:
        return [store(rank + TOP_ID, index), store(rank + TOP_LOGIT, value.bitcast(I32))]

    return [sums, row.likeliest(count.maximum(0), runs, emit)]


def _hold_back(row: Row, run: Slice, leaders: UOp, base: UOp) -> UOp:
    """Write -inf over the ids of a part that min_tokens holds back, in front of all threads' reading; their raw logits
    become words of the part, which begin at `base`."""
    thread, limit = row.lanes.thread, row.spec.vocab_size
    slot = thread % MAX_STOP_IDS if thread is not None else row.body.loop(MAX_STOP_IDS)
    token, first = row.held_id(slot), run.offset + run.origin
    is_own = (token >= first) & (token < first + run.span) & (token >= 0) & (token < limit)
    index = run.row + is_own.where(token - run.origin, 0).maximum(0).minimum(limit - 1).cast(dtypes.weakint)
    word = base + HELD + slot
    if thread is not None:
        # through a register: tinygrad would drop the `% MAX_STOP_IDS` behind this condition, and read outside of it
        (is_slot,) = row.lanes.keep([flag(thread < MAX_STOP_IDS)], [I32])
        is_own, word = is_own & (is_slot > 0), word.valid(is_slot > 0)
    kept = leaders[word].store(is_own.where(run.buffer[index].load().bitcast(I32), NAN_BITS))
    stored = run.buffer.after(kept)[index.valid(is_own)].store(NEG_INF)
    return stored.end(slot) if thread is None else UOp(Ops.BARRIER, src=(stored,))


def _draw_part(row: Row, runs: list[Slice], noises: UOp, store: Callable[[int | UOp, UOp], UOp]) -> list[UOp]:
    """The likeliest id, and of rows that draw the race's winner. The noise stays for rows that cut."""
    lanes = row.lanes

    def better(item: Item, old: State) -> State:
        is_better = item.inside & (item.value > old[0])
        return [is_better.where(item.value, old[0]), is_better.where(item.id, old[1])]

    best, greedy = lanes.keep(lanes.fold(ONE, runs, (LOWEST, -1), better, first_best), [F32, I32])
    heat, key = row.heat(best), row.key
    draws, cuts = row.number("temperature") > 0.0, row.cuts.is_any
    return [
        store(BEST, best.bitcast(I32)),
        store(BEST_ID, greedy),
        _race(row, runs, heat, key, flag(draws & cuts.ne(True)), None, store),
        _race(row, runs, heat, key, flag(draws & cuts), noises, store),
    ]


def _race(
    row: Row,
    runs: list[Slice],
    heat: Heat,
    key: UOp,
    wanted: UOp,
    noises: UOp | None,
    store: Callable[[int | UOp, UOp], UOp],
) -> UOp:
    """Stores of a race. The noises stay where a buffer is given for them: in a pass of its own, since stores under a
    condition are slow on a CPU, thirty times into pages that nobody has touched yet."""
    section, stores = row.lanes.section(wanted), []

    def run(item: Item, old: State) -> State:
        is_real = item.inside & (item.value > LOWEST)  # no -inf, no NaN
        weight, noise = heat.weight(item.value), noise_of(key, item.id)
        if noises is not None:
            assert item.at is not None
            stores.append(noises[item.at if item.inside.op is Ops.CONST else item.at.valid(item.inside)].store(noise))
        score = weight * noise
        is_better = is_real & (score > old[0])
        return [is_better.where(score, old[0]), is_better.where(item.id, old[1]), old[2] + is_real.where(weight, 0.0)]

    found = row.lanes.fold(ONE, runs, (0.0, -1, 0.0), run, _won_and_weighed, section, effects=stores)
    first = WON if noises is None else WON_CUT
    return UOp.group(*[store(first + i, value.bitcast(I32)) for i, value in enumerate(found)]).end(section)


def _won_and_weighed(a: State, b: State) -> State:
    """(score, winner, mass) of two parts as one."""
    return [*first_best(a[:2], b[:2]), a[2] + b[2]]


# -- rows --------------------------------------------------------------------------------------------------------------


class Leaders:
    """What is left of a row's parts."""

    def __init__(self, row: Row, shares: Sequence[UOp]) -> None:
        self._row, self._shares, self.num_parts = row, shares, row.spec.num_parts

    def word(self, share: int, part: UOp | int, word: int | UOp) -> UOp:
        return self._shares[share][(self._row.axis * self.num_parts + part) * LEADER_WIDTH + word].load()

    def number(self, share: int, part: UOp | int, word: int | UOp) -> UOp:
        return self.word(share, part, word).bitcast(F32)

    def merge(self, state_of: Callable[[int, UOp | int], State], combine: Combine, kinds: Sequence[DType]) -> State:
        """The state of all parts, of `state_of(share, part)`; in registers."""
        row, thread = self._row, self._row.lanes.thread
        if thread is None:
            values = balanced([state_of(share, 0) for share in range(len(self._shares))], combine)
        else:
            own = state_of(0, thread % self.num_parts)
            values = combine_threads(row.body, thread, self.num_parts, own, combine)
        return row.lanes.keep(values, kinds)

    @property
    def tops(self) -> list[Run]:
        """The parts' likeliest."""
        return [_Tops(self, share) for share in range(len(self._shares))]


@dataclass(frozen=True)
class _Tops:
    """A pass over the likeliest that each part of a share has left."""

    leaders: Leaders
    share: int

    @property
    def span(self) -> int:
        return self.leaders.num_parts * MAX_LOGPROBS

    def items(self, place: UOp, width: int, num_places: int) -> list[Item]:
        found = []
        for i in range(width):
            entry = place * width + i
            inside = entry < self.span
            entry = inside.where(entry, 0)
            part, rank = entry // MAX_LOGPROBS, entry % MAX_LOGPROBS
            inside = inside & (rank < self.leaders._row.num_logprobs.cast(dtypes.weakint))
            value = self.leaders.number(self.share, part, rank + TOP_LOGIT)
            found.append(Item(value, self.leaders.word(self.share, part, rank + TOP_ID), inside))
        return found


@cached_kernel
def draw_kernel(spec: SampleSpec) -> KernelFn:
    """fn(out, inputs, *(leaders, logits, noises of each share)[, *(leaders, logits of each raw share)]): choose each
    row's token; -1 where no logit is finite. The raw shares belong to a step with logits processing; without them, the
    first shares are of the raw logits, except for suppressed ids."""

    def kernel(out: UOp, inputs: UOp, *rest: UOp) -> UOp:
        body, operands = Body(), list(rest)
        row = Row(spec, body, inputs, num_parts=1, num_threads=ROW_LANES)

        shares = [[operands.pop(0) for _ in range(3)] for _ in spec.widths]
        leaders = Leaders(row, [share[0] for share in shares])
        runs = row.runs([share[1] for share in shares], spec.widths, [share[2] for share in shares])
        raw_leaders, raw_runs = leaders, runs
        if spec.is_processed:
            shares = [[operands.pop(0) for _ in range(2)] for _ in spec.raw_widths]
            raw_leaders = Leaders(row, [share[0] for share in shares])
            raw_runs = row.runs([share[1] for share in shares], spec.raw_widths)
        (token,) = row.lanes.keep([_choose(row, leaders, runs)], [I32])
        stores = _describe(row, out, token, raw_leaders, raw_runs)
        stores.append(out[row.lanes.only_once(row.axis * OUT_WIDTH + OUT_TOKEN)].store(token))
        seqs, vocab = spec.layout.num_seqs, spec.vocab_size
        name = f"draw{'_processed' if spec.is_processed else ''}_{seqs}x{vocab}"
        return finish(UOp.group(*stores).end(*reversed(row.lanes.axes)), name, nbytes=4 * seqs * LEADER_WIDTH)

    return kernel


def _choose(row: Row, leaders: Leaders, runs: Sequence[Slice]) -> UOp:
    """A row's token: the likeliest, the drawn, or the one that it is told to report."""

    def likeliest(share: int, part: UOp | int) -> State:
        return [leaders.number(share, part, BEST), leaders.word(share, part, BEST_ID)]

    best, greedy = leaders.merge(likeliest, first_best, [F32, I32])
    heat = row.heat(best)

    def drawn(share: int, part: UOp | int) -> State:
        shrink = heat.weight(leaders.number(share, part, BEST))
        first = cuts.is_any.where(UOp.const(WON_CUT, dtypes.weakint), UOp.const(WON, dtypes.weakint))
        score, mass = (leaders.number(share, part, first + i) * shrink for i in (0, 2))
        return [score, leaders.word(share, part, first + 1), mass]

    cuts = row.cuts
    _, winner, mass = leaders.merge(drawn, _won_and_weighed, [F32, I32, F32])
    draws = (row.number("temperature") > 0.0) & (greedy >= 0)
    is_cut = draws & cuts.is_any
    if row.spec.is_processed:  # whose typical rows were cut already
        is_cut = is_cut & is_typical(row).ne(True)
    kept = KeptRace(row.lanes, runs, heat, cuts).run(flag(is_cut), winner, mass, greedy)
    forced = row.param("forced").minimum(row.spec.vocab_size - 1)
    return (forced >= 0).where(forced, draws.where(kept, greedy))


def is_typical(row: Row) -> UOp:
    """Whether a row of a step with logits processing wants typical_p. One without sampling state asks for nothing,
    whatever an earlier step left in its inputs."""
    return (row.number("typical_p") < 1.0) & (row.param("state_rows") >= 0) & (row.number("temperature") > 0.0)


def _describe(row: Row, out: UOp, token: UOp, leaders: Leaders, runs: Sequence[Slice]) -> list[UOp]:
    """Stores of logprobs and ranks, by the raw logits, in rows that ask for them."""

    def raw(share: int, part: UOp | int) -> State:
        return [leaders.number(share, part, RAW_BEST), leaders.number(share, part, RAW_MASS)]

    def more(a: State, b: State) -> State:
        best = a[0].maximum(b[0])
        return [best, balanced([mass * exp2((at - best) * LOG2E) for at, mass in (a, b)])]

    best, mass = leaders.merge(raw, more, [F32, F32])
    count = row.num_logprobs
    (norm,) = row.lanes.keep([best + log2(mass.maximum(1e-30)) * LN2], [F32])
    base = row.axis * OUT_WIDTH

    def store(word: int | UOp, value: UOp) -> UOp:
        return out[row.lanes.only_once(base + word)].store(value)

    def emit(rank: UOp, index: UOp, value: UOp) -> list[UOp]:
        return [store(rank + OUT_TOP, index), store(rank + OUT_TOP_LOGPROB, (value - norm).bitcast(I32))]

    tops = row.likeliest(count.maximum(0), leaders.tops, emit)
    chosen, rank = _rank(row, leaders, runs, token, flag(count >= 0))
    return [tops, store(OUT_LOGPROB, (chosen - norm).bitcast(I32)), store(OUT_RANK, rank)]


def _rank(row: Row, leaders: Leaders, runs: Sequence[Slice], token: UOp, wanted: UOp) -> tuple[UOp, UOp]:
    """(the token's logit, 1 and how many ids are ahead, by raw logit and then by id); 1 where it is not wanted."""
    (chosen,) = row.lanes.keep([logit_of(runs, token)], [F32])

    def is_ahead(value: UOp, index: UOp) -> UOp:
        return (value > chosen) | (value.eq(chosen) & (index < token))

    def count(item: Item, old: State) -> State:
        return [old[0] + flag(item.inside & is_ahead(item.value, item.id))]

    wanted = wanted * flag(token >= 0)
    ahead = row.body.registers(1, I32)
    ahead = ahead.after(ahead.after(*row.lanes.axes)[0].store(0))
    section = row.lanes.section(wanted)
    (counted,) = row.lanes.fold(ONE, runs, (0,), count, added, section)
    ahead = ahead.after(ahead.after(section)[0].store(counted).end(section))[0].load()
    if row.spec.is_processed:
        return chosen, ahead + 1
    # the suppressed ids, whose own place in the logits says -inf
    total = row.body.registers(1, I32)
    total = total.after(total.after(*row.lanes.axes)[0].store(ahead + 1))
    slot = row.body.fold_while(wanted * MAX_STOP_IDS)
    held = row.held_id(slot.cast(dtypes.weakint))
    more = total.after(slot)[0].load()
    for share in range(len(runs)):
        for part in range(leaders.num_parts):
            more = more + flag(is_ahead(leaders.number(share, part, slot.cast(dtypes.weakint) + HELD), held))
    return chosen, total.after(total.after(slot)[0].store(more).end(slot))[0].load()
