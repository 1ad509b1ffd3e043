"""What watches an engine sees: its steps, what it is asked between them, and how each request fared."""

from __future__ import annotations

import asyncio
import threading

import pytest

from tests.engine.fakes import FakeModelRunner, running_engine
from tinyvllm.config import SamplingParams
from tinyvllm.engine.async_engine import AsyncEngine
from tinyvllm.engine.output import Delta
from tinyvllm.errors import EngineDeadError
from tinyvllm.scheduling.plan import StepStats

GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)


async def last_delta(engine: AsyncEngine, prompt: bytes, request_id: str) -> Delta:
    return [delta async for delta in engine.generate(list(prompt), GREEDY, request_id=request_id)][-1]


async def test_each_step_is_shown_once() -> None:
    seen: list[StepStats] = []
    async with running_engine() as engine:
        engine.on_step = seen.append
        await last_delta(engine, b"hello", "x")
        await engine.ask(lambda inner: inner)  # so that the last step has been shown
    assert sum(stats.num_tokens for stats in seen) >= len(b"hello") + (GREEDY.max_tokens or 0) - 1
    assert seen[-1].num_running == 0


async def test_a_watcher_that_fails_disturbs_nobody(caplog: pytest.LogCaptureFixture) -> None:
    def fail(stats: StepStats) -> None:
        raise ValueError("no")

    async with running_engine() as engine:
        engine.on_step = fail
        assert (await last_delta(engine, b"hello", "x")).finish_reason == "length"
        assert engine.on_step is None
    assert "on_step raised" in caplog.text


async def test_a_question_is_answered_on_the_engines_thread_between_steps() -> None:
    async with running_engine() as engine:
        assert await engine.ask(lambda inner: threading.current_thread().name) == "tinyvllm-engine"
        with pytest.raises(ZeroDivisionError):
            await engine.ask(lambda inner: 1 // 0)
        assert (await last_delta(engine, b"hello", "x")).finish_reason == "length"


async def test_a_question_to_an_engine_that_stops_is_not_left_waiting() -> None:
    runner = FakeModelRunner()
    release, reached = threading.Event(), threading.Event()

    def hold(plan: object) -> None:
        reached.set()
        release.wait()

    runner.before_step = hold
    async with running_engine(runner) as engine:
        request = asyncio.create_task(last_delta(engine, b"hello", "x"))
        await asyncio.to_thread(reached.wait)
        question = asyncio.create_task(engine.ask(lambda inner: 1))
        await asyncio.sleep(0)
        stop = asyncio.create_task(engine.shutdown())
        await asyncio.sleep(0)
        release.set()
        await stop
        assert (await request).finish_reason in ("abort", "length")
        with pytest.raises(EngineDeadError):
            await question
        with pytest.raises(EngineDeadError):
            await engine.ask(lambda inner: 1)


async def test_the_last_delta_says_when_a_request_was_where() -> None:
    async with running_engine(FakeModelRunner(max_num_seqs=1)) as engine:
        first, second = await asyncio.gather(last_delta(engine, b"hello", "x"), last_delta(engine, b"there", "y"))
    for delta in (first, second):
        timing = delta.timing
        assert timing is not None and timing.num_preemptions == 0 and not timing.is_corrupted
        assert timing.queued_s <= timing.scheduled_s < timing.first_token_s < timing.last_token_s
    assert first.timing is not None and second.timing is not None
    assert second.timing.scheduled_s >= first.timing.last_token_s  # one place: it waited for the first to end


async def test_a_request_without_finite_logits_is_called_corrupted() -> None:
    runner = FakeModelRunner()
    runner.choose = lambda request, digest: -1
    async with running_engine(runner) as engine:
        delta = await last_delta(engine, b"hello", "x")
    assert delta.finish_reason == "error" and delta.timing is not None and delta.timing.is_corrupted
