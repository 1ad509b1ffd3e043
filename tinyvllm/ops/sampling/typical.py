"""Locally typical sampling (Meister et al. 2022), after logits processing: what a row cuts becomes -inf.

Of what min-p, top-k and top-p keep, the ids are kept whose surprise is nearest to the entropy, until they hold
typical_p of the mass. Thresholds are found by bisection over the bits of a weight, a pass each, so ties at one are all
kept. Rows that do not ask for it cost the look at their settings.
"""

from __future__ import annotations

from collections.abc import Callable

from tinygrad import UOp, dtypes
from tinygrad.uop.ops import Ops

from tinyvllm.config import MAX_STOP_IDS
from tinyvllm.ops.kernel.body import F32, I32, LOWEST, NEG_INF, Body, KernelFn, cached_kernel, finish
from tinyvllm.ops.sampling.keep import Heat
from tinyvllm.ops.sampling.passes import Item, Slice, State, added, flag, largest
from tinyvllm.ops.sampling.sample import ONE, ROW_LANES, Row, SampleSpec, is_typical

BISECTION_STEPS = 31  # weights lie in [0, 1]: positive floats order as their 31 bits do
ABOVE_ONE_BITS = 0x3F800001  # the bits behind 1.0f
FARTHEST = 128.0  # bits: no two weights that exp2 tells apart are as far from each other


@cached_kernel
def typical_kernel(spec: SampleSpec) -> KernelFn:
    """fn(logits, inputs): in rows that want typical_p, -inf for every id that they do not keep, the ids that
    min_tokens holds back among them."""

    def kernel(logits: UOp, inputs: UOp) -> UOp:
        body = Body()
        row = Row(spec, body, inputs, num_parts=1, num_threads=ROW_LANES)
        wanted = flag(is_typical(row))
        ready = logits.after(_hold_back(row, logits, wanted))
        (run,) = row.runs([ready], spec.widths)
        cut = _TypicalRow(row, run, wanted)
        is_kept = cut.rule()
        stores = _cut(row, run, wanted, is_kept)
        name = f"typical_{spec.layout.num_seqs}x{spec.vocab_size}"
        return finish(stores.end(*reversed(row.lanes.axes)), name, nbytes=4 * spec.layout.num_seqs)

    return kernel


def _hold_back(row: Row, logits: UOp, wanted: UOp) -> UOp:
    """-inf over the ids that are suppressed, in front of all threads' reading."""
    thread, width = row.lanes.thread, row.spec.widths[0]
    slot = row.body.fold_while(wanted * MAX_STOP_IDS)
    token = row.held_id(slot.cast(dtypes.weakint))
    is_used = (token >= 0) & (token < row.spec.vocab_size)
    index = row.axis * width + token.maximum(0).minimum(row.spec.vocab_size - 1).cast(dtypes.weakint)
    if thread is not None:
        is_used = is_used & thread.eq(0)
    done = logits.after(*row.lanes.axes)[index.valid(is_used)].store(NEG_INF).end(slot)
    return done if thread is None else UOp(Ops.BARRIER, src=(done,))


def _cut(row: Row, run: Slice, wanted: UOp, is_kept: Callable[[UOp], UOp]) -> UOp:
    """Store -inf over what is not kept."""
    lanes = row.lanes
    chunks = max(2, -(-run.span // (lanes.count * lanes.width)))
    chunk = row.body.fold_while(wanted * chunks)
    lane = lanes.thread if lanes.thread is not None else row.body.loop(lanes.count)
    place, stores = chunk.cast(dtypes.weakint) * lanes.count + lane, []
    for item in run.items(place, lanes.width, chunks * lanes.count):
        assert item.at is not None
        stores.append(run.buffer[item.at.valid(item.inside & is_kept(item.value).ne(True))].store(NEG_INF))
    done = UOp.group(*stores)
    return done.end(chunk) if lanes.thread is not None else done.end(lane, chunk)


class _TypicalRow:
    """The search for what one row keeps."""

    def __init__(self, row: Row, run: Slice, wanted: UOp) -> None:
        self._row, self._run, self._wanted = row, run, wanted

        def larger(item: Item, old: State) -> State:
            return [(item.inside & (item.value > old[0])).where(item.value, old[0])]

        (best,) = row.lanes.keep(row.lanes.fold(wanted, [run], (LOWEST,), larger, largest), [F32])
        self._heat: Heat = row.heat(best)

    def rule(self) -> Callable[[UOp], UOp]:
        """Which logits are kept.

        With p = w / Z and log2 w = x, surprise less entropy is (log2 Z - x) - (log2 Z - sum(p * x)): how far x is from
        its mean."""
        row, heat, floor = self._row, self._heat, self._floor()

        def exponent(value: UOp) -> UOp:
            return ((value - heat.best) * heat.scale).maximum(-126.0)

        def add(item: Item, old: State) -> State:
            weight = self._weight(item.value, item.inside)
            kept = (weight >= floor).where(weight, 0.0)
            return [old[0] + kept, old[1] + (weight > 0.0).where(kept * exponent(item.value), 0.0)]

        total, moment = row.lanes.fold(self._wanted, [self._run], (0.0, 0.0), add, added)
        target, mean = row.lanes.keep([total * row.number("typical_p"), moment / total.maximum(1e-30)], [F32, F32])

        def distance(value: UOp) -> UOp:
            gap = exponent(value) - mean
            return gap.maximum(gap * -1.0) * (1.0 / FARTHEST)

        def is_near(value: UOp, weight: UOp, edge: UOp) -> UOp:
            return (weight >= floor) & (distance(value) < edge)

        # the largest edge in front of which the mass is missed lies at the last id that is needed
        edge = self._bisect(self._wanted, lambda t, it: self._measure(lambda v, w: is_near(v, w, t), it)[1] < target)
        (edge,) = row.lanes.keep([edge], [F32])
        return lambda value: (self._weight(value) >= floor) & (value > LOWEST) & (distance(value) <= edge)

    def _weight(self, value: UOp, inside: UOp | None = None) -> UOp:
        """0 for -inf and NaN."""
        counts = value > LOWEST if inside is None else inside & (value > LOWEST)
        return counts.where(self._heat.weight(value), 0.0)

    def _floor(self) -> UOp:
        """The smallest weight that min-p, top-k and top-p keep."""
        row, keep = self._row, self._row.lanes.keep
        floor, top_k, top_p = row.number("min_p"), row.param("top_k"), row.number("top_p")
        lowest = floor
        uses_k = self._wanted * flag(top_k > 0)
        kth = self._bisect(uses_k, lambda t, it: self._measure(lambda v, w: (w >= t) & (w >= lowest), it)[0] >= top_k)
        (floor,) = keep([floor.maximum(kth)], [F32])
        uses_p, reached = self._wanted * flag(top_p < 1.0), floor
        total = self._measure(lambda v, w: w >= reached, wanted=uses_p)[1]
        (target,) = keep([total * top_p], [F32])
        edge = self._bisect(uses_p, lambda t, it: self._measure(lambda v, w: w >= t.maximum(reached), it)[1] >= target)
        (floor,) = keep([floor.maximum(edge)], [F32])
        return floor

    def _measure(self, is_counted: Callable[[UOp, UOp], UOp], *after: UOp, wanted: UOp = ONE) -> State:
        """(how many ids, their mass), of those whose (logit, weight) is counted."""

        def step(item: Item, old: State) -> State:
            weight = self._weight(item.value, item.inside)
            counts = item.inside & is_counted(item.value, weight)
            return [old[0] + flag(counts), old[1] + counts.where(weight, 0.0)]

        return self._row.lanes.fold(wanted, [self._run], (0, 0.0), step, added, *after)

    def _bisect(self, wanted: UOp, holds: Callable[[UOp, UOp], UOp]) -> UOp:
        """The largest float t in [0, 1] for which `holds(t, iteration)`; 0 where the search is not wanted."""
        body, lanes = self._row.body, self._row.lanes
        low, high = body.registers(1, I32), body.registers(1, I32)
        start = UOp.group(low.after(*lanes.axes)[0].store(0), high.after(*lanes.axes)[0].store(ABOVE_ONE_BITS))
        low, high = low.after(start), high.after(start)
        step = body.fold_while(wanted * BISECTION_STEPS)
        a, b = low.after(step)[0].load(), high.after(step)[0].load()
        (middle,) = lanes.keep([(a + b) >> 1], [I32], step, start)
        (is_held,) = lanes.keep([flag(holds(middle.bitcast(F32), step))], [I32], step)
        stores = UOp.group(
            low.after(step)[0].store((is_held > 0).where(middle, a)),
            high.after(step)[0].store((is_held > 0).where(b, middle)),
        )
        return low.after(stores.end(step))[0].load().bitcast(F32)
