"""An engine that answers while its graphs are still being captured."""

from __future__ import annotations

import asyncio
import itertools
import time
from typing import Any

import pytest

from tests.engine.fakes import FakeCaptures, FakeModelRunner, load_text
from tests.engine.requests import SETTINGS
from tests.patience import PATIENCE_S, until
from tests.scheduling.fakes import make_request, run_alone
from tinyvllm.config import EngineConfig, GenerationDefaults, ModelFiles, SamplingParams
from tinyvllm.device.program_store import ProgramStore
from tinyvllm.engine import loop as loop_module
from tinyvllm.engine.async_engine import AsyncEngine
from tinyvllm.engine.core import EngineCore
from tinyvllm.engine.loading import LoadedEngine, Progress, assemble_engine
from tinyvllm.engine.output import Delta
from tinyvllm.execution.runner import load_runner
from tinyvllm.profiling import measure
from tinyvllm.scheduling.block_manager import BlockManager
from tinyvllm.scheduling.plan import StepOutput, StepPlan
from tinyvllm.scheduling.scheduler import Scheduler


class Overlapping(FakeModelRunner):
    """Two steps in flight; notes what is launched and read."""

    max_in_flight = 2

    def __init__(self, events: list[str]) -> None:
        super().__init__()
        self.events = events

    def launch(self, plan: StepPlan) -> StepOutput:
        self.events.append("launch")
        return super().launch(plan)

    def collect(self, flight: Any) -> StepOutput:
        self.events.append("collect")
        return super().collect(flight)


def make_core(runner: FakeModelRunner, captures: FakeCaptures) -> EngineCore:
    capacity = runner.capacity
    blocks = BlockManager(capacity.groups, capacity.block_size, enable_prefix_caching=False)
    return EngineCore(runner, Scheduler(blocks, capacity), captures)


def test_a_graph_is_made_while_no_step_is_in_flight_and_no_token_is_lost() -> None:
    events: list[str] = []
    runner, captures = Overlapping(events), FakeCaptures(3, events)
    core = make_core(runner, captures)
    measure.start()
    requests = [make_request(f"r{index}", [5, 6, 7 + index], max_tokens=12) for index in range(3)]
    for request in requests:
        core.add(request)
    while core.has_work or core.has_captures_to_come:
        core.step()
        if core.has_captures_to_come:
            core.advance_captures()
    assert captures.num_to_come == core.stats.num_captures_to_come == 0
    in_flight = 0
    for event in events:
        in_flight += {"launch": 1, "collect": -1}.get(event, 0)
        assert event != "capture" or in_flight == 0
    assert "trace" in events[: events.index("capture")], "tracing continues during a step"
    captured = measure.stop().named(measure.CAPTURE)
    assert len(captured) == sum(event in ("trace", "capture") for event in events)
    assert all(span.depth == 0 for span in captured), "no step contains it"
    for request in requests:
        assert len(request.output_ids) == 12
        assert request.output_ids == run_alone(request)


def test_a_step_that_fails_before_a_graph_is_made_ends_its_requests_alone() -> None:
    runner, captures = Overlapping([]), FakeCaptures(1)
    core = make_core(runner, captures)
    request = make_request("first", [1, 2], max_tokens=5)
    core.add(request)
    core.step()
    collect = runner.collect

    def fail(flight: Any) -> StepOutput:
        raise RuntimeError("lost")

    runner.collect = fail  # type: ignore[method-assign]
    core.advance_captures()
    (out,) = core.advance_captures()
    runner.collect = collect  # type: ignore[method-assign]
    assert (out.finish_reason, captures.num_to_come) == ("error", 0)
    again = make_request("again", [1, 2], max_tokens=5)
    core.add(again)
    while core.has_work:
        core.step()
    assert again.output_ids == run_alone(again)


async def collect(engine: AsyncEngine, request_id: str) -> list[Delta]:
    params = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
    return [delta async for delta in engine.generate([1, 2, 3], params, request_id=request_id)]


def start(captures: FakeCaptures, runner: FakeModelRunner, warm_up: str = "background") -> AsyncEngine:
    def load(config: EngineConfig, progress: Progress) -> LoadedEngine:
        return assemble_engine(config, runner, *load_text(), GenerationDefaults(), captures)

    return AsyncEngine.start(EngineConfig("tiny", warm_up=warm_up), load=load)


async def test_an_idle_engine_makes_its_graphs() -> None:
    captures = FakeCaptures(4)
    engine = start(captures, FakeModelRunner())
    await engine.wait_ready()
    assert engine.is_ready
    await until(lambda: captures.num_to_come == 0)
    await until(lambda: engine.stats().num_captures_to_come == 0)
    assert captures.events == ["trace", "capture"] * 4
    num_parts = len(captures.events)
    assert len(await collect(engine, "a")) > 0
    assert len(captures.events) == num_parts, "and then it is over"
    await engine.shutdown()


async def test_one_part_of_one_graph_comes_between_two_steps() -> None:
    events: list[str] = []
    runner = FakeModelRunner()
    runner.before_step = lambda plan: events.append("step")
    captures = FakeCaptures(10_000, events)  # more than there are steps
    engine = start(captures, runner)
    await engine.wait_ready()
    deltas = await collect(engine, "a")
    assert sum(len(delta.token_ids) for delta in deltas) == 20
    first = events.index("step")
    last = len(events) - 1 - events[::-1].index("step")
    while_busy = events[first : last + 1]
    assert while_busy.count("step") == 20
    assert all(event != "step" for event in while_busy[1::2]), "a step, a part of a graph, a step, ..."
    await engine.shutdown()
    assert captures.num_to_come > 0, "a shutdown does not wait for graphs"


async def test_warm_up_when_idle_waits_until_no_request_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop_module, "IDLE_S", 0.05)
    events: list[str] = []
    runner = FakeModelRunner()
    runner.before_step = lambda plan: events.append("step")
    captures = FakeCaptures(2, events)
    engine = start(captures, runner, "idle")
    await engine.wait_ready()
    await collect(engine, "a")
    first = events.index("step")
    assert events[first:][:20] == ["step"] * 20
    await until(lambda: captures.num_to_come == 0)
    assert events.count("capture") == 2
    await engine.shutdown()


# by default, graphs that come one by one serve with the same tokens in tests/execution/test_captures.py, and other
# processes trace them in test_tracing.py there
@pytest.mark.sweep
@pytest.mark.usefixtures("compiling_processes")
@pytest.mark.parametrize("warm_up", ["background", "full"])
async def test_answers_are_the_same_while_graphs_come(
    tiny_gguf_files: ModelFiles, warm_up: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the real runner, two steps in flight. All steps are traced, though others have left them on the disk."""
    monkeypatch.setattr(ProgramStore, "read_step", lambda store, name: None)
    config = EngineConfig("tiny", async_scheduling=True, warm_up=warm_up, **SETTINGS)

    def load(engine_config: EngineConfig, progress: Progress) -> LoadedEngine:
        runner = load_runner(tiny_gguf_files, engine_config)
        runner.warm_up() if warm_up == "full" else runner.warm_up_first()
        return assemble_engine(engine_config, runner, *load_text(), GenerationDefaults(), runner.captures)

    engine = AsyncEngine.start(config, load=load)
    await engine.wait_ready()
    to_come = engine.stats().num_captures_to_come
    assert to_come == (0 if warm_up == "full" else 1)
    answers: list[list[int]] = []
    end_s = time.monotonic() + PATIENCE_S
    for turn in itertools.count():
        deltas = await asyncio.gather(*[collect(engine, f"{turn}-{index}") for index in range(1 + turn % 3)])
        answers += [[token for delta in each for token in delta.token_ids] for each in deltas]
        if (engine.stats().num_captures_to_come == 0 and turn > 3) or time.monotonic() > end_s:
            break
        await asyncio.sleep(0.1)  # the processes that trace are nicer than this one
    assert all(answer == answers[0] and len(answer) == 20 for answer in answers)
    assert (engine.stats().num_captures, engine.stats().num_captures_to_come) == (3, 0)
    assert engine.stats().extra["num_failed_steps"] == 0
    await engine.shutdown()
