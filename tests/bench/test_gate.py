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
from tinyvllm.profiling.request_stages import STAGES as SERVED_STAGES
from tinyvllm.profiling.request_stages import Delivery, Segment, Served, ServedRequest
from tinyvllm.profiling.stage_rows import served_as_json
from tinyvllm.scheduling.scheduler import Scheduler
from tinyvllm.text.tokenizer import load_tokenizer

PLANTED_NS = 5_000_000
WAY_BACK = ("hop back", "detokenize", "serialize", "send")
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


def test_small_growth_beside_a_large_one_is_no_regression(clock: Clock, tiny_hf_files: ModelFiles) -> None:
    """After a wait caches are cold. Alone, the same growth is a regression."""
    before = run(clock, tiny_hf_files)
    runner, tokenizer = ClockedRunner(clock), load_tokenizer(tiny_hf_files)
    with planted(OutputProcessor, "push", lambda: clock.compute(100_000)):
        alone = measure_clocked(ClockedInspector(runner), tokenizer)
        with planted(Scheduler, "schedule", lambda: clock.wait(PLANTED_NS)):
            both = measure_clocked(ClockedInspector(runner), tokenizer)
    assert stages_in(regressions(compare(before, alone, 0.05))) == ["detokenize"]
    assert stages_in(regressions(compare(before, both, 0.05))) == ["schedule"]


def test_slower_sampling_kernel_is_sampling(clock: Clock, tiny_hf_files: ModelFiles) -> None:
    before = run(clock, tiny_hf_files)
    inspector = ClockedInspector(ClockedRunner(clock))
    inspector.runner.step_ns, inspector.sample_s = STEP_NS + PLANTED_NS, inspector.sample_s + PLANTED_NS / 1e9
    found = regressions(compare(before, measure_clocked(inspector, load_tokenizer(tiny_hf_files)), 0.05))
    assert stages_in(found) == ["sampling"]


def test_nothing_is_found_where_nothing_was_planted(clock: Clock, tiny_hf_files: ModelFiles) -> None:
    assert regressions(compare(run(clock, tiny_hf_files), run(clock, tiny_hf_files), 0.05)) == []


# -- served requests -------------------------------------------------------------------------------------------------


def make_served(planted: str | None = None) -> dict[str, Any]:
    """The JSON of `bench breakdown --served`: four requests, each stage of which takes 1 to 1.03 ms, and the planted
    one 5 ms more. A token's way back is part of its delivery too."""
    requests = []
    for number in range(4):
        segments, now_ns = [], 0
        for stage in SERVED_STAGES:
            took_ns = 1_000_000 + 10_000 * number + PLANTED_NS * (stage == planted)
            segments.append(Segment(stage, now_ns, now_ns + took_ns))
            now_ns += took_ns
        requests.append(
            ServedRequest(
                http_id=str(number),
                request_id=str(number),
                front_end="front-end 0",
                engine="engine 0",
                start_ns=0,
                first_ns=0,
                end_ns=now_ns,
                first_token_ns=0,
                last_token_ns=0,
                num_tokens=8,
                segments=tuple(segments),
                first_segments=(),
                decode_segments=(),
            )
        )
    sums = {f"{stage.replace(' ', '_')}_ns": 8 * 100_000 for stage in WAY_BACK}
    if planted in WAY_BACK:
        sums[f"{planted.replace(' ', '_')}_ns"] += 8 * PLANTED_NS
    served = Served(tuple(requests), 0, Delivery(num_batches=8, num_events=8, **sums))
    plain: dict[str, Any] = {"concurrency": 4, "rate": None, "requests": 4, "output_tok_s": 100.0, "errors": {}}
    spread = {"mean": 20.0, "std": 0.1, "count": 4}
    level = {"plain": plain | {"tpot_ms": spread}, **served_as_json(served)}
    return {"kind": "served breakdown", "model": "tiny", "api": "chat", "levels": [level]}


@pytest.mark.parametrize("stage", SERVED_STAGES)
def test_planted_delay_in_a_server_is_named_by_its_stage(stage: str) -> None:
    """From the socket to the socket: the writing of answers, and messages between processes, too."""
    expected = {f"4 at once: {stage} grew by 5.000 ms a request, from 1.015 to 6.015 ms"}
    if stage in WAY_BACK:
        expected.add(f"4 at once: every token: {stage} grew by 5.000 ms a token, from 0.100 to 5.100 ms")
    assert set(regressions(compare(make_served(), make_served(stage), 0.05))) == expected


def test_two_repeats_have_wide_margins() -> None:
    """Means 10 % apart: certain with little scatter, chance with much, and the fewer repeats the wider the margin."""
    assert noise(Estimate(1.0), Estimate(1.1)) == 0.0
    few, many = Estimate.of_values([0.9, 1.1]), Estimate.of_values([0.9, 1.1] * 8)
    assert few.margin == pytest.approx(12.71 * 0.1) and many.margin < 0.06
    assert noise(few, few) > 0.1 > noise(many, many)


def test_negligible_growth_is_no_regression() -> None:
    assert [floor_ms(step) for step in (0.9, 10.0, 1000.0)] == [0.01, 0.05, 0.1]
