"""What watches an engine sees: its steps, what it is asked between them, and how each request fared."""

from __future__ import annotations

import asyncio
import itertools
import threading

import pytest

from tests.engine.fakes import FakeModelRunner, running_engine
from tinyvllm.config import SamplingParams
from tinyvllm.engine.async_engine import AsyncEngine
from tinyvllm.engine.loop import QUESTIONS
from tinyvllm.engine.output import Delta
from tinyvllm.errors import EngineDeadError
from tinyvllm.scheduling.plan import StepStats, count_step

GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)


async def last_delta(engine: AsyncEngine, prompt: bytes, request_id: str) -> Delta:
    return [delta async for delta in engine.generate(list(prompt), GREEDY, request_id=request_id)][-1]


async def test_each_step_is_remembered_once() -> None:
    async with running_engine() as engine:
        await last_delta(engine, b"hello", "x")
        [steps] = await engine.latest_steps()
        [counts] = await engine.audit()
    assert [step.number for step in steps] == list(range(1, len(steps) + 1))
    assert sum(step.stats.num_tokens for step in steps) == len(b"hello") + (GREEDY.max_tokens or 0) - 1
    assert all(before.end_s <= after.end_s for before, after in itertools.pairwise(steps))
    assert sum(steps[-1].stats.step_sizes) == len(steps)
    assert (
        counts["requests"] == counts["owned_requests"] == counts["live_states"] == 0
        and counts["free_blocks"] == counts["all_blocks"]
    )


async def test_a_question_that_cannot_be_answered_concerns_its_asker_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(QUESTIONS, "audit", lambda loop: 1 // 0)
    async with running_engine() as engine:
        with pytest.raises(EngineDeadError, match="ZeroDivisionError"):
            await engine.audit()
        with pytest.raises(EngineDeadError, match="no question 'weather': known: "):
            await engine._ask_all("weather")
        assert (await last_delta(engine, b"hello", "x")).finish_reason == "length"


def test_stats_of_several_engines_are_added_up() -> None:
    one = StepStats(num_running=2, num_tokens=7, end_s=5.0, prefix_hits=3, extra={"num_steps": 4})
    two = StepStats(num_running=1, num_tokens=9, end_s=6.0, prefix_hits=4, extra={"num_steps": 5})
    one.step_sizes, two.step_sizes = count_step(one.step_sizes, 7), count_step(two.step_sizes, 9)
    total = StepStats.sum([one, two])
    assert (total.num_running, total.prefix_hits, total.extra["num_steps"]) == (3, 7, 9)
    assert (total.num_tokens, total.end_s) == (9, 6.0), "of the step that ended last"
    assert total.step_sizes[:4] == (0, 1, 1, 0)


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
        question = asyncio.create_task(engine.pool_states())
        await asyncio.sleep(0)
        stop = asyncio.create_task(engine.shutdown())
        await asyncio.sleep(0)
        release.set()
        await stop
        assert (await request).finish_reason in ("abort", "length")
        assert len(await question) == 1, "it came before the stop"
        with pytest.raises(EngineDeadError):
            await engine.pool_states()


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
