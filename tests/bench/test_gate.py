"""5 ms planted anywhere in the engine's loop are called a regression of the right stage, and nothing else is."""

from __future__ import annotations

from typing import Any

import pytest

from tests.bench.clocked import STEP_NS, Clock, ClockedInspector, ClockedRunner, install, measure_clocked, planted
from tinyvllm.bench.compare import compare, floor_ms, regressions
from tinyvllm.bench.estimate import Estimate, noise
from tinyvllm.bench.runs import STAGE
from tinyvllm.config import ModelFiles
from tinyvllm.engine import core
from tinyvllm.engine.core import EngineCore
from tinyvllm.engine.output import OutputProcessor
from tinyvllm.scheduling.scheduler import Scheduler
from tinyvllm.text.tokenizer import load_tokenizer

PLANTED_NS = 5_000_000
# Stage: the methods that it consists of, of classes or of the runner and the tokenizer under test
PLACES: dict[str, tuple[Any, str]] = {
    "tokenize": ("tokenizer", "encode"),
    "admission": (EngineCore, "add"),
    "schedule": (Scheduler, "schedule"),
    "pack": ("runner", "pack"),
    "sampling": ("runner", "sample"),
    "tokens": ("runner", "read_tokens"),
    "commit": (Scheduler, "commit"),
    "loop": (core, "count_step"),
    "detokenize": (OutputProcessor, "push"),
}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return install(Clock(), monkeypatch)


def run(clock: Clock, files: ModelFiles, place: tuple[Any, str] | None = None, *, waits: bool = False) -> Any:
    """A breakdown, with 5 ms before each call of a method: of computing, or of waiting."""
    runner, tokenizer = ClockedRunner(clock), load_tokenizer(files)
    inspector = ClockedInspector(runner)
    if place is None:
        return measure_clocked(inspector, tokenizer)
    owner = {"runner": runner, "tokenizer": tokenizer}.get(place[0], place[0])
    delay = clock.wait if waits else clock.compute
    with planted(owner, place[1], lambda: delay(PLANTED_NS)):
        return measure_clocked(inspector, tokenizer)


def stages_in(lines: list[str]) -> list[str]:
    """The stages that regressions name."""
    return [line.split(": ")[1].split(" grew")[0] for line in lines if " grew by " in line]


@pytest.mark.parametrize("waits", [False, True], ids=["computes", "waits"])
@pytest.mark.parametrize("stage", PLACES)
def test_planted_delay_is_named_by_its_stage(
    clock: Clock, tiny_hf_files: ModelFiles, stage: str, *, waits: bool
) -> None:
    changes = compare(run(clock, tiny_hf_files), run(clock, tiny_hf_files, PLACES[stage], waits=waits), 0.05)
    found = regressions(changes)
    assert stages_in(found) == [stage]
    per = "request" if stage in ("tokenize", "admission") else "step"
    (growth_ms,) = [change.growth_ms for change in changes if (change.name, change.kind) == (stage, STAGE)]
    assert growth_ms == pytest.approx(PLANTED_NS / 1e6, rel=0.02)
    assert f"{stage} grew by {growth_ms:.3f} ms a {per}, from" in found[0]
    assert ("its thread waits" if waits else "its thread computes longer") in found[0] or stage == "sampling"
    if per == "step":
        (slower,) = [line for line in found if ": tpot is slower" in line]
        assert f"the stage that grew most is {stage}, by {growth_ms:.3f} ms" in slower


def test_slower_device_is_a_longer_wait_with_the_same_kernels(clock: Clock, tiny_hf_files: ModelFiles) -> None:
    before = run(clock, tiny_hf_files)
    runner = ClockedRunner(clock)
    runner.step_ns = STEP_NS + PLANTED_NS
    after = measure_clocked(ClockedInspector(runner), load_tokenizer(tiny_hf_files))
    found = regressions(compare(before, after, 0.05))
    assert stages_in(found)[:2] == ["decode", "prefill"] or stages_in(found)[:2] == ["prefill", "decode"]
    assert any("wait +" in line and "as many kernels (1) and bytes" in line for line in found)


def test_slower_sampling_kernel_is_sampling(clock: Clock, tiny_hf_files: ModelFiles) -> None:
    before = run(clock, tiny_hf_files)
    inspector = ClockedInspector(ClockedRunner(clock))
    inspector.runner.step_ns, inspector.sample_s = STEP_NS + PLANTED_NS, inspector.sample_s + PLANTED_NS / 1e9
    found = regressions(compare(before, measure_clocked(inspector, load_tokenizer(tiny_hf_files)), 0.05))
    assert stages_in(found) == ["sampling"]


def test_nothing_is_found_where_nothing_was_planted(clock: Clock, tiny_hf_files: ModelFiles) -> None:
    assert regressions(compare(run(clock, tiny_hf_files), run(clock, tiny_hf_files), 0.05)) == []


def test_two_repeats_have_wide_margins() -> None:
    """Means 10 % apart: certain with little scatter, chance with much, and the fewer repeats the wider the margin."""
    assert noise(Estimate(1.0), Estimate(1.1)) == 0.0
    few, many = Estimate.of_values([0.9, 1.1]), Estimate.of_values([0.9, 1.1] * 8)
    assert few.margin == pytest.approx(12.71 * 0.1) and many.margin < 0.06
    assert noise(few, few) > 0.1 > noise(many, many)


def test_growth_that_nobody_would_notice_is_none() -> None:
    assert [floor_ms(step) for step in (0.9, 10.0, 1000.0)] == [0.01, 0.05, 0.1]
