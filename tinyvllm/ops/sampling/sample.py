"""Sampling in the captured graph: logits in, one packed int32 row per sequence out.

The kernels never sort, and read the logits once. A token is drawn by the Gumbel-max trick in its exponential form:
argmax of w_i / E_i with E_i = -ln(u_i) draws i with probability w_i / sum(w) (Devroye 1986, ch. 5), and the logarithm
of w_i / E_i is the logit plus Gumbel noise (Maddison et al. 2014). u_i is a hash of the request's seed, the number of
tokens it has drawn, and i. So the same seed gives the same tokens whatever else is in the batch.

On a GPU several threadgroups share a row of logits: each has one split of it. `leaders_kernel` reads each split by
itself and stores its leaders, the values that can still matter for the whole row: the likeliest id, the draw, and what
logprobs need. `draw_kernel` combines the leaders of a row's splits into its token. Only rows that filter (min-p, top-k,
top-p: see filters.py) or count a token's rank read the logits again.

A row pays only for what it asks for: the length of each pass is data, and 0 for a row that does not need the pass.
`reference.py` does the same in a few lines of NumPy, and returns the same tokens.
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
    run_row_kernel,
)
from tinyvllm.ops.sampling.filters import (
    FilteredSampler,
    Filters,
    Softmax,
    noise_key,
    noise_of,
    softmax_scale,
)
from tinyvllm.ops.sampling.reduction import (
    VECTOR_WIDTH,
    Combine,
    Item,
    RowLanes,
    RowSlice,
    RowValues,
    State,
    combine_argmax,
    combine_max,
    combine_sum,
    combine_threads,
    flag,
)
from tinyvllm.ops.step_inputs import StepLayout, row_word

ROW_THREADS = 512  # threads of a threadgroup that has a whole row
SPLIT_THREADS = 256  # threads of a threadgroup that has a split of a row
MAX_SPLITS = 32  # a power of two
GROUPS_WANTED = 512  # threadgroups that keep a large GPU busy
CACHED_LOGITS = 16384  # 64 KiB
# Words of an output row: the token, the bits of its logprob, its rank (1: the likeliest), the ids of the likeliest
# tokens (-1: the vocabulary has no more), and the bits of their logprobs. Ranks and logprobs are those of the raw
# logits.
OUT_TOKEN, OUT_LOGPROB, OUT_RANK, OUT_TOP, OUT_TOP_LOGPROB = 0, 1, 2, 3, 3 + MAX_LOGPROBS
OUT_WIDTH = 3 + 2 * MAX_LOGPROBS
# Words of a split's leaders, floats as their bits:
# - the largest logit and its id (-1: none is finite)
# - of rows that draw, the draw's score and id and the mass of all ids, with weights relative to the split's largest
#   logit: at DRAW without filters, at FILTERED_DRAW with them
# - the raw logits of suppressed ids (NaN: not in this split)
# - for logprobs, the likeliest ids and their raw logits, the largest raw logit, and the mass relative to it
# Words that different passes store are kept apart, because tinygrad merges stores to neighbors into one.
BEST, BEST_ID = 0, 1
DRAW, FILTERED_DRAW = 4, 8  # the first of three words
SUPPRESSED = 12
TOP_ID = SUPPRESSED + MAX_STOP_IDS
TOP_LOGIT = TOP_ID + MAX_LOGPROBS
RAW_BEST, RAW_MASS = TOP_LOGIT + MAX_LOGPROBS, TOP_LOGIT + MAX_LOGPROBS + 1
LEADER_WIDTH = 72
NAN_BITS = 0x7FC00000
ONE = UOp.const(1, I32)
ANY_LAYOUT = StepLayout(num_tokens=1, num_seqs=1, max_blocks=1, block_size=1)


@dataclass(frozen=True)
class SampleSpec:
    """The shape of a step's logits: (R, stride) float32, of whose columns the first V are real."""

    layout: StepLayout
    vocab_size: int  # V
    stride: int
    has_threads: bool  # whether a threadgroup has a split (GPU), or the lanes of one core (CPU)
    row_threads: int = ROW_THREADS
    is_processed: bool = False  # tokens are drawn from processed logits, and there are raw logits too
    any_rows: tuple[int, int] | None = None  # of `for_rows`: the number of rows, and of splits

    @property
    def num_rows(self) -> int:
        """R."""
        return self.layout.num_seqs if self.any_rows is None else self.any_rows[0]

    def for_rows(self, num_rows: int) -> SampleSpec:
        """The same for so many rows with as many splits as these have, whatever the layout."""
        if num_rows == self.num_rows:
            return self
        return replace(self, layout=ANY_LAYOUT, any_rows=(num_rows, self.num_splits))

    @cached_property
    def num_splits(self) -> int:
        """Splits of a row, a power of two. A step of few rows must not leave most of a GPU idle, and a split must fit
        into the caches, because `draw_kernel` may read it again."""
        if self.any_rows is not None:
            return self.any_rows[1]
        wanted = max(GROUPS_WANTED // self.layout.num_seqs, self.vocab_size // CACHED_LOGITS)
        least = SPLIT_THREADS * VECTOR_WIDTH  # logits that a threadgroup reads at once
        splits = 1
        while self.has_threads and splits < min(wanted, MAX_SPLITS) and 2 * splits * least <= self.vocab_size:
            splits *= 2
        return splits


@dataclass(frozen=True)
class LeadersSpec:
    """What `leaders_kernel` computes."""

    sample: SampleSpec
    ranks: bool = True  # what logprobs need
    draws: bool = True  # what drawing needs, after suppressed ids became -inf in the logits


def sample(spec: SampleSpec, logits: Tensor, inputs: Tensor, out: Tensor | None = None) -> Tensor:
    """(R * OUT_WIDTH,) int32: tokens and logprobs, at the beginning of `out` if given. Changes the logits: suppressed
    ids become -inf."""
    found = find_leaders(LeadersSpec(spec), logits, inputs)
    out = empty(spec.num_rows * OUT_WIDTH, I32, str(inputs.device)) if out is None else out

    def make(num_rows: int) -> KernelFn:
        return draw_kernel(spec.for_rows(num_rows))

    return run_row_kernel(make, spec.num_rows, [out], [inputs, *found], shared=[out])[0]


def find_leaders(spec: LeadersSpec, logits: Tensor, inputs: Tensor) -> list[Tensor]:
    """The leaders of the rows' splits, the logits, and if something is drawn the noises."""
    device, num_rows = str(logits.device), spec.sample.num_rows
    leaders = empty(num_rows * spec.sample.num_splits * LEADER_WIDTH, I32, device)

    def make(num_rows: int) -> KernelFn:
        return leaders_kernel(replace(spec, sample=spec.sample.for_rows(num_rows)))

    if not spec.draws:
        return [*run_row_kernel(make, num_rows, [leaders], [logits, inputs]), logits]
    noises = empty(logits.numel(), F32, device)
    return run_row_kernel(make, num_rows, [leaders, logits, noises], [inputs])


class Row:
    """One row inside a kernel: its settings, and the lanes that reduce it."""

    def __init__(self, spec: SampleSpec, body: Body, inputs: UOp, *, num_splits: int, num_threads: int) -> None:
        self.spec, self.body, self.inputs = spec, body, inputs
        seqs = spec.num_rows
        # rows are a GLOBAL axis: loops whose length is data cannot nest in a LOOP axis
        self.axis = body.grid(seqs) if seqs > 1 or spec.has_threads else body.loop(1)
        self.split = body.grid(num_splits) if spec.has_threads and num_splits > 1 else None
        axes = (self.axis,) if self.split is None else (self.axis, self.split)
        self.lanes = RowLanes(body, axes, num_threads if spec.has_threads else 0)

    def param(self, name: str) -> UOp:
        """This row's word of an int32 step input."""
        return self.inputs[row_word(name, self.axis)].load()

    def number(self, name: str) -> UOp:
        """This row's word of a float step input."""
        return self.param(name).bitcast(F32)

    def suppressed_id(self, slot: UOp) -> UOp:
        """A suppressed id; below 0: none."""
        return self.inputs[row_word("suppressed_ids", self.axis) + slot].load()

    @property
    def num_logprobs(self) -> UOp:
        return self.param("num_logprobs").maximum(-1).minimum(MAX_LOGPROBS)

    def slice(self, logits: UOp, noises: UOp | None = None) -> RowSlice:
        """This row of the logits."""
        return replace(row_slice(self.spec, logits, self.axis), noises=noises)

    def softmax(self, max_logit: UOp) -> Softmax:
        return Softmax(max_logit, self.lanes.to_registers([softmax_scale(self.number("temperature"))], [F32])[0])

    @property
    def key(self) -> UOp:
        """The key of the noise for this row's token."""
        return self.lanes.to_registers([noise_key(self.param("seed"), self.param("draw"))], [U32])[0]

    @property
    def filters(self) -> Filters:
        return Filters(self.number("min_p"), self.param("top_k"), self.number("top_p"))

    def likeliest(self, count: UOp, row: RowValues, emit: Callable[[UOp, UOp, UOp], list[UOp]]) -> UOp:
        """Call `emit(rank, id, logit)`, which returns stores, for the `count` largest values: the largest first, ties
        by id. One pass over `row` for each."""
        lanes = self.lanes
        rank = self.body.fold_while(count)
        last = [self.body.registers(1, F32), self.body.registers(1, I32)]  # the last one found
        start = UOp.group(*[r.after(*lanes.axes)[0].store(v) for r, v in zip(last, (-LOWEST, -1), strict=True)])
        last = [r.after(start) for r in last]
        last_value, last_index = (r.after(rank)[0].load() for r in last)

        def next_best(item: Item, old: State) -> State:
            is_left = (item.value < last_value) | (item.value.eq(last_value) & (item.id > last_index))
            is_open = item.inside & is_left & (item.id >= 0)
            return combine_argmax(old, [item.value, is_open.where(item.id, -1)])

        value, index = lanes.reduce(ONE, row, (LOWEST, -1), next_best, combine_argmax, rank)
        found = emit(rank.cast(dtypes.weakint), index, value)
        found += [r.after(rank)[0].store(v) for r, v in zip(last, (value, index), strict=True)]
        return UOp.group(*found).end(rank)


def row_slice(spec: SampleSpec, logits: UOp, row: UOp) -> RowSlice:
    """A row of the logits."""
    return RowSlice(logits, row * spec.stride, spec.stride, spec.vocab_size)


# -- splits ------------------------------------------------------------------------------------------------------------

Store = Callable[[int | UOp, UOp], UOp]  # (word of an output row, value) -> store


@cached_kernel
def leaders_kernel(wanted: LeadersSpec) -> KernelFn:
    """fn(leaders (R, P, LEADER_WIDTH), logits, noises, inputs): the leaders of each row's P splits; of rows that
    filter, also the noise of each id, at the index of its logit. If nothing is drawn, there are no noises, and the
    logits are only read."""
    spec = wanted.sample

    def kernel(leaders: UOp, logits: UOp, *rest: UOp) -> UOp:
        *noises, inputs = rest
        body, seqs, width = Body(), spec.num_rows, spec.stride
        row = Row(spec, body, inputs, num_splits=spec.num_splits, num_threads=SPLIT_THREADS)
        split = row.split if row.split is not None else 0
        least = SPLIT_THREADS * VECTOR_WIDTH
        span = -(-width // (spec.num_splits * least)) * least if spec.has_threads else width
        base = (row.axis * spec.num_splits + split) * LEADER_WIDTH

        def read(after: list[UOp]) -> RowSlice:
            ready = logits.after(*after) if after else logits
            return RowSlice(ready, row.axis * width, span, spec.vocab_size, split * span)

        def store(word: int | UOp, value: UOp) -> UOp:
            return leaders[row.lanes.only_once(base + word)].store(value)

        stores = _rank_split(row, read([]), store) if wanted.ranks else []
        if wanted.draws:
            suppressed = _suppress(row, read(stores), leaders, base)
            stores += _draw_split(row, read([suppressed]), noises[0], store)
        kinds = "leaders" if wanted.draws else "logprobs"
        read_once = seqs * width
        end = UOp.group(*stores).end(*reversed(row.lanes.axes))
        return finish(end, f"{kinds}_{seqs}x{width}", ops=read_once, nbytes=4 * read_once)

    return kernel


def _rank_split(row: Row, logits: RowSlice, store: Store) -> list[UOp]:
    """The log-sum-exp of the raw logits and the likeliest ids, in rows that ask for logprobs."""
    lanes, count = row.lanes, row.num_logprobs
    branch = lanes.only_if(flag(count >= 0))

    def larger(item: Item, old: State) -> State:
        return [item.inside.where(old[0].maximum(item.value), old[0])]

    (best,) = lanes.to_registers(lanes.reduce(ONE, logits, (LOWEST,), larger, combine_max, branch), [F32], branch)

    def add(item: Item, old: State) -> State:
        return [item.inside.where(old[0] + exp2((item.value - best) * LOG2E), old[0])]

    (mass,) = lanes.reduce(ONE, logits, (0.0,), add, combine_sum, branch)
    sums = UOp.group(store(RAW_BEST, best.bitcast(I32)), store(RAW_MASS, mass.bitcast(I32))).end(branch)

    def emit(rank: UOp, index: UOp, value: UOp) -> list[UOp]:
        return [store(rank + TOP_ID, index), store(rank + TOP_LOGIT, value.bitcast(I32))]

    return [sums, row.likeliest(count.maximum(0), logits, emit)]


def _suppress(row: Row, values: RowSlice, leaders: UOp, base: UOp) -> UOp:
    """Write -inf over the split's suppressed ids, before any thread reads them. Their raw logits are saved in the
    split's leaders, which begin at `base`."""
    thread, limit = row.lanes.thread, row.spec.vocab_size
    slot = thread % MAX_STOP_IDS if thread is not None else row.body.loop(MAX_STOP_IDS)
    token, first = row.suppressed_id(slot), values.offset
    is_own = (token >= first) & (token < first + values.span) & (token >= 0) & (token < limit)
    index = values.row + is_own.where(token, 0).maximum(0).minimum(limit - 1).cast(dtypes.weakint)
    word = base + SUPPRESSED + slot
    if thread is not None:
        # through a register: tinygrad would drop `% MAX_STOP_IDS` under this condition, and read out of bounds
        (is_slot,) = row.lanes.to_registers([flag(thread < MAX_STOP_IDS)], [I32])
        is_own, word = is_own & (is_slot > 0), word.valid(is_slot > 0)
    kept = leaders[word].store(is_own.where(values.buffer[index].load().bitcast(I32), NAN_BITS))
    stored = values.buffer.after(kept)[index.valid(is_own)].store(NEG_INF)
    return stored.end(slot) if thread is None else UOp(Ops.BARRIER, src=(stored,))


def _draw_split(row: Row, logits: RowSlice, noises: UOp, store: Store) -> list[UOp]:
    """The likeliest id, and in rows that draw, the draw. Rows that filter also keep the noises."""
    lanes = row.lanes

    def better(item: Item, old: State) -> State:
        is_better = item.inside & (item.value > old[0])
        return [is_better.where(item.value, old[0]), is_better.where(item.id, old[1])]

    reduced = lanes.reduce(ONE, logits, (LOWEST, -1), better, combine_argmax)
    best, greedy = lanes.to_registers(reduced, [F32, I32])
    softmax, key = row.softmax(best), row.key
    draws, filters = row.number("temperature") > 0.0, row.filters.is_any
    return [
        store(BEST, best.bitcast(I32)),
        store(BEST_ID, greedy),
        _gumbel_max(row, logits, softmax, key, flag(draws & filters.ne(True)), None, store),
        _gumbel_max(row, logits, softmax, key, flag(draws & filters), noises, store),
    ]


def _gumbel_max(
    row: Row,
    logits: RowSlice,
    softmax: Softmax,
    key: UOp,
    wanted: UOp,
    noises: UOp | None,
    store: Store,
) -> UOp:
    """Stores of a draw: its score, its id, and the mass. The noises are kept if a buffer is given for them: in a pass
    of its own, because conditional stores are slow on a CPU, up to thirty times on pages touched for the first time."""
    branch, stores = row.lanes.only_if(wanted), []

    def step(item: Item, old: State) -> State:
        is_real = item.inside & (item.value > LOWEST)  # no -inf, no NaN
        weight, noise = softmax.weight(item.value), noise_of(key, item.id)
        if noises is not None:
            assert item.at is not None
            stores.append(noises[item.at if item.inside.op is Ops.CONST else item.at.valid(item.inside)].store(noise))
        score = weight * noise
        is_better = is_real & (score > old[0])
        return [is_better.where(score, old[0]), is_better.where(item.id, old[1]), old[2] + is_real.where(weight, 0.0)]

    found = row.lanes.reduce(ONE, logits, (0.0, -1, 0.0), step, _combine_draws, branch, effects=stores)
    first = DRAW if noises is None else FILTERED_DRAW
    return UOp.group(*[store(first + i, value.bitcast(I32)) for i, value in enumerate(found)]).end(branch)


def _combine_draws(a: State, b: State) -> State:
    """(score, id, mass) of two splits as one."""
    return [*combine_argmax(a[:2], b[:2]), a[2] + b[2]]


# -- rows --------------------------------------------------------------------------------------------------------------


class Leaders:
    """The leaders of a row's splits."""

    def __init__(self, row: Row, leaders: UOp) -> None:
        self._row, self._leaders, self.num_splits = row, leaders, row.spec.num_splits

    def word(self, split: UOp | int, word: int | UOp) -> UOp:
        return self._leaders[(self._row.axis * self.num_splits + split) * LEADER_WIDTH + word].load()

    def number(self, split: UOp | int, word: int | UOp) -> UOp:
        return self.word(split, word).bitcast(F32)

    def merge(self, state_of: Callable[[UOp | int], State], combine: Combine, kinds: Sequence[DType]) -> State:
        """Combine `state_of(split)` over all splits, into registers."""
        row, thread = self._row, self._row.lanes.thread
        values = state_of(0 if thread is None else thread % self.num_splits)
        if thread is not None:
            values = combine_threads(row.body, thread, self.num_splits, values, combine)
        return row.lanes.to_registers(values, kinds)


@dataclass(frozen=True)
class _Tops:
    """The likeliest ids of a row's splits, as values to reduce."""

    row: Row
    leaders: Leaders

    @property
    def span(self) -> int:
        return self.leaders.num_splits * MAX_LOGPROBS

    def items(self, place: UOp, width: int, num_places: int) -> list[Item]:
        found = []
        for i in range(width):
            entry = place * width + i
            inside = entry < self.span
            entry = inside.where(entry, 0)
            split, rank = entry // MAX_LOGPROBS, entry % MAX_LOGPROBS
            inside = inside & (rank < self.row.num_logprobs.cast(dtypes.weakint))
            value = self.leaders.number(split, rank + TOP_LOGIT)
            found.append(Item(value, self.leaders.word(split, rank + TOP_ID), inside))
        return found


@cached_kernel
def draw_kernel(spec: SampleSpec) -> KernelFn:
    """fn(out, inputs, leaders, logits, noises[, raw leaders, raw logits]): each row's token, -1 where no logit is
    finite. The raw ones are there with logits processing. Without it the leaders are those of the raw logits as well,
    except for the suppressed ids."""

    def kernel(out: UOp, inputs: UOp, found: UOp, values: UOp, noises: UOp, *raw: UOp) -> UOp:
        row = Row(spec, Body(), inputs, num_splits=1, num_threads=spec.row_threads)
        leaders, logits = Leaders(row, found), row.slice(values, noises)
        raw_leaders, raw_logits = (Leaders(row, raw[0]), row.slice(raw[1])) if spec.is_processed else (leaders, logits)
        (token,) = row.lanes.to_registers([_choose(row, leaders, logits)], [I32])
        stores = _report(row, out, token, raw_leaders, raw_logits)
        stores.append(out[row.lanes.only_once(row.axis * OUT_WIDTH + OUT_TOKEN)].store(token))
        seqs, vocab = spec.num_rows, spec.vocab_size
        name = f"draw{'_processed' if spec.is_processed else ''}_{seqs}x{vocab}"
        return finish(UOp.group(*stores).end(*reversed(row.lanes.axes)), name, nbytes=4 * seqs * LEADER_WIDTH)

    return kernel


def _choose(row: Row, leaders: Leaders, logits: RowSlice) -> UOp:
    """A row's token: the likeliest, the drawn, or the forced one."""

    def likeliest(split: UOp | int) -> State:
        return [leaders.number(split, BEST), leaders.word(split, BEST_ID)]

    best, greedy = leaders.merge(likeliest, combine_argmax, [F32, I32])
    softmax = row.softmax(best)

    def drawn(split: UOp | int) -> State:
        rescale = softmax.weight(leaders.number(split, BEST))
        first = filters.is_any.where(UOp.const(FILTERED_DRAW, dtypes.weakint), UOp.const(DRAW, dtypes.weakint))
        score, mass = (leaders.number(split, first + i) * rescale for i in (0, 2))
        return [score, leaders.word(split, first + 1), mass]

    filters = row.filters
    _, candidate, mass = leaders.merge(drawn, _combine_draws, [F32, I32, F32])
    draws = (row.number("temperature") > 0.0) & (greedy >= 0)
    is_filtered = draws & filters.is_any
    if row.spec.is_processed:  # then rows with typical_p have been filtered already
        is_filtered = is_filtered & is_typical(row).ne(True)
    sampler = FilteredSampler(row.lanes, logits, softmax, filters)
    token = sampler.sample(flag(is_filtered), candidate, mass, greedy)
    forced = row.param("forced").minimum(row.spec.vocab_size - 1)
    return (forced >= 0).where(forced, draws.where(token, greedy))


def is_typical(row: Row) -> UOp:
    """Whether a row of a step with logits processing wants typical_p. A row without sampling state asks for nothing,
    whatever an earlier step left in its inputs."""
    return (row.number("typical_p") < 1.0) & (row.param("state_rows") >= 0) & (row.number("temperature") > 0.0)


def _report(row: Row, out: UOp, token: UOp, leaders: Leaders, logits: RowSlice) -> list[UOp]:
    """Stores of logprobs and rank, by the raw logits, in rows that ask for them."""

    def raw(split: UOp | int) -> State:
        return [leaders.number(split, RAW_BEST), leaders.number(split, RAW_MASS)]

    def combine(a: State, b: State) -> State:
        best = a[0].maximum(b[0])
        return [best, balanced([mass * exp2((at - best) * LOG2E) for at, mass in (a, b)])]

    best, mass = leaders.merge(raw, combine, [F32, F32])
    count = row.num_logprobs
    (log_sum_exp,) = row.lanes.to_registers([best + log2(mass.maximum(1e-30)) * LN2], [F32])
    base = row.axis * OUT_WIDTH

    def store(word: int | UOp, value: UOp) -> UOp:
        return out[row.lanes.only_once(base + word)].store(value)

    def emit(rank: UOp, index: UOp, value: UOp) -> list[UOp]:
        return [store(rank + OUT_TOP, index), store(rank + OUT_TOP_LOGPROB, (value - log_sum_exp).bitcast(I32))]

    tops = row.likeliest(count.maximum(0), _Tops(row, leaders), emit)
    chosen, rank = _rank(row, leaders, logits, token, flag(count >= 0))
    return [tops, store(OUT_LOGPROB, (chosen - log_sum_exp).bitcast(I32)), store(OUT_RANK, rank)]


def _rank(row: Row, leaders: Leaders, logits: RowSlice, token: UOp, wanted: UOp) -> tuple[UOp, UOp]:
    """(the token's logit, its rank): 1 and the number of ids ahead of it, by raw logit and then by id. The rank is 1
    if it is not wanted."""
    (chosen,) = row.lanes.to_registers([logits.value_of(token)], [F32])

    def is_ahead(value: UOp, index: UOp) -> UOp:
        return (value > chosen) | (value.eq(chosen) & (index < token))

    def count(item: Item, old: State) -> State:
        return [old[0] + flag(item.inside & is_ahead(item.value, item.id))]

    wanted = wanted * flag(token >= 0)
    ahead = row.body.registers(1, I32)
    ahead = ahead.after(ahead.after(*row.lanes.axes)[0].store(0))
    branch = row.lanes.only_if(wanted)
    (counted,) = row.lanes.reduce(ONE, logits, (0,), count, combine_sum, branch)
    ahead = ahead.after(ahead.after(branch)[0].store(counted).end(branch))[0].load()
    if row.spec.is_processed:
        return chosen, ahead + 1
    # add the suppressed ids, whose place in the logits now holds -inf
    total = row.body.registers(1, I32)
    total = total.after(total.after(*row.lanes.axes)[0].store(ahead + 1))
    slot = row.body.fold_while(wanted * MAX_STOP_IDS)
    suppressed = row.suppressed_id(slot.cast(dtypes.weakint))
    more = total.after(slot)[0].load()
    for split in range(leaders.num_splits):
        logit = leaders.number(split, slot.cast(dtypes.weakint) + SUPPRESSED)
        more = more + flag(is_ahead(logit, suppressed))
    return chosen, total.after(total.after(slot)[0].store(more).end(slot))[0].load()
