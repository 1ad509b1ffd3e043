"""Faults that the profiler plants in itself: in virtual time each delay is blamed on its stage, and nothing is left."""

from __future__ import annotations

from typing import Any

import pytest

from tests.bench.clocked import CHIP, Clock, ClockedInspector, ClockedRunner, install
from tests.bench.fakes import make_machine
from tests.bench.planted import ignore
from tinyvllm.bench import profiler_check
from tinyvllm.bench.compare import Change
from tinyvllm.bench.profiler_check import DELAYS, NOTHING, Plant, attribute, attribution_table, check_profiler
from tinyvllm.bench.runs import STAGE
from tinyvllm.config import ModelFiles
from tinyvllm.text.tokenizer import load_tokenizer


def change(name: str, growth_ms: float = 0.0, *, unit: str = "ms", is_regression: bool = True) -> Change:
    return Change("short", name, 1.0, 2.0, unit, is_regression, kind=STAGE if unit else "", growth_ms=growth_ms)


def test_the_stage_that_grew_most_is_blamed() -> None:
    plant = Plant("a delay", "pack", lambda inspector: profiler_check._left_alone())
    found = attribute(plant, [change("loop", 0.1), change("pack", 5.0), change("schedule", 9.0, is_regression=False)])
    assert found.is_right and found.stages == (("pack", 5.0), ("loop", 0.1))
    assert not attribute(plant, [change("loop", 6.0), change("pack", 5.0)]).is_right
    assert not attribute(plant, []).is_right


def test_a_count_that_rose_is_blamed_by_its_name() -> None:
    plant = Plant("a wait", "syncs", lambda inspector: profiler_check._left_alone())
    assert attribute(plant, [change("decode syncs", unit=""), change("decode", 2.0)]).is_right
    assert not attribute(plant, [change("decode kernels", unit="")]).is_right


def test_a_clean_run_must_be_blamed_for_nothing() -> None:
    plant = Plant(NOTHING, NOTHING, lambda inspector: profiler_check._left_alone())
    assert attribute(plant, []).is_right and not attribute(plant, [change("pack", 1.0)]).is_right


def test_every_planted_delay_is_attributed_correctly_and_removed(
    monkeypatch: pytest.MonkeyPatch, tiny_hf_files: ModelFiles
) -> None:
    """The runner is made up, so its own functions, and what only a real device has, are left out."""
    clock = install(Clock(), monkeypatch)
    owners = {stage: place for stage, place in DELAYS.items() if stage not in ("pack", "sampling", "tokens")}
    monkeypatch.setattr(profiler_check, "DELAYS", owners)
    originals = {stage: getattr(owner, name) for stage, (owner, name) in owners.items()}
    plants = profiler_check.make_plants(has_tokenizer=True)
    monkeypatch.setattr(profiler_check, "make_plants", lambda **given: plants[: 1 + len(owners)])

    def look_after_a_moment() -> float:  # a loop that waits for a clock needs it to move
        clock.compute(100_000)
        return clock.thread_ns() / 1e9

    monkeypatch.setattr("time.thread_time", look_after_a_moment)
    inspector: Any = ClockedInspector(ClockedRunner(clock))
    found = check_profiler(inspector, load_tokenizer(tiny_hf_files), make_machine(), CHIP, ignore)
    assert [(one.expected, one.is_right) for one in found] == [(NOTHING, True), *((stage, True) for stage in owners)]
    assert {stage: getattr(owner, name) for stage, (owner, name) in owners.items()} == originals
    assert attribution_table(found) is not None and found[1].as_json()["is_right"]
