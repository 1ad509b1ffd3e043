"""How long a breakdown will take, and how much of the default one fits into the time that a person is willing to wait.

The start has called each graph a few times, so the duration of a round is a sum: no step needs to run for it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tinyvllm.bench.breakdown import BreakdownWork
from tinyvllm.bench.cold_start import ColdStart
from tinyvllm.bench.stages import Case
from tinyvllm.execution.buckets import Bucket

BUDGET_S = 60.0  # of the default breakdown, from the start of the process to its tables
RESERVE_S = 3.0  # of BUDGET_S, for tables and whatever else the forecast leaves out
NUM_UNTIMED = 2  # rounds of each case: one counts, one warms up
# The most instructive cases first: how long a text takes, and how requests share steps. The last are left out first.
DEFAULT_CASES = (("long", 0, 1), ("medium", 0, 4), ("short", 0, 1))
DEFAULT_IDS = ((None, 512, 1), (None, 128, 4))  # without a tokenizer
DEFAULT_TOKENS, FULL_TOKENS = 16, 32


@dataclass(frozen=True)
class Forecast:
    """Seconds by case: for one round, and for timing its steps kernel by kernel."""

    round_s: Mapping[Case, float]
    profile_s: Mapping[Case, float]

    def case_s(self, case: Case, num_repeats: int) -> float:
        """Each repeat is an instrumented and a plain round."""
        return (NUM_UNTIMED + 2 * num_repeats) * self.round_s[case] + self.profile_s[case]

    def profiles_s(self, work: BreakdownWork) -> float:
        """Of timing the steps of all cases kernel by kernel, which comes last."""
        return sum(self.profile_s[case] for case in work.cases)

    def total_s(self, work: BreakdownWork) -> float:
        return sum(self.case_s(case, work.num_repeats) for case in work.cases)


def forecast(
    work: BreakdownWork, start: ColdStart, buckets: Sequence[Bucket], num_tokens: Mapping[Case, int]
) -> Forecast:
    """Forecast from the calls of each graph during the start. `num_tokens`: of all prompts of a case."""
    calls_s = {bucket.name: min(bucket.calls_s) for bucket in start.buckets if bucket.calls_s}
    decode = {bucket.num_seqs: calls_s.get(bucket.name, 0.0) for bucket in buckets if bucket.is_decode}
    prefill = {bucket.num_tokens: calls_s.get(bucket.name, 0.0) for bucket in buckets if bucket.is_for_prompts}
    round_s, profile_s = {}, {}
    for case in work.cases:
        whole, rest = divmod(num_tokens[case], max(prefill))
        step_s = decode[min(size for size in decode if size >= case.batch)]
        last_s = prefill[min(size for size in prefill if size >= rest)] if rest else 0.0
        prompt_s = whole * prefill[max(prefill)]
        round_s[case] = prompt_s + last_s + (case.num_output - 1) * step_s
        largest_s = prefill[max(prefill)] if whole else last_s
        profile_s[case] = 2 * (work.num_profiled + 1) * (largest_s + step_s)  # as served, and kernel by kernel
    return Forecast(round_s, profile_s)


def fit(work: BreakdownWork, found: Forecast, left_s: float) -> BreakdownWork:
    """The work that fits into `left_s`: fewer repeats, then fewer cases. If nothing fits, the shortest case, once."""
    for num_cases in range(len(work.cases), 0, -1):
        for num_repeats in range(work.num_repeats, 0, -1):
            smaller = dataclasses.replace(work, cases=work.cases[:num_cases], num_repeats=num_repeats)
            is_worth_it = num_repeats > 1 or num_cases == 1  # without a second repeat there is no spread
            if is_worth_it and found.total_s(smaller) <= left_s:
                return smaller
    least = min(work.cases, key=lambda case: found.case_s(case, 1))
    return dataclasses.replace(work, cases=(least,), num_repeats=1)


def describe_plan(work: BreakdownWork, found: Forecast, given: BreakdownWork) -> str:
    """What will be measured and how long that takes, and what was left out of `given`."""
    text = (
        f"measuring {_count(len(work.cases), 'case')}, {_count(work.num_repeats, 'repeat')} each: "
        f"about {describe_time(found.total_s(work))}"
    )
    if work.num_repeats < given.num_repeats:
        text += f"; {work.num_repeats} instead of {given.num_repeats} repeats, to end within {BUDGET_S:.0f} s"
    if left_out := [case for case in given.cases if case not in work.cases]:
        text += f"; not {'; '.join(case.name for case in left_out)} (--full measures everything)"
    return text


def describe_time(seconds: float) -> str:
    """A rounded time: 12 s, 4 min."""
    return f"{max(1.0, seconds):.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
