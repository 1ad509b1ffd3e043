"""Locally typical sampling (Meister et al. 2022, sec. 4), a part of logits processing: ids that a row does not keep
become -inf before the row is sampled.

Of the ids that min-p, top-k and top-p keep, those whose surprise is nearest to the entropy are kept, until they hold
typical_p of the mass. Thresholds are found by bisection over the bits of a weight, one pass for each bit, so ties at a
threshold are all kept. Rows that do not ask for it only read their settings.
"""

from __future__ import annotations

from collections.abc import Callable

from tinygrad import UOp

from tinyvllm.ops.kernel.body import F32, I32, LOWEST
from tinyvllm.ops.sampling.filters import MIN_EXPONENT, Softmax
from tinyvllm.ops.sampling.reduction import Item, RowSlice, State, combine_max, combine_sum, flag
from tinyvllm.ops.sampling.row_filter import IsKept, filter_kernel
from tinyvllm.ops.sampling.sample import ONE, Row, is_typical

BISECTION_STEPS = 31  # weights lie in [0, 1]: positive floats are ordered like their 31 bits
ABOVE_ONE_BITS = 0x3F800001  # the bits after those of 1.0f
MAX_DISTANCE = 128.0  # bits: larger than the distance of any two exponents that exp2 can distinguish


class _TypicalFilter:
    """The search for the ids that one row keeps."""

    def __init__(self, row: Row, values: RowSlice, wanted: UOp) -> None:
        self._row, self._values, self._wanted = row, values, wanted

        def larger(item: Item, old: State) -> State:
            return [(item.inside & (item.value > old[0])).where(item.value, old[0])]

        reduced = row.lanes.reduce(wanted, values, (LOWEST,), larger, combine_max)
        (best,) = row.lanes.to_registers(reduced, [F32])
        self._softmax: Softmax = row.softmax(best)

    def rule(self) -> IsKept:
        """A function that says whether a logit is kept.

        With p = w / Z and x = log2 w, surprise minus entropy is (log2 Z - x) - (log2 Z - sum(p * x)): the distance of
        x from its mean."""
        row, softmax, floor = self._row, self._softmax, self._floor()

        def exponent(value: UOp) -> UOp:
            return ((value - softmax.max_logit) * softmax.scale).maximum(MIN_EXPONENT)

        def add(item: Item, old: State) -> State:
            weight = self._weight(item.value, item.inside)
            kept = (weight >= floor).where(weight, 0.0)
            return [old[0] + kept, old[1] + (weight > 0.0).where(kept * exponent(item.value), 0.0)]

        total, moment = row.lanes.reduce(self._wanted, self._values, (0.0, 0.0), add, combine_sum)
        target, mean = row.lanes.to_registers(
            [total * row.number("typical_p"), moment / total.maximum(1e-30)], [F32, F32]
        )

        def distance(value: UOp) -> UOp:
            gap = exponent(value) - mean
            return gap.maximum(gap * -1.0) * (1.0 / MAX_DISTANCE)

        def is_near(value: UOp, weight: UOp, threshold: UOp) -> UOp:
            return (weight >= floor) & (distance(value) < threshold)

        def is_short(threshold: UOp, iteration: UOp) -> UOp:
            return self._measure(lambda value, weight: is_near(value, weight, threshold), iteration)[1] < target

        # the largest threshold below which the mass is less than the target: the distance of the last id that is needed
        (threshold,) = row.lanes.to_registers([self._bisect(self._wanted, is_short)], [F32])
        return lambda value: (self._weight(value) >= floor) & (value > LOWEST) & (distance(value) <= threshold)

    def _weight(self, value: UOp, inside: UOp | None = None) -> UOp:
        """0 for -inf and NaN."""
        counts = value > LOWEST if inside is None else inside & (value > LOWEST)
        return counts.where(self._softmax.weight(value), 0.0)

    def _floor(self) -> UOp:
        """The smallest weight that min-p, top-k and top-p keep."""
        row, to_registers = self._row, self._row.lanes.to_registers
        floor, top_k, top_p = row.number("min_p"), row.param("top_k"), row.number("top_p")
        lowest = floor
        uses_k = self._wanted * flag(top_k > 0)
        kth = self._bisect(uses_k, lambda t, it: self._measure(lambda v, w: (w >= t) & (w >= lowest), it)[0] >= top_k)
        (floor,) = to_registers([floor.maximum(kth)], [F32])
        uses_p, reached = self._wanted * flag(top_p < 1.0), floor
        total = self._measure(lambda v, w: w >= reached, wanted=uses_p)[1]
        (target,) = to_registers([total * top_p], [F32])
        last = self._bisect(uses_p, lambda t, it: self._measure(lambda v, w: w >= t.maximum(reached), it)[1] >= target)
        (floor,) = to_registers([floor.maximum(last)], [F32])
        return floor

    def _measure(self, is_counted: Callable[[UOp, UOp], UOp], *after: UOp, wanted: UOp = ONE) -> State:
        """(number of ids, their mass), of those for which `is_counted(logit, weight)` holds."""

        def step(item: Item, old: State) -> State:
            weight = self._weight(item.value, item.inside)
            counts = item.inside & is_counted(item.value, weight)
            return [old[0] + flag(counts), old[1] + counts.where(weight, 0.0)]

        return self._row.lanes.reduce(wanted, self._values, (0, 0.0), step, combine_sum, *after)

    def _bisect(self, wanted: UOp, holds: Callable[[UOp, UOp], UOp]) -> UOp:
        """The largest float t in [0, 1] for which `holds(t, iteration)`; 0 if the search is not wanted."""
        body, lanes = self._row.body, self._row.lanes
        low, high = body.registers(1, I32), body.registers(1, I32)
        start = UOp.group(low.after(*lanes.axes)[0].store(0), high.after(*lanes.axes)[0].store(ABOVE_ONE_BITS))
        low, high = low.after(start), high.after(start)
        step = body.fold_while(wanted * BISECTION_STEPS)
        a, b = low.after(step)[0].load(), high.after(step)[0].load()
        (middle,) = lanes.to_registers([(a + b) >> 1], [I32], step, start)
        (is_low,) = lanes.to_registers([flag(holds(middle.bitcast(F32), step))], [I32], step)
        stores = UOp.group(
            low.after(step)[0].store((is_low > 0).where(middle, a)),
            high.after(step)[0].store((is_low > 0).where(b, middle)),
        )
        return low.after(stores.end(step))[0].load().bitcast(F32)


typical_kernel = filter_kernel("typical", is_typical, lambda *row: _TypicalFilter(*row).rule())
