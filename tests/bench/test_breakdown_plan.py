"""A default breakdown takes a minute: the forecast is a sum of calls, and what does not fit is left out."""

from __future__ import annotations

import time

import pytest

from tinyvllm.bench.breakdown import BreakdownWork
from tinyvllm.bench.breakdown_measure import MAX_REPEATS, repeat_in_turn, token_buckets
from tinyvllm.bench.breakdown_plan import describe_plan, describe_time, fit, forecast
from tinyvllm.bench.cold_start import BucketStart, ColdStart
from tinyvllm.bench.stages import Case
from tinyvllm.config import EngineConfig
from tinyvllm.execution.buckets import Bucket

LONG, MEDIUM, SHORT = Case("long", 0, 1, 16), Case("medium", 0, 4, 16), Case("short", 0, 1, 16)
WORK = BreakdownWork((LONG, MEDIUM, SHORT), num_repeats=3, num_profiled=3)
BUCKETS = [Bucket.decode(1), Bucket.decode(4), Bucket(128, False, 4), Bucket(256, False, 4)]
CALLS_S = {"decode 1": 0.02, "decode 4": 0.03, "prefill 128": 0.1, "prefill 256": 0.2}
TOKENS = {LONG: 588, MEDIUM: 840, SHORT: 10}


def make_start(slower: float = 1.0) -> ColdStart:
    starts = [BucketStart(name, 0.0, 0.0, 0.0, (9.0, slower * seconds)) for name, seconds in CALLS_S.items()]
    return ColdStart(None, 0.0, 0.0, tuple(starts))


def test_forecast_is_the_sum_of_the_calls_of_a_start() -> None:
    found = forecast(WORK, make_start(), BUCKETS, TOKENS)
    assert found.round_s[LONG] == pytest.approx(2 * 0.2 + 0.1 + 15 * 0.02)  # 256 + 256 + 76 tokens, then 15 steps
    assert found.round_s[MEDIUM] == pytest.approx(3 * 0.2 + 0.1 + 15 * 0.03)
    assert found.round_s[SHORT] == pytest.approx(0.1 + 15 * 0.02)
    assert found.profile_s[LONG] == pytest.approx(2 * 4 * (0.2 + 0.02))
    assert found.case_s(LONG, 3) == pytest.approx(8 * 0.8 + 1.76)


@pytest.mark.parametrize(
    ("slower", "num_cases", "num_repeats"),
    [(1.0, 3, 3), (2.0, 3, 2), (2.2, 2, 2), (3.0, 1, 3), (6.0, 1, 2), (8.0, 1, 1)],
)
def test_slower_machine_measures_less(slower: float, num_cases: int, num_repeats: int) -> None:
    found = forecast(WORK, make_start(slower), BUCKETS, TOKENS)
    fitted = fit(WORK, found, 40.0)
    assert (len(fitted.cases), fitted.num_repeats) == (num_cases, num_repeats)
    assert found.total_s(fitted) <= 40.0 and fitted.cases[0] == LONG


def test_where_nothing_fits_the_shortest_case_runs_once() -> None:
    fitted = fit(WORK, forecast(WORK, make_start(100.0), BUCKETS, TOKENS), 40.0)
    assert (fitted.cases, fitted.num_repeats) == ((SHORT,), 1)


def test_plan_says_what_is_left_out() -> None:
    found = forecast(WORK, make_start(2.2), BUCKETS, TOKENS)
    text = describe_plan(fit(WORK, found, 40.0), found, WORK)
    assert text.startswith("measuring 2 cases, 2 repeats each: about ")
    assert "2 instead of 3 repeats" in text and "not short text, batch 1 (--full measures everything)" in text
    assert describe_plan(WORK, found, WORK) == "measuring 3 cases, 3 repeats each: about 51 s"
    assert [describe_time(seconds) for seconds in (0.2, 59.6, 240.0)] == ["1 s", "60 s", "4 min"]


def test_default_captures_only_the_graphs_that_it_runs() -> None:
    config = EngineConfig("tiny", max_num_seqs=4, max_model_len=700, max_num_batched_tokens=256)
    assert token_buckets(config, [588, 840, 10]) == (16, 128, 256)
    assert token_buckets(config, [512]) == (256,)


class FakeCase:
    """A case that is noisy for some repeats; each takes a second."""

    def __init__(self, clock: list[float], num_noisy: int) -> None:
        self._clock, self._num_noisy, self.num_repeats = clock, num_noisy, 0

    repeat_s = 1.0

    @property
    def is_noisy(self) -> bool:
        return self.num_repeats < self._num_noisy

    def repeat(self) -> None:
        self._clock[0] += 1.0
        self.num_repeats += 1


@pytest.mark.parametrize(
    ("until_s", "repeats"),
    [(None, (2, 2, 2)), (6.5, (2, 2, 2)), (9.2, (2, 4, 3)), (100.0, (2, 4, MAX_REPEATS)), (0.0, (2, 2, 2))],
)
def test_noisy_cases_use_the_time_that_is_left(
    monkeypatch: pytest.MonkeyPatch, until_s: float | None, repeats: tuple[int, ...]
) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    cases = [FakeCase(clock, num_noisy) for num_noisy in (0, 4, 1000)]
    repeat_in_turn(cases, 2, until_s)
    assert tuple(case.num_repeats for case in cases) == repeats
