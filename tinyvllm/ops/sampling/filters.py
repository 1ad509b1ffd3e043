"""Min-p, top-k and top-p filtering by rejection: a token is sampled first, and then tested.

Let w be the weights, scaled so that the likeliest id has 1. An id is kept if w >= min_p, if fewer than top_k ids have
a larger weight, and if those hold less than top_p of the mass that min-p and top-k leave. So every id likelier than a
kept one is kept, and ties are kept together.

Gumbel-max sampling (see sample.py) over all ids gives a candidate. If it is kept, it is also the sample among the kept
ids, because the maximum over a set is the maximum over any subset that contains it. If it is not kept, no id at most as
likely is kept either, and the next candidate is the maximum over the ids that are likelier. The maximum over the ids
above a threshold leaves a uniformly distributed share of their mass above itself, so a row rejects ln(1 / kept mass)
candidates on average: 0.1 at top_p 0.9, and 12 where one of 128,000 equally likely ids is kept. Each test is one pass
over the row. (FlashInfer samples by rejection too: "Sorting-Free GPU Kernels for LLM Sampling", 2025.)

With both top-k and top-p, the top-p test needs the mass that top-k leaves. The masses above two logits, on either side
of the k-th, bound it. Only where these bounds do not decide the test are logits between the two tried.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tinygrad import UOp

from tinyvllm.ops.kernel.body import F32, I32, LOG2E, LOWEST, U32, exp2, log2
from tinyvllm.ops.sampling.reduction import (
    Item,
    LoopState,
    RowLanes,
    RowSlice,
    State,
    combine_argmax,
    combine_sum,
    flag,
)

MIN_TEMPERATURE = 1e-6  # lower ones are raised to it, which is as good as greedy: the reciprocal must stay finite
MIN_EXPONENT = -126.0  # log2 of the smallest weight that `exp2` returns
# of a row. A few tens at most are expected; a row that needed more would get the likeliest id, which is always kept
MAX_ROUNDS = 160
# what a round's pass finds out: the mass of all ids (where min-p changes it), whether the candidate is kept, or more
# about the k-th largest logit
MEASURE_ALL, TEST, NARROW = 0, 1, 2
NO_LIMIT = 0x7FFFFFFF


@dataclass(frozen=True)
class Softmax:
    """A row's weights: 2 ** ((logit - max_logit) * scale), which are exp(logit / temperature) up to a factor."""

    max_logit: UOp
    scale: UOp  # LOG2E / temperature

    def weight(self, logit: UOp) -> UOp:
        return exp2((logit - self.max_logit) * self.scale)


def softmax_scale(temperature: UOp) -> UOp:
    return temperature.maximum(MIN_TEMPERATURE).reciprocal() * LOG2E


def noise_key(seed: UOp, draw: UOp) -> UOp:
    """The hash key of the noise for a request's `draw`-th token."""
    return mix32(seed.bitcast(U32) + mix32(draw.bitcast(U32) + 0x9E3779B9))


def noise_of(key: UOp, index: UOp) -> UOp:
    """1 / E of an id, with E = -log2(u) exponentially distributed: the largest weight * noise is sampled."""
    bits = mix32(index.cast(U32) * 0x9E3779B9 + key)
    # 23 bits: the largest u is 1 - 2**-24, which is a float, so that E is never 0
    uniform = ((bits >> 9).cast(I32).cast(F32) + 0.5) * 2.0**-23
    return (log2(uniform) * -1.0).reciprocal()


def mix32(x: UOp) -> UOp:
    """MurmurHash3's 32-bit finalizer (Appleby, public domain): a bijection in which every input bit affects every
    output bit."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@dataclass(frozen=True)
class Filters:
    """A row's filter settings."""

    min_p: UOp
    top_k: UOp
    top_p: UOp

    @property
    def has_k(self) -> UOp:
        return self.top_k > 0

    @property
    def has_p(self) -> UOp:
        return self.top_p < 1.0

    @property
    def is_any(self) -> UOp:
        return self.has_k | self.has_p | (self.min_p > 0.0)


class FilteredSampler:
    """Gumbel-max sampling among the ids that a row's filters keep, by rejection."""

    def __init__(self, lanes: RowLanes, logits: RowSlice, softmax: Softmax, filters: Filters) -> None:
        self._lanes, self._logits, self._softmax, self._filters = lanes, logits, softmax, filters

    def sample(self, wanted: UOp, candidate: UOp, mass: UOp, greedy: UOp) -> UOp:
        """The sample among the kept ids where `wanted` (int32 0 or 1) is 1; else `candidate`, the sample among all
        ids, whose `mass` is known. `greedy`: the likeliest id."""
        lanes, filters = self._lanes, self._filters
        is_below_min_p = self._softmax.weight(self._logits.value_of(candidate)) < filters.min_p
        # the mass that min-p leaves is known only where it leaves everything
        starts_over = is_below_min_p | (filters.has_p & (filters.min_p > 0.0))
        is_undecided = filters.has_k | filters.has_p | starts_over
        state = self._initial_state(is_undecided, starts_over, candidate, mass)
        (opened,) = lanes.to_registers([wanted * flag(is_undecided)], [I32])
        # in no other loop: tinygrad takes the end of this loop for the end of those around it. So a row without filters
        # takes one round as well, whose passes have length 0
        again = lanes.body.repeat()
        done = state.write(self._round(state, opened, again), again)
        goes_on = (opened > 0) & (state.read("is_undecided", done) > 0) & (state.read("rounds_left", done) > 0)
        done = done.end(again, goes_on)
        token = state.read("is_undecided", done).eq(0).where(state.read("candidate", done), greedy)
        return (opened > 0).where(token, candidate)

    def _initial_state(self, is_undecided: UOp, starts_over: UOp, candidate: UOp, mass: UOp) -> LoopState:
        softmax, has_k = self._softmax, self._filters.has_k
        return LoopState(
            self._lanes,
            is_undecided=(I32, flag(is_undecided)),
            rounds_left=(I32, UOp.const(MAX_ROUNDS, I32)),
            kind=(I32, starts_over.where(UOp.const(MEASURE_ALL, I32), UOp.const(TEST, I32))),
            candidate=(I32, candidate),
            runner_up=(I32, candidate),  # the next candidate, if this one is rejected
            mass_above=(F32, UOp.const(0.0, F32)),  # the mass above the candidate
            # logits below and above the k-th, how many logits are above each, and the masses above each, which bound
            # the mass that top-k leaves
            low=(F32, softmax.max_logit + MIN_EXPONENT / softmax.scale),
            high=(F32, softmax.max_logit),
            num_above_low=(F32, UOp.const(float(self._logits.span), F32)),
            num_above_high=(F32, UOp.const(0.0, F32)),
            max_mass=(F32, mass),
            min_mass=(F32, has_k.where(UOp.const(0.0, F32), mass)),
        )

    def _round(self, state: LoopState, wanted: UOp, *loops: UOp) -> dict[str, UOp]:
        """Measure what is above one logit, the pivot, and decide: keep the candidate, reject it, or go on."""
        lanes, filters = self._lanes, self._filters

        def old(name: str) -> UOp:
            return state.read(name, *loops)

        measures_all, narrows = old("kind").eq(MEASURE_ALL), old("kind").eq(NARROW)
        middle = self._between(old)
        own = self._logits.value_of(old("candidate"))
        pivot = measures_all.where(UOp.const(LOWEST, F32), narrows.where(middle, own))
        (pivot,) = lanes.to_registers([pivot], [F32], *loops)
        count, mass, _, best_above = self._measure_above(wanted, pivot, *loops)

        # the count says on which side of the k-th logit the pivot is, and so bounds the mass that top-k leaves
        limit = filters.has_k.where(filters.top_k, NO_LIMIT)
        is_within = (count < limit) & measures_all.ne(True)
        low = is_within.where(old("low"), old("low").maximum(pivot))
        high = is_within.where(old("high").minimum(pivot), old("high"))
        max_mass = is_within.where(old("max_mass"), measures_all.where(mass, old("max_mass").minimum(mass)))
        weight = narrows.where(UOp.const(0.0, F32), self._softmax.weight(pivot))  # a candidate within is one of the k
        min_mass = is_within.where(old("min_mass").maximum(mass + weight).minimum(max_mass), old("min_mass"))
        is_empty = (middle <= old("low")) | (middle >= old("high"))  # no logit is between the two
        is_known = count.eq(limit) | (narrows & is_empty) | (measures_all & filters.has_k.ne(True))
        min_mass = is_known.where(max_mass, min_mass)
        num = count.cast(F32)
        num_above_low = (is_within.ne(True) & (low > old("low"))).where(num, old("num_above_low"))
        num_above_high = (is_within & (high < old("high"))).where(num, old("num_above_high"))

        mass_above = narrows.where(old("mass_above"), mass)
        is_in_k = narrows | is_within
        is_kept = is_in_k & (filters.has_p.ne(True) | (mass_above < filters.top_p * min_mass))
        is_rejected = is_kept.ne(True) & (is_in_k.ne(True) | (mass_above >= filters.top_p * max_mass))
        is_done = is_kept | (measures_all & (filters.has_k | filters.has_p).ne(True))
        runner_up = narrows.where(old("runner_up"), best_above)
        return {
            "is_undecided": flag(is_done.ne(True)),
            "rounds_left": old("rounds_left") - 1,
            "kind": (measures_all | is_rejected).where(UOp.const(TEST, I32), UOp.const(NARROW, I32)),
            "candidate": (measures_all | is_rejected).where(runner_up, old("candidate")),
            "runner_up": runner_up,
            "mass_above": mass_above,
            "low": low,
            "high": high,
            "num_above_low": num_above_low,
            "num_above_high": num_above_high,
            "max_mass": max_mass,
            "min_mass": min_mass,
        }

    def _measure_above(self, wanted: UOp, bound: UOp, *after: UOp) -> State:
        """Of the logits above `bound` that min-p keeps: their count, their mass, and the largest score with its id."""

        def step(item: Item, old: State) -> State:
            assert item.noise is not None
            weight = self._softmax.weight(item.value)
            counts = item.inside & (item.value > bound) & (weight >= self._filters.min_p)  # a NaN is above nothing
            score = weight * item.noise
            is_better = counts & (score > old[2])
            sums = [old[0] + flag(counts), old[1] + counts.where(weight, 0.0)]
            return [*sums, is_better.where(score, old[2]), is_better.where(item.id, old[3])]

        def combine(a: State, b: State) -> State:
            return [*combine_sum(a[:2], b[:2]), *combine_argmax(a[2:], b[2:])]

        found = self._lanes.reduce(wanted, self._logits, (0, 0.0, 0.0, -1), step, combine, *after)
        return self._lanes.to_registers(found, [I32, F32, F32, I32], *after)

    def _between(self, old: Callable[[str], UOp]) -> UOp:
        """A logit between `low` and `high`: where the k-th would be if the logarithm of the count above a logit fell
        linearly between them, but at least an eighth of their distance away from either."""
        high, low = (log2(old(name) + 0.5) for name in ("num_above_high", "num_above_low"))
        share = (log2(self._filters.top_k.maximum(1).cast(F32)) - high) / (low - high).maximum(1e-3)
        return old("high") - (old("high") - old("low")) * share.maximum(0.125).minimum(0.875)
