"""Engines and clients in different processes, or at least on different sides of a socket."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.engine.fakes import FakeModelRunner, join, load_text, make_loaded, say
from tests.execution.tiered import make_tiers
from tests.patience import PATIENCE_S, until
from tests.scheduling.fakes import make_request, run_alone
from tests.sweeps import examples
from tinyvllm.config import EngineConfig, GenerationDefaults, GrammarSpec, SamplingParams
from tinyvllm.engine import process_host
from tinyvllm.engine.adapters import Adapters, EngineAdapters
from tinyvllm.engine.async_engine import AsyncEngine
from tinyvllm.engine.board import StatsRow
from tinyvllm.engine.core import COUNTERS
from tinyvllm.engine.engine_server import EngineServer
from tinyvllm.engine.loading import LoadedEngine, Text
from tinyvllm.engine.messages import Batch, Output, decode_for_client, encode_message
from tinyvllm.engine.output import Delta
from tinyvllm.engine.process_host import Endpoint, ProcessHost
from tinyvllm.errors import DeviceError, EngineDeadError, ModelError, RequestError
from tinyvllm.execution.kv_tiers.rates import Rates
from tinyvllm.execution.kv_tiers.tiers import KvTiers
from tinyvllm.scheduling.adapter_slots import AdapterInfo
from tinyvllm.scheduling.plan import StepStats, count_step
from tinyvllm.scheduling.request import TokenLogprobs
from tinyvllm.scheduling.tiers import COUNTS as TIER_COUNTS

GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
LONG = SamplingParams(temperature=0.0, max_tokens=200, ignore_eos=True)


class Engines:
    """Engine servers on threads, behind real sockets, and a host for each of their front-ends."""

    def __init__(self, directory: Path, model: str) -> None:
        self.endpoints: list[Endpoint] = []
        self.servers: list[EngineServer] = []
        self.runners: list[FakeModelRunner] = []
        self.tiers: dict[int, KvTiers] = {}  # by engine, if it has any
        self.adapters: dict[int, FakeTable] = {}  # the same
        self.config = EngineConfig(model)
        self._directory = directory
        self._threads: list[threading.Thread] = []

    def add(self, runner: FakeModelRunner | None = None) -> None:
        number = len(self.endpoints)
        endpoint = Endpoint(f"ipc://{self._directory}/e{number}", str(self._directory / f"stats{number}"))
        self.endpoints.append(endpoint)
        self.runners.append(runner or FakeModelRunner())
        self.servers.append(EngineServer(self.config, endpoint))
        self._threads.append(threading.Thread(target=self._serve, args=(number,)))
        self._threads[-1].start()

    def _serve(self, number: int) -> None:
        def load(config: EngineConfig, progress: object) -> LoadedEngine:
            loaded = make_loaded(self.runners[number], tiers=self.tiers.get(number))
            if (table := self.adapters.get(number)) is not None:
                loaded.core.adapters = EngineAdapters(cast(Adapters, table), loaded.core.scheduler)
            return loaded

        self.servers[number].run(lambda *report: None, lambda engine: None, load)

    def host(self, name: str = "a", index: int = 0) -> ProcessHost:
        return ProcessHost(self.config, self.endpoints, name, index)

    def stop(self, number: int) -> None:
        self.servers[number].stop()
        self._threads[number].join()

    def close(self) -> None:
        for number in range(len(self.servers)):
            self.stop(number)


@pytest.fixture
def engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engines]:

    tokenizer, template = load_text()
    text = Text(tokenizer=tokenizer, chat_template=template, generation_defaults=GenerationDefaults())
    monkeypatch.setattr(process_host, "load_text", lambda config: text)
    both = Engines(tmp_path, "tiny")
    yield both
    both.close()


@asynccontextmanager
async def connected(engines: Engines, name: str = "a", index: int = 0) -> AsyncIterator[AsyncEngine]:
    engine = AsyncEngine(engines.config, engines.host(name, index))
    await engine.wait_ready()
    try:
        yield engine
    finally:
        await engine.shutdown()


class FakeTable:
    """An engine's adapters. What a path holds is `files`, by path; one with "bad" in it cannot be read."""

    def __init__(self, files: dict[str, str]) -> None:
        self.files, self.known = files, dict[str, AdapterInfo]()

    @property
    def infos(self) -> list[AdapterInfo]:
        return list(self.known.values())

    def read(self, path: str) -> str:
        if "bad" in self.files[path]:
            raise ModelError(f"{path} is bad")
        return self.files[path]

    def add(self, name: str, path: str, weights: str, *, replaces: bool = False, held: object = ()) -> AdapterInfo:
        self.known[name] = AdapterInfo(name, path, weights, 8, "", 0.0)
        return self.known[name]

    def remove(self, name: str) -> AdapterInfo:
        return self.known.pop(name)

    def forget_unused(self, used: object) -> list[str]:
        return []


async def test_an_adapter_that_one_engine_cannot_replace_stays_in_all(engines: Engines) -> None:
    tables = [FakeTable({"/old": "old", "/new": "new"}), FakeTable({"/old": "old", "/new": "bad"})]
    for number, table in enumerate(tables):
        engines.adapters[number] = table
        engines.add()
    async with connected(engines) as engine:
        old = await engine.load_adapter("a", "/old")
        with pytest.raises(RequestError, match="/new is bad"):
            await engine.load_adapter("a", "/new", replaces=True)
        assert engine.adapters() == [old] == tables[0].infos == tables[1].infos
        tables[0].files["/old"] = "other"  # so it cannot be had back
        with pytest.raises(RequestError, match="/new is bad"):
            await engine.load_adapter("a", "/new", replaces=True)
        assert engine.adapters() == [] == tables[0].infos == tables[1].infos


async def read(engine: AsyncEngine, prompt: bytes, params: SamplingParams, name: str) -> Delta:
    return join([delta async for delta in engine.generate(list(prompt), params, request_id=name)])


def host_of(engine: AsyncEngine) -> ProcessHost:
    assert isinstance(engine._host, ProcessHost)
    return engine._host


async def test_tokens_are_those_of_an_engine_in_the_same_process(engines: Engines) -> None:
    engines.add()
    prompts = [bytes(range(97, 98 + i)) for i in range(12)]
    async with connected(engines, "a") as one, connected(engines, "b", 1) as two:
        calls = [
            read(side, prompt, GREEDY, f"{i}.{j}")
            for i, side in enumerate((one, two))
            for j, prompt in enumerate(prompts)
        ]
        answers = await asyncio.gather(*calls)
        await until(lambda: one.stats().num_running == 0)
        assert one.stats().num_free_blocks == two.stats().num_free_blocks == 999
        assert one.capacity == engines.runners[0].capacity and one.model_config == engines.runners[0].model_config
    assert [answer.token_ids for answer in answers] == 2 * [tuple(run_alone(make_request(prompt=p))) for p in prompts]
    assert all(answer.num_output_tokens == 8 and answer.timing is not None for answer in answers)


async def test_logprobs_prompt_logprobs_and_stop_strings_cross_the_socket(engines: Engines) -> None:
    runner = FakeModelRunner()
    runner.choose = say("one END two")
    engines.add(runner)
    params = SamplingParams(stop=("END",), logprobs=2, prompt_logprobs=1, max_tokens=50)
    async with connected(engines) as engine:
        answer = await read(engine, b"hello", params, "x")
        await until(lambda: engine.stats().num_running == 0)
        assert engine.stats().num_free_blocks == 999
    assert (answer.text, answer.finish_reason, answer.stop_reason) == ("one ", "stop", "END")
    assert len(answer.logprobs) == answer.num_output_tokens == len("one END") and len(answer.logprobs[0].top) == 2
    assert answer.prompt_logprobs is not None and len(answer.prompt_logprobs) == 5


async def test_a_grammar_is_compiled_where_its_matcher_is_used(engines: Engines) -> None:
    runner = FakeModelRunner()
    runner.choose = say("42")
    engines.add(runner)
    async with connected(engines) as engine:
        answer = await read(engine, b"x", SamplingParams(grammar=GrammarSpec("regex", "[0-9]{2}")), "x")
        with pytest.raises(RequestError, match="structured_outputs"):
            await read(engine, b"x", SamplingParams(grammar=GrammarSpec("regex", "[")), "y")
    assert (answer.text, answer.finish_reason) == ("42", "stop")
    assert runner.plans[0].entries[0].request.constraint is not None


async def test_a_refusal_by_the_engine_reaches_the_caller(engines: Engines) -> None:
    engines.add()
    async with connected(engines, "a") as one, connected(engines, "b") as two:
        stream = one.generate(list(b"hello"), LONG, request_id="same")
        await anext(stream)
        with pytest.raises(RequestError, match="'same' is in use"):
            await read(two, b"x", GREEDY, "same")
        await stream.aclose()


async def test_a_reader_that_leaves_and_a_client_that_dies_free_their_blocks(engines: Engines) -> None:
    engines.add(FakeModelRunner(max_model_len=90_000, num_blocks=30_000))
    endless = SamplingParams(max_tokens=80_000, ignore_eos=True)
    async with connected(engines, "stays") as stays:
        async with connected(engines, "dies") as dies:
            left, *others = [
                side.generate([1], endless, request_id=name)
                for side, name in ((stays, "left"), (dies, "x"), (dies, "y"))
            ]
            for stream in (left, *others):
                await anext(stream)
            await left.aclose()
            await until(lambda: stays.stats().num_running == 2)
            engines.servers[0].drop_client("dies")
            await until(lambda: stays.stats().num_running == 0)
        assert (await stays.audit())[0]["owned_requests"] == 0
        assert (await read(stays, b"hello", GREEDY, "z")).finish_reason == "length"


async def test_questions_are_answered_from_the_other_side(engines: Engines) -> None:
    engines.add()
    async with connected(engines) as engine:
        await read(engine, b"hello", GREEDY, "x")
        [steps], [states] = await engine.latest_steps(), await engine.pool_states()
        with pytest.raises(EngineDeadError, match="no question"):
            await engine._ask_all("weather")
    assert [step.number for step in steps] == list(range(1, len(steps) + 1))
    assert sum(step.stats.num_tokens for step in steps) == 12
    assert len(states) == 999


async def test_an_engine_that_pools_nothing_embeds_nothing(engines: Engines) -> None:
    engines.add()
    async with connected(engines) as engine:
        with pytest.raises(DeviceError, match="could not be embedded"):
            await engine.embed([1, 2], request_id="x")  # the fake device does not


async def test_an_engine_that_stops_ends_its_calls_and_a_new_one_serves_again(engines: Engines) -> None:
    engines.add(FakeModelRunner(max_model_len=90_000, num_blocks=30_000))
    async with connected(engines) as engine:
        host = host_of(engine)
        stream = engine.generate([1], SamplingParams(max_tokens=80_000, ignore_eos=True), request_id="x")
        await anext(stream)
        engines.servers[0].stop()
        rest = [delta async for delta in stream]
        assert rest[-1].finish_reason == "abort"
        engines.stop(0)
        host.engine_died(0, "killed by signal 9")
        assert not engine.is_ready and "signal 9" in str(engine.error)
        with pytest.raises(EngineDeadError, match="signal 9"):
            await read(engine, b"x", GREEDY, "late")
        engines.servers[0] = EngineServer(engines.config, engines.endpoints[0])
        engines._threads[0] = threading.Thread(target=engines._serve, args=(0,))
        engines._threads[0].start()
        host.engine_started(0)
        await engine.wait_ready()
        assert engine.error is None
        assert (await read(engine, b"hello", GREEDY, "again")).finish_reason == "length"


async def test_a_conversation_stays_with_the_engine_that_has_its_prefix(engines: Engines) -> None:
    for _ in range(3):
        engines.add(FakeModelRunner(max_num_seqs=4))
    async with connected(engines) as engine:
        await until(lambda: all(line.is_ready for line in host_of(engine)._lines))

        async def converse(number: int) -> None:
            prompt = bytes([number]) * 17
            for turn in range(6):
                answer = await read(engine, prompt, GREEDY, f"{number}.{turn}")
                prompt += bytes(token % 256 for token in answer.token_ids) + b"and then?"

        await asyncio.gather(*(converse(number) for number in range(9)))
        stats, totals = engine.engine_stats(), engine.stats()
    assert all(one.extra["num_steps"] > 0 for one in stats), "every engine has its share"
    # 9 conversations of 6 turns: all but the first turn finds the blocks of the turns before
    expected = sum(9 * ((17 + turn * 17 - 1) // 4 * 4) for turn in range(1, 6))
    found = totals.prefix_hits
    assert found >= 0.9 * (expected - 9 * 5 * 17), (found, totals.prefix_queries)


async def test_prompt_tokens_from_a_tier_are_counted_apart(
    engines: Engines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Rates, "pays", lambda *arguments: True)
    runner = FakeModelRunner(num_blocks=200)
    engines.tiers[0] = make_tiers(runner, folder=tmp_path / "kv")
    engines.add(runner)
    async with connected(engines) as engine:
        await read(engine, b"p" * 41, GREEDY, "first")
        await until(lambda: len(list((tmp_path / "kv").rglob("*.kv"))) >= 10)
        assert engines.tiers[0].disk is not None
        await asyncio.to_thread(engines.tiers[0].disk.wait_idle)
        await engine.reset_prefix_cache()
        counted = []
        for number in range(2):
            delta = await read(engine, b"p" * 41, GREEDY, f"again{number}")
            assert delta.timing is not None
            counted.append((delta.num_cached_tokens, delta.timing.num_restored_tokens))
        assert counted == [(40, 40), (40, 0)], "from disk, and then in the pool"
        queries = engine.engine_stats()[0].extra["tier_queries"]
        scored = SamplingParams(max_tokens=1, prompt_logprobs=0)
        await engine.reset_prefix_cache()
        await read(engine, b"p" * 41, GREEDY, "restored")
        await read(engine, b"p" * 41, scored, "computed whole")
        assert engine.engine_stats()[0].extra["tier_queries"] == queries + 41 + 41
    engines.tiers[0].close()


async def test_a_reset_reaches_the_tiers_of_all_engines_that_share_a_folder(engines: Engines, tmp_path: Path) -> None:
    folder = tmp_path / "kv"
    for number in range(2):
        runner = FakeModelRunner(max_num_seqs=2, max_model_len=4096, num_blocks=2000)
        engines.tiers[number] = make_tiers(runner, folder=folder)
        engines.add(runner)
    prompts = [bytes([number]) * 41 for number in range(4)]

    def num_files() -> int:
        return len(list(folder.rglob("*.kv")))

    async def found(engine: AsyncEngine) -> list[int]:
        """Of all prompts together: the most tokens that an engine has in its pool, and there or on disk."""
        places = [max(await engine.look_up_prefix(list(prompt))) for prompt in prompts]
        return [sum(place[depth] for place in places) for depth in (0, 2)]

    async def all_written() -> None:
        for tiers in engines.tiers.values():
            assert tiers.disk is not None
            await asyncio.to_thread(tiers.disk.wait_idle)

    async with connected(engines) as engine:
        await until(lambda: all(line.is_ready for line in host_of(engine)._lines))
        first = await asyncio.gather(*(read(engine, prompt, GREEDY, f"a{prompt[0]}") for prompt in prompts))
        assert all(one.extra["num_steps"] > 0 for one in engine.engine_stats()), "both engines have their share"
        await until(lambda: num_files() >= 4 * 10)
        await all_written()
        assert await found(engine) == [4 * 40, 4 * 40]
        await engine.reset_prefix_cache()
        assert await found(engine) == [0, 4 * 40] and num_files() >= 4 * 10
        stream = engine.generate(list(prompts[0]), LONG, request_id="runs on")  # its blocks are written meanwhile
        begun = [await anext(stream)]
        await engine.reset_prefix_cache(reset_external=True)
        assert await found(engine) == [0, 0]
        running = join(begun + [delta async for delta in stream])
        assert running.token_ids[:8] == first[0].token_ids
        await all_written()
        assert await found(engine) == [0, 0] and (await engine.audit())[0]["requests"] == 0
        again = await asyncio.gather(*(read(engine, prompt, GREEDY, f"b{prompt[0]}") for prompt in prompts))
        assert [delta.token_ids for delta in again] == [delta.token_ids for delta in first]
        assert not any(delta.num_cached_tokens for delta in again)
        assert all(one.extra["tier_failures"] == 0 for one in engine.engine_stats())
    for tiers in engines.tiers.values():
        tiers.close()


async def test_calls_of_a_dead_engine_run_elsewhere_unless_they_have_output(engines: Engines) -> None:
    blocked = FakeModelRunner(max_num_seqs=1)
    gate = threading.Event()
    blocked.before_step = lambda plan: (gate.wait(PATIENCE_S), None)[1]
    engines.add(blocked)
    engines.add()
    async with connected(engines) as engine:
        host = host_of(engine)
        await until(lambda: all(line.is_ready for line in host._lines))
        tasks = [asyncio.create_task(read(engine, bytes([i]) * 9, GREEDY, str(i))) for i in range(8)]
        await until(lambda: engine.engine_stats()[1].extra["num_output_tokens"] > 0)
        assert host._client is not None
        num_held = sum(call.engine == 0 for call in host._client.calls.values())
        assert num_held > 0
        host.engine_died(0, "killed by signal 9")
        answers = await asyncio.gather(*tasks)
        gate.set()
        assert engine.is_ready, "the other engine goes on"
    assert [answer.finish_reason for answer in answers] == ["length"] * 8
    assert [answer.token_ids for answer in answers] == [
        tuple(run_alone(make_request(prompt=bytes([i]) * 9))) for i in range(8)
    ]


def test_stats_are_read_as_they_were_written(tmp_path: Path) -> None:
    writer, reader = StatsRow(tmp_path / "stats"), StatsRow(tmp_path / "stats")
    assert reader.read() == StepStats(extra=dict.fromkeys((*COUNTERS, *TIER_COUNTS), 0.0))
    stats = StepStats(num_tokens=3, device_s=0.25, end_s=7.5, extra=dict.fromkeys((*COUNTERS, *TIER_COUNTS), 2.0))
    stats.step_sizes = count_step(stats.step_sizes, 3)
    writer.write(stats)
    assert reader.read() == stats


ids = st.integers(0, 2**31)
scores = st.builds(TokenLogprobs, st.floats(-9, 0), st.lists(st.tuples(ids, st.floats(-9, 0))).map(tuple))


@examples(30, 100)
@given(
    st.lists(st.tuples(ids, ids)),
    st.lists(
        st.builds(
            Output,
            number=ids,
            token_id=st.none() | ids,
            finish_reason=st.none() | st.sampled_from(("stop", "length")),
            stop_reason=st.none() | ids | st.text(),
            logprobs=st.none()
            | st.builds(TokenLogprobs, st.floats(-9, 0), st.lists(st.tuples(ids, st.floats(-9, 0))).map(tuple)),
            pooled=st.none() | st.binary(),
        )
    ),
)
def test_a_batch_survives_the_wire(tokens: list[tuple[int, int]], outputs: list[Output]) -> None:
    batch = Batch(1.5, [number for number, _ in tokens], [token for _, token in tokens], outputs)
    assert decode_for_client(encode_message(batch)) == batch
