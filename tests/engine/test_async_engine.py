from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import random
import threading
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from tests.engine.fakes import EOS_ID, FakeModelRunner, join, load_text, make_loaded, running_engine, say
from tests.scheduling.fakes import make_request, run_alone
from tinyvllm.config import EngineConfig, ModelFiles, SamplingParams
from tinyvllm.engine.async_engine import AsyncEngine
from tinyvllm.engine.client import Reader
from tinyvllm.engine.loading import LoadedEngine
from tinyvllm.engine.output import Delta
from tinyvllm.engine.thread_host import ThreadHost
from tinyvllm.errors import ContextLengthError, EngineDeadError, ModelError, RequestError

GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
LONG = SamplingParams(temperature=0.0, max_tokens=200, ignore_eos=True)


async def collect(deltas: AsyncGenerator[Delta, None]) -> list[Delta]:
    return [delta async for delta in deltas]


async def idle(engine: AsyncEngine) -> None:
    """Wait until nothing runs or waits."""
    while engine.stats().num_running or engine.stats().num_waiting:
        await asyncio.sleep(0.001)


def open_calls(engine: AsyncEngine) -> list[str]:
    """The request ids of all event loops' open calls."""
    return [request_id for _, client in engine._host.clients() for request_id in client.calls]


def running(engine: AsyncEngine) -> LoadedEngine:
    assert isinstance(engine._host, ThreadHost) and engine._host.engine is not None
    return engine._host.engine


def owners(engine: AsyncEngine) -> list[Any]:
    """The requests that the step loop knows."""
    assert isinstance(engine._host, ThreadHost) and engine._host._loop is not None
    return list(engine._host._loop._owners)


class Gate:
    """Holds the engine's thread before each step until it is let through."""

    def __init__(self, runner: FakeModelRunner) -> None:
        self._permits = threading.Semaphore(0)
        self._is_open = False
        runner.before_step = self.wait

    def wait(self, plan: object) -> None:
        if not self._is_open:
            self._permits.acquire()

    def let(self, num_steps: int) -> None:
        self._permits.release(num_steps)

    def open(self) -> None:
        self._is_open = True
        self._permits.release(1000)


async def test_a_request_streams_to_its_end() -> None:
    async with running_engine() as engine:
        deltas = await collect(engine.generate(list(b"hello"), GREEDY, request_id="x"))
    whole = join(deltas)
    assert whole.token_ids == tuple(run_alone(make_request(prompt=b"hello")))
    assert (whole.finish_reason, whole.num_prompt_tokens, whole.num_output_tokens) == ("length", 5, 8)
    assert [delta.finish_reason for delta in deltas[:-1]] == [None] * (len(deltas) - 1)


async def test_what_was_loaded_is_there_when_ready() -> None:
    runner = FakeModelRunner()
    async with running_engine(runner, served_model_name="mine") as engine:
        assert engine.is_ready and engine.error is None
        assert engine.capacity is runner.capacity and engine.model_config is runner.model_config
        assert engine.tokenizer is load_text()[0] and engine.chat_template is load_text()[1]
        assert engine.generation_defaults.eos_ids == ()
        assert engine.served_model_name == "mine"
        assert engine.created > 1_600_000_000
    assert runner.is_closed and not engine.is_ready and engine.error is None


async def test_fifty_requests_at_once_answer_as_they_would_alone() -> None:
    runner = FakeModelRunner(num_blocks=60)  # less than they need together
    prompts = [[*range(i % 7), *range(100, 103 + i)] for i in range(50)]
    async with running_engine(runner) as engine:
        streams = [engine.generate(p, GREEDY, request_id=f"r{i}") for i, p in enumerate(prompts)]
        outputs = [join(deltas).token_ids for deltas in await asyncio.gather(*map(collect, streams))]
        await idle(engine)
        assert engine.stats().num_free_blocks == 59
    assert outputs == [tuple(run_alone(make_request(prompt=prompt))) for prompt in prompts]


async def test_choices_carry_their_index_and_their_own_seed() -> None:
    params = SamplingParams(n=3, seed=5, max_tokens=8, ignore_eos=True)
    async with running_engine() as engine:
        deltas = await collect(engine.generate(list(b"hello"), params, request_id="x"))
        (alone,) = [
            join(await collect(engine.generate(list(b"hello"), SamplingParams(seed=6, max_tokens=8), request_id="y")))
        ]
    choices = [join([delta for delta in deltas if delta.index == index]) for index in range(3)]
    assert len({choice.token_ids for choice in choices}) == 3
    assert choices[1].token_ids == alone.token_ids
    assert all(choice.finish_reason == "length" for choice in choices)


async def test_a_choice_that_ends_early_does_not_end_the_others() -> None:
    runner = FakeModelRunner()
    runner.choose = say("a", "a long answer", "END")
    async with running_engine(runner) as engine:
        deltas = await collect(engine.generate([1], SamplingParams(n=3, stop=("END",)), request_id="x"))
    texts = {i: join([delta for delta in deltas if delta.index == i]).text for i in range(3)}
    assert texts == {0: "a", 1: "a long answer", 2: ""}


async def test_stop_strings_free_their_blocks() -> None:
    runner = FakeModelRunner()
    runner.choose = say("one END two")
    async with running_engine(runner) as engine:
        whole = join(await collect(engine.generate([1], SamplingParams(stop=("END",)), request_id="x")))
        await idle(engine)
        assert engine.stats().num_free_blocks == 999
    assert (whole.text, whole.stop_reason) == ("one ", "END")


async def test_one_hop_a_step_serves_all_requests() -> None:
    runner = FakeModelRunner()
    gate = Gate(runner)
    async with running_engine(runner) as engine:
        loop, hops = asyncio.get_running_loop(), list[Any]()
        call_soon_threadsafe = loop.call_soon_threadsafe

        def count(callback: Any, *args: Any, **kwargs: Any) -> Any:
            hops.append(callback)
            return call_soon_threadsafe(callback, *args, **kwargs)

        tasks = [asyncio.ensure_future(collect(engine.generate([i], GREEDY, request_id=str(i)))) for i in range(8)]
        await asyncio.sleep(0)
        loop.call_soon_threadsafe = count  # type: ignore[method-assign, assignment]
        gate.open()
        await asyncio.gather(*tasks)
        loop.call_soon_threadsafe = call_soon_threadsafe  # type: ignore[method-assign]
    assert len(hops) <= len(runner.plans)


@pytest.mark.parametrize("how", ["aclose", "cancel", "forget"])
async def test_a_reader_that_leaves_frees_its_blocks_at_the_next_step(how: str) -> None:
    runner = FakeModelRunner()
    gate = Gate(runner)
    async with running_engine(runner) as engine:
        stream: Any = engine.generate(list(b"hello"), LONG, request_id="x")
        stays = asyncio.ensure_future(collect(engine.generate(list(b"stays"), GREEDY, request_id="y")))
        gate.let(2)
        if how == "cancel":
            task = asyncio.ensure_future(collect(stream))
            while len(runner.plans) < 2:
                await asyncio.sleep(0.001)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        else:
            await anext(stream)
            if how == "aclose":
                await stream.aclose()
            stream = None
            gc.collect()
            await asyncio.sleep(0.01)
        gate.open()
        assert len(join(await stays).token_ids) == 8
        await idle(engine)
        assert engine.stats().num_free_blocks == 999
        num_steps = sum("x" in [e.request.request_id for e in plan.entries] for plan in runner.plans)
        assert num_steps <= 4, "and no more of it is computed"
        again = engine.generate(list(b"hello"), GREEDY, request_id="x")
        assert join(await collect(again)).finish_reason == "length"


async def test_a_reader_that_leaves_before_it_was_admitted_is_never_run() -> None:
    runner = FakeModelRunner()
    gate = Gate(runner)
    async with running_engine(runner) as engine:
        first = asyncio.ensure_future(collect(engine.generate([1], GREEDY, request_id="first")))
        second = asyncio.ensure_future(collect(engine.generate([2], GREEDY, request_id="second")))
        while not open_calls(engine):
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.005)
        second.cancel()
        await asyncio.gather(second, return_exceptions=True)
        gate.open()
        assert join(await first).finish_reason == "length"
        await idle(engine)
        assert not open_calls(engine) and not owners(engine)


async def test_readers_that_come_and_leave_at_random_lose_no_block() -> None:
    rng = random.Random(1)
    runner = FakeModelRunner(num_blocks=40)

    async def read(engine: AsyncEngine, name: str) -> None:
        prompt, num_deltas = [rng.randrange(3) for _ in range(rng.randrange(1, 20))], rng.randrange(12)
        how = rng.choice(["stay", "stay", "leave", "abort"])
        params = SamplingParams(n=rng.choice([1, 1, 2]), seed=7, max_tokens=rng.randrange(1, 30), ignore_eos=True)
        await asyncio.sleep(rng.random() / 50)
        stream = engine.generate(prompt, params, request_id=name)
        seen: list[Delta] = []
        async with contextlib.aclosing(stream):
            async for delta in stream:
                seen.append(delta)
                if how == "leave" and len(seen) > num_deltas:
                    return
                if how == "abort" and len(seen) > num_deltas:
                    engine.abort(name)
        last = [delta for delta in seen if delta.finish_reason]
        assert len(last) == params.n
        for delta in last:
            said = join([other for other in seen if other.index == delta.index]).token_ids
            request = make_request(
                prompt=prompt, max_tokens=params.max_tokens or 0, seed=7 + delta.index, temperature=1.0, ignore_eos=True
            )
            assert said == tuple(run_alone(request))[: len(said)]
            assert len(said) == params.max_tokens or delta.finish_reason == "abort"

    async with running_engine(runner) as engine:
        await asyncio.gather(*(read(engine, f"r{i}") for i in range(150)))
        await idle(engine)
        assert engine.stats().num_free_blocks == 39
        assert engine.stats().num_preemptions > 0
        assert not open_calls(engine) and not owners(engine)
        running(engine).core.scheduler.block_manager.audit()


async def test_a_slow_reader_finds_its_news_merged_and_holds_nobody() -> None:
    async with running_engine() as engine:
        slow = engine.generate(list(b"hello"), LONG, request_id="slow")
        first = await anext(slow)
        fast = await collect(engine.generate(list(b"other"), GREEDY, request_id="fast"))
        assert fast[-1].finish_reason == "length"
        await idle(engine)
        rest = await collect(slow)
    assert len(rest) <= 2
    assert join([first, *rest]).num_output_tokens == len(join([first, *rest]).token_ids) == 200


async def test_abort_ends_every_choice_with_a_last_delta() -> None:
    runner = FakeModelRunner()
    gate = Gate(runner)
    async with running_engine(runner) as engine:
        params = SamplingParams(n=2, max_tokens=200, ignore_eos=True)
        stream = engine.generate([1], params, request_id="x")
        gate.let(1)
        await anext(stream)
        engine.abort("x")
        engine.abort("never heard of")
        gate.open()
        last = [delta for delta in await collect(stream) if delta.finish_reason]
        assert sorted((delta.index, delta.finish_reason) for delta in last) == [(0, "abort"), (1, "abort")]
        await idle(engine)
        assert engine.stats().num_free_blocks == 999


@pytest.mark.parametrize(
    ("prompt_ids", "params", "error", "message"),
    [
        ([], GREEDY, RequestError, "empty"),
        ([5, 260], GREEDY, RequestError, "token id 260"),
        ([5] * 256, SamplingParams(max_tokens=None), ContextLengthError, "the prompt has 256 tokens"),
        ([5] * 250, SamplingParams(max_tokens=7), ContextLengthError, "257 were requested"),
    ],
)
async def test_refusals_come_before_the_first_delta(
    prompt_ids: list[int], params: SamplingParams, error: type[Exception], message: str
) -> None:
    async with running_engine() as engine:
        with pytest.raises(error, match=message):
            await anext(engine.generate(prompt_ids, params, request_id="x"))
        assert not open_calls(engine)


async def test_a_request_id_in_use_is_refused() -> None:
    runner = FakeModelRunner()
    gate = Gate(runner)
    async with running_engine(runner) as engine:
        first = asyncio.ensure_future(collect(engine.generate([1], GREEDY, request_id="x")))
        while not open_calls(engine):
            await asyncio.sleep(0.001)
        with pytest.raises(RequestError, match="'x' is in use"):
            await anext(engine.generate([1], GREEDY, request_id="x"))
        gate.open()
        assert join(await first).finish_reason == "length"


async def test_a_refusal_on_the_engines_thread_reaches_the_reader_and_leaves_no_choice_behind() -> None:
    runner = FakeModelRunner()
    gate = Gate(runner)
    async with running_engine(runner) as engine:
        first = asyncio.ensure_future(collect(engine.generate([1], GREEDY, request_id="x:1")))
        while not open_calls(engine):
            await asyncio.sleep(0.001)
        second = asyncio.ensure_future(
            collect(engine.generate([1], SamplingParams(n=3, max_tokens=8), request_id="x"))  # its x:1 is taken
        )
        await asyncio.sleep(0.005)
        gate.open()
        with pytest.raises(RequestError, match="'x:1' is in use"):
            await second
        assert join(await first).finish_reason == "length"
        await idle(engine)
        assert not owners(engine) and engine.stats().num_free_blocks == 999


async def test_a_failing_step_ends_its_requests_with_an_error_and_the_engine_goes_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    runner = FakeModelRunner()

    def fail_once(plan: object) -> None:
        runner.before_step = lambda plan: None
        raise RuntimeError("one bad step")

    runner.before_step = fail_once
    async with running_engine(runner) as engine:
        with caplog.at_level(logging.CRITICAL):
            (delta,) = await collect(engine.generate([1], GREEDY, request_id="x"))
        assert delta.finish_reason == "error" and "one bad step" in str(delta.error)
        assert join(await collect(engine.generate([1], GREEDY, request_id="y"))).finish_reason == "length"
        assert engine.is_ready


class Bomb(BaseException):
    """What no part of the engine catches."""


@pytest.mark.parametrize("bomb", [Bomb("boom"), RuntimeError("boom")])
async def test_a_dead_engine_raises_in_every_reader(bomb: BaseException, caplog: pytest.LogCaptureFixture) -> None:
    runner = FakeModelRunner(max_num_seqs=2)
    gate = Gate(runner)
    async with running_engine(runner) as engine:
        with caplog.at_level(logging.CRITICAL + 1):
            tasks = [asyncio.ensure_future(collect(engine.generate([i], LONG, request_id=f"r{i}"))) for i in range(20)]
            while len(open_calls(engine)) < 20:
                await asyncio.sleep(0.001)

            def explode(plan: object) -> None:
                raise bomb

            runner.before_step = explode
            gate.open()
            results = await asyncio.gather(*tasks, return_exceptions=True)
        for result in results:
            is_failed_step = isinstance(result, list) and result[-1].finish_reason == "error"
            assert is_failed_step or isinstance(result, EngineDeadError), result
        assert sum(isinstance(result, EngineDeadError) for result in results) >= 14
        assert isinstance(engine.error, EngineDeadError) and "boom" in str(engine.error)
        assert not engine.is_ready
        with pytest.raises(EngineDeadError, match="boom"):
            await anext(engine.generate([1], GREEDY, request_id="late"))
        with pytest.raises(EngineDeadError, match="boom"):
            await engine.wait_ready()
    assert runner.is_closed


async def test_a_failed_start_surfaces_where_it_is_waited_for() -> None:
    def load(config: EngineConfig, progress: object) -> LoadedEngine:
        raise ModelError("no such model")

    engine = AsyncEngine.start(EngineConfig("tiny"), load=load)
    with pytest.raises(ModelError, match="no such model"):
        await engine.wait_ready()
    assert isinstance(engine.error, ModelError) and not engine.is_ready
    with pytest.raises(ModelError):
        await anext(engine.generate([1], GREEDY, request_id="x"))
    with pytest.raises(EngineDeadError, match="not loaded"):
        _ = engine.capacity
    assert engine.served_model_name == "tiny"
    assert engine.stats().num_running == 0
    await engine.shutdown()


async def test_the_name_is_that_of_the_files_before_they_are_loaded(tiny_hf_files: ModelFiles) -> None:
    def load(config: EngineConfig, progress: object) -> LoadedEngine:
        raise ModelError("not now")

    engine = AsyncEngine.start(EngineConfig(str(tiny_hf_files.path)), load=load)
    assert engine.served_model_name == tiny_hf_files.name
    await engine.shutdown()


async def test_progress_is_passed_on_and_a_shutdown_ends_the_start() -> None:
    seen, is_loading = [], threading.Event()

    def load(config: EngineConfig, progress: Any) -> LoadedEngine:
        progress("load", 1, 2)
        is_loading.set()
        while True:
            progress("warm-up", 1, 2)

    engine = AsyncEngine.start(EngineConfig("tiny"), lambda *report: seen.append(report), load)
    waiting = [asyncio.ensure_future(engine.wait_ready()) for _ in range(2)]
    while not is_loading.is_set():
        await asyncio.sleep(0.001)
    waiting[0].cancel()  # one caller that stops waiting does not stop the others from waiting
    await asyncio.sleep(0)
    await engine.shutdown()
    with pytest.raises(EngineDeadError, match="before it was ready"):
        await waiting[1]
    assert seen[0] == ("load", 1, 2)


async def test_shutdown_aborts_what_runs() -> None:
    runner = FakeModelRunner()
    gate = Gate(runner)
    async with running_engine(runner) as engine:
        stream = engine.generate([1], LONG, request_id="x")
        gate.let(1)
        await anext(stream)
        reader = asyncio.ensure_future(collect(stream))
        stopping = asyncio.ensure_future(engine.shutdown())
        await asyncio.sleep(0)
        with pytest.raises(EngineDeadError, match="shut down"):
            await anext(engine.generate([1], GREEDY, request_id="late"))
        gate.open()
        await stopping
        assert (await reader)[-1].finish_reason == "abort"
        assert runner.is_closed and engine.stats().num_free_blocks == 999


async def test_shutdown_drains_when_it_is_given_time() -> None:
    runner = FakeModelRunner()
    gate = Gate(runner)
    async with running_engine(runner) as engine:
        streams = [engine.generate([i], LONG, request_id=str(i)) for i in range(20)]
        readers = [asyncio.ensure_future(collect(stream)) for stream in streams]
        while len(open_calls(engine)) < 20:
            await asyncio.sleep(0.001)
        stopping = asyncio.ensure_future(engine.shutdown(drain_s=3600))
        await asyncio.sleep(0)
        assert not engine.is_ready
        gate.open()
        await stopping
        assert all(join(deltas).finish_reason == "length" for deltas in await asyncio.gather(*readers))


async def test_a_second_shutdown_hurries_the_first() -> None:
    runner = FakeModelRunner(max_model_len=90_000, num_blocks=30_000)
    async with running_engine(runner) as engine:
        endless = SamplingParams(max_tokens=80_000, ignore_eos=True)
        stream = engine.generate([1], endless, request_id="x")
        await anext(stream)
        drain = asyncio.ensure_future(engine.shutdown(drain_s=3600))
        await asyncio.sleep(0.005)
        await engine.shutdown()
        await drain
        assert (await collect(stream))[-1].finish_reason == "abort"


async def test_an_idle_engine_sleeps() -> None:
    runner = FakeModelRunner()
    async with running_engine(runner) as engine:
        await collect(engine.generate([1], GREEDY, request_id="x"))
        num_waits = 0
        assert isinstance(engine._host, ThreadHost)
        wake = engine._host.door._wake
        wait = wake.wait

        def count(timeout: float | None = None) -> bool:
            nonlocal num_waits
            num_waits += 1
            assert timeout is None
            return wait(timeout)

        wake.wait = count  # type: ignore[method-assign]
        await collect(engine.generate([1], GREEDY, request_id="y"))
        await asyncio.sleep(0.05)
        assert num_waits <= 2


def test_readers_on_a_loop_that_was_closed_are_dropped() -> None:
    runner = FakeModelRunner()

    def load(config: EngineConfig, progress: object) -> LoadedEngine:
        return make_loaded(runner)

    engine = AsyncEngine.start(EngineConfig("tiny"), load=load)

    async def open_and_vanish() -> None:
        """Leave a stream open that nobody will close, as when a loop is stopped by force."""
        await engine.wait_ready()
        await engine.submit([1], LONG, Reader(), request_id="x")

    async def go_on() -> Delta:
        whole = join(await collect(engine.generate([1], GREEDY, request_id="x")))
        await engine.shutdown()
        return whole

    gate = Gate(runner)
    asyncio.run(open_and_vanish())
    gate.open()
    while not runner.plans or owners(engine) or engine.stats().num_running:
        threading.Event().wait(0.001)
    assert asyncio.run(go_on()).finish_reason == "length"


async def test_eos_ends_a_stream() -> None:
    runner = FakeModelRunner()
    runner.choose = say("hi")
    async with running_engine(runner) as engine:
        whole = join(await collect(engine.generate([1], SamplingParams(max_tokens=None), request_id="x")))
    assert (whole.text, whole.finish_reason, whole.token_ids) == ("hi", "stop", (*b"hi", EOS_ID))
