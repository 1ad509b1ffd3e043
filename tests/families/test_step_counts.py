"""Kernels, bytes and predicted time of steps, compared with the counts that are kept in data/step_counts.json."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from tests.families.step_counts import BUCKETS, CASES, CHIP_OF, Counts, count_steps, differences, read

COMMAND = "python -m tests.families.step_counts"
# by case: the steps that are counted by default; all others with -m sweep
DEFAULT = {
    ("CUDA sm_90", "llama-3.1-8b", "float16"): ("decode 1",),  # prompts: test_kernels_a_layer.py
    ("CUDA sm_90", "llama-3.1-8b", "Q4_K"): ("decode 8",),
    ("METAL", "llama-3.1-8b", "Q4_K"): ("verify 5",),
    ("CPU", "llama-3.2-1b", "Q4_K"): ("decode 1",),
}


def check(case: tuple[str, str, str], buckets: Sequence[str]) -> None:
    changed = differences(read(), count_steps(*case, buckets))
    assert not changed, "\n".join(
        ["counts of steps changed; if they are meant to, write them anew with", f"  {COMMAND}", *changed]
    )


@pytest.mark.parametrize("case", DEFAULT, ids=" ".join)
def test_a_step_launches_and_moves_what_it_did(case: tuple[str, str, str]) -> None:
    check(case, DEFAULT[case])


@pytest.mark.sweep
@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_all_steps_launch_and_move_what_they_did(case: tuple[str, str, str]) -> None:
    check(case, [bucket for bucket in BUCKETS if bucket not in DEFAULT.get(case, ())])


def test_changes_are_said_in_words() -> None:
    old = {"CUDA a": Counts(164, 15_000.0, 4_000.0), "CUDA b": Counts(5, 1.0, 10.0)}
    new = {"CUDA a": Counts(196, 15_000.0, 4_100.0), "CUDA b": Counts(5, 1.0, 10.01), "CUDA c": Counts(1, 1.0, 1.0)}
    assert differences(old, new) == [
        "CUDA a: kernels 164 -> 196 (+19.5%), predicted us 4,000.0 -> 4,100.0 (+2.5%)",
        "CUDA c is not in the file",
    ]


def test_eight_rows_take_at_least_as_long_as_one() -> None:
    """By the counts, a wider batch never makes a step shorter."""
    kept = read()
    for target, shape, kind in CASES:
        name = f"{target} {shape} {kind} decode"
        assert kept[f"{name} 1"].predicted_us <= kept[f"{name} 8"].predicted_us <= kept[f"{name} 64"].predicted_us
    assert {case[0] for case in CASES} == set(CHIP_OF)


@pytest.mark.parametrize("kind", ["float16", "Q4_K"])
def test_four_drafts_that_are_right_pay_on_metal(kind: str) -> None:
    """By the counts, a step that verifies four drafts takes at most a tenth more than a plain one: five tokens come 4.5
    times as fast, and drafts pay from a tenth of a right one on."""
    kept = read()
    plain, verifying = (kept[f"METAL llama-3.1-8b {kind} {bucket}"].predicted_us for bucket in ("decode 1", "verify 5"))
    assert plain <= verifying <= 1.1 * plain
