"""The rule of drafts on a model of a device: it loses little where nothing is accepted, and gains where drafts pay.

The device takes `seconds(rows)` for a step, a little more or less each time, and hides `hidden_s` of the host's work
behind a step without drafts. Acceptance is a probability for each request, or a list of them in turn.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest

from tests.scheduling.fakes import make_request
from tests.sweeps import swept
from tinyvllm.scheduling.draft_rule import MeasuredRule
from tinyvllm.scheduling.plan import Scheduled, StepPlan
from tinyvllm.scheduling.request import Request

SIZES = (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
Seconds = Callable[[int], float]
DEVICES: dict[str, tuple[Seconds, float]] = {  # seconds of so many rows; what overlapping hides
    "cpu": (lambda rows: 0.020 + 0.010 * rows, 0.0),
    "slow cpu": (lambda rows: 0.005 + 0.030 * rows, 0.0),
    "gpu": (lambda rows: max(0.006 + 0.00001 * rows, 0.00006 * rows), 0.0003),
    "hungry gpu": (lambda rows: 0.003 + 0.0012 * rows, 0.0003),
    "stepped gpu": (lambda rows: 0.0022 + 0.00002 * rows if rows <= 4 else 0.004 + 0.00002 * rows, 0.0),
}


@dataclass
class Bench:
    """Runs steps with a rule on a model of a device."""

    device: str
    num_seqs: int
    accepts: Callable[[int, int], float]  # of a request's place and step: the probability for each draft
    num_tokens: int = 8
    is_free: bool = False  # drafts that are not verified are compared with the output
    seed: int = 0
    elapsed_s: float = 0.0
    num_out: int = 0
    num_drafted: int = 0
    requests: list[Request] = field(default_factory=list)

    def run(self, num_steps: int) -> Bench:
        seconds, hidden_s = DEVICES[self.device]
        rng = random.Random(self.seed)
        rule = MeasuredRule(self.num_tokens, SIZES, is_free=self.is_free)
        self.requests = [make_decoding(str(place)) for place in range(self.num_seqs)]
        for step in range(num_steps):
            wants = rule.wants(self.requests)
            counts = rule.counts(self.requests, [self.num_tokens] * self.num_seqs) if wants else [0] * self.num_seqs
            entries = tuple(
                Scheduled(request, request.num_tokens - 1, 1 + count, (7,) * count)
                for request, count in zip(self.requests, counts, strict=True)
            )
            plan = StepPlan(entries)
            rows = self._rows(plan.num_tokens) if plan.num_drafts else self.num_seqs
            took_s = seconds(rows) * rng.uniform(0.98, 1.02) + (hidden_s if plan.num_drafts else 0.0)
            self.elapsed_s += took_s
            rule.note_step(plan, rows, took_s)
            self.num_drafted += plan.num_drafts
            for place, count in enumerate(counts):
                self.num_out += 1 + self._settle(rule, place, step, count, rng)
        return self

    def _settle(self, rule: MeasuredRule, place: int, step: int, count: int, rng: random.Random) -> int:
        would = count or (self.num_tokens if self.is_free and step % self.num_tokens == 0 else 0)
        num_right = 0
        while num_right < would and rng.random() < self.accepts(place, step):
            num_right += 1
        if count:
            rule.settled(self.requests[place], count, num_right)
            return num_right
        if would:
            rule.foreseen(self.requests[place], would, num_right)
        return 0

    @staticmethod
    def _rows(num_rows: int) -> int:
        return next(size for size in SIZES if size >= num_rows)

    @property
    def speedup(self) -> float:
        """The tokens per second against those without drafts."""
        return self.num_out / self.elapsed_s * DEVICES[self.device][0](self.num_seqs) / self.num_seqs


def make_decoding(request_id: str) -> Request:
    """A request with one token of output, which is to be computed next."""
    request = make_request(request_id, max_tokens=10_000)
    request.output_ids.append(1)
    request.num_computed = request.num_prompt_tokens
    return request


def best_fixed(device: str, num_seqs: int, share: float, num_tokens: int = 8) -> float:
    """The speed-up of the best fixed number of drafts."""
    seconds, hidden_s = DEVICES[device]
    plain = num_seqs / seconds(num_seqs)
    rates = [plain]
    for count in range(1, num_tokens + 1):
        expected = sum(share**place for place in range(count + 1))
        rates.append(num_seqs * expected / (seconds(Bench._rows(num_seqs * (1 + count))) + hidden_s))
    return max(rates) / plain


@pytest.mark.parametrize("is_free", [False, True])
@pytest.mark.parametrize("num_seqs", swept([1, 3, 16, 64], [1, 16]))
@pytest.mark.parametrize("device", DEVICES)
def test_drafts_that_are_never_accepted_cost_at_most_five_percent(device: str, num_seqs: int, is_free: bool) -> None:
    bench = Bench(device, num_seqs, lambda place, step: 0.0, is_free=is_free).run(400)
    assert bench.speedup >= 0.95
    assert bench.num_drafted > 0 or bench.is_free


@pytest.mark.parametrize("share", [0.6, 0.95])
@pytest.mark.parametrize("num_seqs", swept([1, 4, 16, 64], [1, 16]))
@pytest.mark.parametrize("device", DEVICES)
def test_the_speed_is_near_that_of_the_best_fixed_number(device: str, num_seqs: int, share: float) -> None:
    bench = Bench(device, num_seqs, lambda place, step: share).run(400)
    best = best_fixed(device, num_seqs, share)
    assert bench.speedup >= max(0.95, 0.86 * best), f"{bench.speedup=:.2f} {best=:.2f}"


@pytest.mark.parametrize("is_free", [False, True])
def test_a_change_is_noticed(is_free: bool) -> None:
    def accepts(place: int, step: int) -> float:
        return 0.95 if step % 1000 >= 500 else 0.0

    bench = Bench("gpu", 1, accepts, is_free=is_free).run(3000)
    # half of the steps, by count, yield up to nine tokens
    assert bench.speedup >= 0.7 * (1 + best_fixed("gpu", 1, 0.95)) / 2


def test_only_the_requests_that_gain_have_drafts() -> None:
    drafted = [0, 0, 0, 0]

    class Counting(Bench):
        def _settle(self, rule: MeasuredRule, place: int, step: int, count: int, rng: random.Random) -> int:
            drafted[place] += count if step > 100 else 0
            return super()._settle(rule, place, step, count, rng)

    Counting("hungry gpu", 4, lambda place, step: 0.95 if place == 2 else 0.05).run(400)
    assert drafted[2] > 10 * (sum(drafted) - drafted[2]) > 0 or sum(drafted) == drafted[2] > 0


def test_a_large_batch_bound_by_arithmetic_has_no_drafts() -> None:
    bench = Bench("gpu", 256, lambda place, step: 0.6).run(300)
    assert bench.num_drafted <= 300 * 256 * 0.03
    assert bench.speedup >= 0.95


def test_the_largest_batch_with_drafts_can_be_set() -> None:
    rule = MeasuredRule(4, SIZES, is_free=True, max_seqs=2)
    requests: Sequence[Request] = [make_decoding(str(place)) for place in range(2)]
    for _ in range(3):
        rule.note_step(StepPlan((Scheduled(requests[0], 5, 1),)), 1, 0.01)
    assert rule.wants(requests[:1])
    assert not rule.wants(requests)


def test_a_size_is_not_tried_before_half_of_it_was() -> None:
    rule, request = MeasuredRule(8, SIZES, is_free=True), make_decoding("r")
    tried = []
    for _ in range(12):
        count = rule.counts([request], [8])[0] if rule.wants([request]) else 0
        plan = StepPlan((Scheduled(request, 5, 1 + count, (7,) * count),))
        rule.note_step(plan, 1 + count, 0.01)
        if count:
            tried.append(count)
            rule.settled(request, count, count)
    assert tried[:7] == [1, 1, 3, 3, 7, 7, 8]


def test_a_slow_first_step_with_drafts_does_not_hide_that_larger_ones_pay() -> None:
    """Kernels for a few rows may take twice as long as those for single ones, and hardly longer for more rows."""
    bench = Bench("stepped gpu", 4, lambda place, step: 0.95).run(400)
    assert bench.speedup >= 0.88 * best_fixed("stepped gpu", 4, 0.95) > 2.5


def test_nothing_is_kept_of_requests_without_drafts() -> None:
    rule, request = MeasuredRule(8, SIZES, is_free=True), make_decoding("r")
    for _ in range(5):
        rule.note_step(StepPlan((Scheduled(request, 5, 1),)), 1, 0.01)
        assert rule.wants([request])
    assert rule.counts([request], [8]) == [1] and not rule._each
    rule.foreseen(request, 8, 2)
    assert rule._each
    rule.forget(request)
    assert not rule._each
