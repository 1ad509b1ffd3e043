"""Which ids min-p, top-k and top-p keep, found without a threshold: an id is drawn first, and then asked for.

Of weights w (the likeliest has 1), an id is kept if w >= min_p, fewer than top_k ids have more than w, and those that
do hold less than top_p of what is left of the mass: so whatever is likelier than a kept id is kept, and ties are kept
together. The race (see sample.py) among all ids has a winner. If it is kept, it is the winner among the kept ids too;
if it is not, neither is what is no likelier than it, and the race is run again among the others. The winner among
weights above a bound holds a uniform share of their mass above itself, so that a row rejects ln(1 / kept mass) times on
average: 0.1 times at top_p 0.9, 12 times where one of 128,000 equal ids is kept. A look at an id is one pass.

Where both top-k and top-p cut, the second wants the mass that the first leaves. It lies between what was seen above
logits on either side of the k-th; only where that does not settle the question yet are logits between them looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tinygrad import UOp

from tinyvllm.ops.kernel.body import F32, I32, LOG2E, LOWEST, U32, exp2, log2
from tinyvllm.ops.sampling.passes import Carried, Item, Lanes, Slice, State, added, first_best, flag

COLDEST = 1e-6  # temperatures below are this one, as good as greedy: the reciprocal must stay finite
FAINTEST = -126.0  # log2 of the smallest weight that `exp2` gives
# of a row. Some tens at most are to be expected; a row that needed more would get the likeliest id, kept in any case
MAX_TURNS = 160
START, LOOK, NARROW = 0, 1, 2  # a turn looks above nothing, above the token, or between the k-th's neighbours
NO_LIMIT = 0x7FFFFFFF


@dataclass(frozen=True)
class Heat:
    """What makes weights of a row's logits."""

    best: UOp  # the largest logit
    scale: UOp  # LOG2E / temperature

    def weight(self, logit: UOp) -> UOp:
        return exp2((logit - self.best) * self.scale)


def scale_of(temperature: UOp) -> UOp:
    return temperature.maximum(COLDEST).reciprocal() * LOG2E


def noise_key(seed: UOp, draw: UOp) -> UOp:
    """What a request's `draw`-th token hashes its ids with."""
    return mix32(seed.bitcast(U32) + mix32(draw.bitcast(U32) + 0x9E3779B9))


def noise_of(key: UOp, index: UOp) -> UOp:
    """1 / E of an id: the race is won by the largest weight * noise."""
    bits = mix32(index.cast(U32) * 0x9E3779B9 + key)
    # 23 bits: the largest u is 1 - 2**-24, a float, so that E is never 0
    uniform = ((bits >> 9).cast(I32).cast(F32) + 0.5) * 2.0**-23
    return (log2(uniform) * -1.0).reciprocal()


def mix32(x: UOp) -> UOp:
    """MurmurHash3's 32-bit finaliser (Appleby, public domain): a bijection that mixes every bit into every other."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@dataclass(frozen=True)
class Cuts:
    """A row's settings."""

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


class KeptRace:
    """The race among the ids that a row keeps."""

    def __init__(self, lanes: Lanes, runs: Sequence[Slice], heat: Heat, cuts: Cuts) -> None:
        self._lanes, self._runs, self._heat, self._cuts = lanes, runs, heat, cuts

    def _look(self, wanted: UOp, bound: UOp, *after: UOp) -> State:
        """Of the logits above `bound` that are likely enough for min-p: how many they are, their mass, and the race's
        winner with its score, the score first."""

        def step(item: Item, old: State) -> State:
            assert item.beside is not None
            weight = self._heat.weight(item.value)
            counts = item.inside & (item.value > bound) & (weight >= self._cuts.min_p)  # a NaN is above nothing
            score = weight * item.beside
            is_better = counts & (score > old[2])
            more = [old[0] + flag(counts), old[1] + counts.where(weight, 0.0)]
            return [*more, is_better.where(score, old[2]), is_better.where(item.id, old[3])]

        def combine(a: State, b: State) -> State:
            return [*added(a[:2], b[:2]), *first_best(a[2:], b[2:])]

        found = self._lanes.fold(wanted, self._runs, (0, 0.0, 0.0, -1), step, combine, *after)
        return self._lanes.keep(found, [I32, F32, F32, I32], *after)

    def run(self, wanted: UOp, winner: UOp, mass: UOp, greedy: UOp) -> UOp:
        """The winner among the kept ids, where `wanted` (int32 0 or 1); else `winner`, who won among all, whose `mass`
        is known. `greedy`: the likeliest id."""
        lanes, cuts, heat = self._lanes, self._cuts, self._heat
        value = logit_of(self._runs, winner)
        # what min-p leaves is known only where it leaves everything
        begins_anew = (heat.weight(value) < cuts.min_p) | (cuts.has_p & (cuts.min_p > 0.0))
        is_open = cuts.has_k | cuts.has_p | begins_anew
        state = Carried(
            lanes,
            is_open=(I32, flag(is_open)),
            turns=(I32, UOp.const(MAX_TURNS, I32)),
            turn=(I32, begins_anew.where(UOp.const(START, I32), UOp.const(LOOK, I32))),
            token=(I32, winner),
            next=(I32, winner),  # whom the race has instead of the token, if that is rejected
            above=(F32, UOp.const(0.0, F32)),  # the mass above the token
            # logits on either side of the k-th, and the mass above them: top-k keeps no more, and no less
            low=(F32, heat.best + FAINTEST / heat.scale),
            high=(F32, heat.best),
            num_low=(F32, UOp.const(float(sum(run.span for run in self._runs)), F32)),  # how many logits are above
            num_high=(F32, UOp.const(0.0, F32)),
            most=(F32, mass),
            least=(F32, cuts.has_k.where(UOp.const(0.0, F32), mass)),
        )
        (opened,) = lanes.keep([wanted * flag(is_open)], [I32])
        # around no other loop: tinygrad takes the end of this one for the end of those too. So a row that cuts nothing
        # takes a turn as well, whose pass has no length
        again = lanes.body.repeat()
        done = state.write(self._take_turn(state, opened, again), again)
        goes_on = (opened > 0) & (state.read("is_open", done) > 0) & (state.read("turns", done) > 0)
        done = done.end(again, goes_on)
        token = state.read("is_open", done).eq(0).where(state.read("token", done), greedy)
        return (opened > 0).where(token, winner)

    def _take_turn(self, state: Carried, wanted: UOp, *loops: UOp) -> dict[str, UOp]:
        """Look above one logit, and say what follows."""
        lanes, cuts = self._lanes, self._cuts

        def old(name: str) -> UOp:
            return state.read(name, *loops)

        is_start, is_narrow = old("turn").eq(START), old("turn").eq(NARROW)
        middle = self._between(old)
        own = logit_of(self._runs, old("token"))
        pivot = is_start.where(UOp.const(LOWEST, F32), is_narrow.where(middle, own))
        (pivot,) = lanes.keep([pivot], [F32], *loops)
        count, mass, _, winner = self._look(wanted, pivot, *loops)

        # what was seen says on which side of the k-th the pivot is, and so what top-k leaves
        limit = cuts.has_k.where(cuts.top_k, NO_LIMIT)
        is_within = (count < limit) & is_start.ne(True)
        low = is_within.where(old("low"), old("low").maximum(pivot))
        high = is_within.where(old("high").minimum(pivot), old("high"))
        most = is_within.where(old("most"), is_start.where(mass, old("most").minimum(mass)))
        weight = is_narrow.where(UOp.const(0.0, F32), self._heat.weight(pivot))  # a token within is one of the k
        least = is_within.where(old("least").maximum(mass + weight).minimum(most), old("least"))
        is_empty = (middle <= old("low")) | (middle >= old("high"))  # no logit is between the two
        is_known = count.eq(limit) | (is_narrow & is_empty) | (is_start & cuts.has_k.ne(True))
        least = is_known.where(most, least)
        num = count.cast(F32)
        num_low = (is_within.ne(True) & (low > old("low"))).where(num, old("num_low"))
        num_high = (is_within & (high < old("high"))).where(num, old("num_high"))

        above = is_narrow.where(old("above"), mass)
        is_in_k = is_narrow | is_within
        is_kept = is_in_k & (cuts.has_p.ne(True) | (above < cuts.top_p * least))
        is_rejected = is_kept.ne(True) & (is_in_k.ne(True) | (above >= cuts.top_p * most))
        is_done = is_kept | (is_start & (cuts.has_k | cuts.has_p).ne(True))
        runner_up = is_narrow.where(old("next"), winner)
        return {
            "is_open": flag(is_done.ne(True)),
            "turns": old("turns") - 1,
            "turn": (is_start | is_rejected).where(UOp.const(LOOK, I32), UOp.const(NARROW, I32)),
            "token": (is_start | is_rejected).where(runner_up, old("token")),
            "next": runner_up,
            "above": above,
            "low": low,
            "high": high,
            "num_low": num_low,
            "num_high": num_high,
            "most": most,
            "least": least,
        }

    def _between(self, old: Callable[[str], UOp]) -> UOp:
        """A logit between the k-th's neighbours: where it would be if the logarithm of how many are above a logit fell
        evenly, but never nearer than an eighth to either of them."""
        high, low = (log2(old(name) + 0.5) for name in ("num_high", "num_low"))
        share = (log2(self._cuts.top_k.maximum(1).cast(F32)) - high) / (low - high).maximum(1e-3)
        return old("high") - (old("high") - old("low")) * share.maximum(0.125).minimum(0.875)


def logit_of(runs: Sequence[Slice], token: UOp) -> UOp:
    """A token's logit; that of id 0 for one below."""
    value: UOp | None = None
    for run in runs:
        here = run.value_of(token)
        value = here if value is None else (token >= run.origin).where(here, value)
    assert value is not None
    return value
