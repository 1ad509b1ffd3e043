"""How many tokens to draft: as many as raise the tokens per second, by measured acceptance and measured step times.

A step of B sequences with D drafts has B + D rows and takes T(B + D) seconds. It yields B tokens, and one more for each
accepted draft. If a request's first draft is accepted with probability p, and each later one with probability q once
the one before it was, then its j-th draft adds p * q**(j - 1) tokens on average; with p = q, the sum is that of
Leviathan et al. 2023, eq. 1. For each size of a step, the drafts with the largest such gains over all requests are
taken. Of all sizes, plain decoding among them, the rule chooses the one with the most expected tokens per second. So
nothing is drafted where a batch is so large that its rows cost time, where little is accepted, or where drafting is
slow.

p and q are estimated for each request, with a decay, and start at the estimates over all requests. T is measured too: a
size that was not run yet is extrapolated from those with drafts, but only up to twice the largest one that was.

A budget bounds the loss whatever the estimates say. Every step adds `EARNED_SHARE` of a plain step's time to it; a step
with drafts adds what it gained over plain decoding, or takes what it lost. No step may have drafts whose loss, should
none of them be accepted, would exceed the budget. If drafts are off, and nothing else shows whether they would be
accepted by now, the budget also pays for probes.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from statistics import median

import numpy as np

from tinyvllm.config import SpeculativeConfig
from tinyvllm.scheduling.drafts import AlwaysDraft, Drafter, DraftRule
from tinyvllm.scheduling.plan import StepPlan
from tinyvllm.scheduling.request import MAX_REDONE, Request

MOST_SAMPLES = 5  # of a size, the latest: their median ignores a step that something else delayed
MOST_AGE = 1000  # steps after which a size that was not run again is unknown: contexts have grown
LEAST_GAIN = 0.02  # by which drafts must raise the tokens per second: less is within the noise
EARNED_SHARE = 0.03  # of each step's time: what drafts may cost if they are never accepted
FIRST_BUDGET, MOST_BUDGET = 4.0, 16.0  # plain steps
KEPT, KEPT_OF_ALL = 0.85, 0.98  # of the counts, from one draft to the next: a request's, and all requests'
PRIOR = 1.5  # drafts: the weight of all requests' estimate in that of each
QUIET_STEPS = 8  # without a look at drafts in a large batch, after one that found none worth it
FEW_SEQS = 4  # a batch of at most so many is looked at in every step
PROBE_STEPS = 32  # at least, between two probes


def make_rule(config: SpeculativeConfig, drafter: Drafter, verify_sizes: Sequence[int]) -> DraftRule:
    """The rule that `config` asks for. verify_sizes: as MeasuredRule's."""
    if not config.adaptive:
        return AlwaysDraft(config.disable_by_batch_size)
    return MeasuredRule(config.num_drafts, verify_sizes, is_free=drafter.is_free, max_seqs=config.disable_by_batch_size)


class MeasuredRule:
    """Owns the estimates of acceptance, the measured step times, and the budget. Times are in seconds."""

    def __init__(
        self, num_tokens: int, verify_sizes: Sequence[int], *, is_free: bool, max_seqs: int | None = None
    ) -> None:
        """num_tokens: of a draft, at most. verify_sizes: the rows of the graphs for steps with drafts, ascending.
        is_free: drafts that are not verified are compared with the output anyway (`foreseen`), so no probes are needed.
        max_seqs: no drafts while so many sequences decode."""
        self.num_tokens = num_tokens
        self.budget = FIRST_BUDGET
        self.is_hopeless = True  # in the latest batch, drafts would not pay even if all were accepted
        self._sizes = tuple(verify_sizes)
        self._is_free = is_free
        self._max_seqs = max_seqs
        self._all = Acceptance()
        self._each: dict[Request, Acceptance] = {}
        self._times = StepTimes()
        self._num_seqs = 0  # of the batch that `wants` was asked about
        self._asked: tuple[int, int] | None = None  # the step and the batch that `_answer` is for
        self._answer = False
        self._quiet_until = 0  # step
        self._options_for: tuple[int, int] | None = None  # the step and the batch of `_known_options`
        self._known_options: list[tuple[int, float]] = []
        self._probed = 0  # step: the latest with drafts
        self._has_missed = False  # the step to come is such a one

    def wants(self, requests: Sequence[Request]) -> bool:
        """See DraftRule. The answer for a step is kept, as two callers ask."""
        decoding = [request for request in requests if request.output_ids]
        self._num_seqs = len(decoding)
        asked = self._times.num_steps, len(decoding)
        if asked != self._asked:
            self._asked, self._answer = asked, self._look(decoding)
        return self._answer

    def _look(self, decoding: Sequence[Request]) -> bool:
        num_seqs = len(decoding)
        if not num_seqs or (self._max_seqs is not None and num_seqs >= self._max_seqs):
            self.is_hopeless = True
            return False
        if self._times.num_steps < self._quiet_until:
            return False
        options = self._options(num_seqs)
        plain_s = self._times.plain_s(num_seqs)
        most = num_seqs * (self.num_tokens + 1)
        self.is_hopeless = plain_s is None or not any(
            min(size, most) * plain_s > num_seqs * seconds for size, seconds in options
        )
        if self.is_hopeless or not any(self._choose(decoding, [self.num_tokens] * num_seqs)):
            self._quiet_until = self._times.num_steps + (QUIET_STEPS if num_seqs > FEW_SEQS else 0)
            return False
        return True

    def counts(self, requests: Sequence[Request], limits: Sequence[int]) -> list[int]:
        return self._choose(requests, limits)

    def settled(self, request: Request, num_drafted: int, num_accepted: int) -> None:
        self.budget = min(MOST_BUDGET, self.budget + num_accepted / max(1, self._times.latest_seqs))
        self.foreseen(request, num_drafted, num_accepted)

    def foreseen(self, request: Request, num_drafted: int, num_accepted: int) -> None:
        """So many of the tokens that would have been drafted were those that came."""
        self._all.add(num_drafted, num_accepted, KEPT_OF_ALL)
        self._each.setdefault(request, Acceptance()).add(num_drafted, num_accepted, KEPT)

    def missed(self) -> None:
        """The next step could not overlap with the one before it, because drafts were wanted, but has none."""
        self._has_missed = True

    def note_step(self, plan: StepPlan, num_rows: int, seconds: float) -> None:
        is_pure = all(entry.samples and entry.count - len(entry.drafts) <= MAX_REDONE for entry in plan.entries)
        num_seqs = len(plan.entries)
        if not is_pure or not num_seqs:
            self._times.num_steps += 1  # a prompt's step, whose time says nothing about drafts
            return
        plain_s = self._times.plain_s(num_seqs)
        if plain_s is not None:
            self.budget += EARNED_SHARE * seconds / plain_s
        if plan.num_drafts:
            self._probed = self._times.num_steps
            self._times.note_verified(self._size(plan.num_tokens), num_seqs, seconds)
        elif self._has_missed:
            self._times.num_steps += 1
        else:
            self._times.note_plain(num_rows, num_seqs, seconds)
        if plain_s is not None and (plan.num_drafts or self._has_missed):
            self.budget -= seconds / plain_s - 1.0  # `settled` adds what was accepted
        self._has_missed = False
        self.budget = min(MOST_BUDGET, self.budget)

    def forget(self, request: Request) -> None:
        self._each.pop(request, None)

    def _acceptance(self, request: Request) -> Acceptance:
        """What is known of a request. Nothing is kept of one whose drafts were never compared with anything."""
        return self._each.get(request, UNKNOWN)

    def _size(self, num_rows: int) -> int:
        """The rows of the graph for so many."""
        return next((size for size in self._sizes if size >= num_rows), num_rows)

    def _options(self, num_seqs: int) -> list[tuple[int, float]]:
        """The sizes of a step with drafts whose times are known or can be extrapolated, and these times. They are kept
        for the step, since they are needed up to three times."""
        asked = self._times.num_steps, num_seqs
        if asked != self._options_for:
            self._options_for = asked
            self._known_options = self._times.options(self._sizes, num_seqs)
        return self._known_options

    def _choose(self, requests: Sequence[Request], limits: Sequence[int]) -> list[int]:
        """The number of drafts of each request with the most expected tokens per second."""
        num_seqs = max(self._num_seqs, len(requests))
        plain_s = self._times.plain_s(num_seqs)
        if plain_s is None or not requests:
            return [0] * len(requests)
        owners, gains = self._gains(requests, limits)
        totals = [0.0, *accumulate(gains)]
        best, chosen = (1.0 + LEAST_GAIN) * num_seqs / plain_s, 0
        cheapest = 0
        for size, seconds in self._options(num_seqs):
            num_drafts = min(size - num_seqs, len(gains))
            if seconds / plain_s - 1.0 > self.budget or not num_drafts:
                continue
            cheapest = cheapest or num_drafts
            rate = (num_seqs + totals[num_drafts]) / seconds
            if rate > best:
                best, chosen = rate, num_drafts
        if not chosen and cheapest and self._is_time_to_probe():
            return self._probe(requests, limits, cheapest)
        counts = [0] * len(requests)
        for owner in owners[:chosen]:
            counts[owner] += 1
        return counts

    def _gains(self, requests: Sequence[Request], limits: Sequence[int]) -> tuple[list[int], list[float]]:
        """All possible drafts, the largest gain first: the place of its request, and the tokens that it adds."""
        most = max(1, max(limits))
        shares = [self._acceptance(request).estimate(self._all) for request in requests]
        first, later = np.array(shares).reshape(-1, 2, 1).swapaxes(0, 1)
        places = np.arange(most)
        gains = np.where(places < np.array(limits)[:, None], first * later**places, -1.0).ravel()
        order = np.argsort(-gains, kind="stable")[: int((gains >= 0.0).sum())]
        return (order // most).tolist(), gains[order].tolist()

    def _is_time_to_probe(self) -> bool:
        return not self._is_free and self._times.num_steps - self._probed >= PROBE_STEPS

    def _probe(self, requests: Sequence[Request], limits: Sequence[int], num_drafts: int) -> list[int]:
        """Draft for one request: of those that may have drafts, the one about which the least is known."""
        able = [place for place, limit in enumerate(limits) if limit > 0]
        least = min(able, key=lambda place: self._acceptance(requests[place]).first.num_tried)
        return [min(limit, num_drafts) if place == least else 0 for place, limit in enumerate(limits)]


@dataclass
class Share:
    """A decayed count of what was tried, and of what succeeded."""

    num_tried: float = 0.0
    num_right: float = 0.0

    def add(self, num_tried: int, num_right: int, kept: float) -> None:
        self.num_tried = kept * self.num_tried + num_tried
        self.num_right = kept * self.num_right + num_right

    def estimate(self, prior: float) -> float:
        return (self.num_right + PRIOR * prior) / (self.num_tried + PRIOR)


@dataclass
class Acceptance:
    """How often a first draft is accepted, and how often a later one once the one before it was."""

    first: Share = field(default_factory=Share)
    later: Share = field(default_factory=Share)

    def add(self, num_drafted: int, num_accepted: int, kept: float) -> None:
        self.first.add(1, min(num_accepted, 1), kept)
        if num_accepted and num_drafted > 1:
            num_tried = num_accepted if num_accepted < num_drafted else num_accepted - 1
            self.later.add(num_tried, num_accepted - 1, kept)

    def estimate(self, everyone: Acceptance) -> tuple[float, float]:
        """Both probabilities. `everyone`: over all requests, which starts at a half. What is not known of later drafts
        is taken to be as for first ones: else single drafts, which say nothing of later ones, would stay single."""
        prior = everyone.first.estimate(0.5)
        return self.first.estimate(prior), self.later.estimate(everyone.later.estimate(prior))


UNKNOWN = Acceptance()  # of a request; never changed


@dataclass
class _Samples:
    """Seconds of the latest steps of a size."""

    latest: deque[float] = field(default_factory=lambda: deque(maxlen=MOST_SAMPLES))
    median_s: float = 0.0
    number: int = 0  # of the last of them
    is_new: bool = True  # its graph has not run yet: the first time takes longer, and does not count


class StepTimes:
    """Owns the measured times of steps that only decode, with drafts and without."""

    def __init__(self) -> None:
        self.num_steps = 0
        self.latest_seqs = 1  # sequences of the latest step
        self._plain: dict[int, _Samples] = {}  # by the rows of the graph
        self._verified: dict[int, _Samples] = {}  # by the rows of the graph that would be best

    def note_plain(self, num_rows: int, num_seqs: int, seconds: float) -> None:
        self._note(self._plain, num_rows, num_seqs, seconds)

    def note_verified(self, num_rows: int, num_seqs: int, seconds: float) -> None:
        samples = self._verified.setdefault(num_rows, _Samples())
        if samples.is_new:
            samples.is_new = False
            self.num_steps += 1
            self.latest_seqs = num_seqs
        else:
            self._note(self._verified, num_rows, num_seqs, seconds)

    def _note(self, times: dict[int, _Samples], num_rows: int, num_seqs: int, seconds: float) -> None:
        self.num_steps += 1
        self.latest_seqs = num_seqs
        samples = times.setdefault(num_rows, _Samples())
        samples.latest.append(seconds)
        samples.median_s = median(samples.latest)
        samples.number = self.num_steps

    def plain_s(self, num_seqs: int) -> float | None:
        """A step of so many sequences without drafts. None: none was measured."""
        holding = [rows for rows in self._plain if rows >= num_seqs]
        return self._plain[min(holding)].median_s if holding else None

    def options(self, sizes: Sequence[int], num_seqs: int) -> list[tuple[int, float]]:
        """The sizes, in rows of a step with drafts of so many sequences, whose seconds are known or can be guessed.

        The smallest step with drafts may take much longer than a plain one, by other kernels and without overlap, and
        larger ones little longer. So a larger size is extrapolated from the last two with drafts. From one alone, it
        is taken to last as long, and from none as long as a plain step: trying it will tell. A size that is more than
        twice as large as any known one is left out, unless there is no smaller one."""
        plain_s = self.plain_s(num_seqs)
        if plain_s is None:
            return []
        known = sorted(
            (rows, samples.median_s)
            for rows, samples in self._verified.items()
            if rows > num_seqs and samples.latest and self.num_steps - samples.number <= MOST_AGE
        )
        found: list[tuple[int, float]] = []
        for size in sizes:
            if size > num_seqs:
                seconds = _guess(size, (num_seqs, plain_s), known, is_smallest=not found)
                if seconds is None:
                    break
                found.append((size, seconds))
        return found


def _guess(
    size: int, plain: tuple[int, float], known: Sequence[tuple[int, float]], *, is_smallest: bool
) -> float | None:
    """The seconds of a size, as in `StepTimes.options`. plain, known: rows and seconds, ascending."""
    place = bisect_left(known, (size, 0.0))
    if place < len(known) and known[place][0] == size:
        return known[place][1]
    below, below_s = known[place - 1] if place else plain
    if place < len(known):  # interpolate
        above, above_s = known[place]
        return below_s + (above_s - below_s) * (size - below) / (above - below)
    if size > 2 * below and not is_smallest:
        return None
    if place < 2:
        return below_s
    before, before_s = known[place - 2]
    return below_s + max(0.0, below_s - before_s) / (below - before) * (size - below)
