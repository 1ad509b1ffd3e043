"""The points of a real device (the CPU) with a tiny model: while it serves, and while it starts.

While it serves, each fails in turn under requests of all kinds; the next answer is the one of before, token for token.
While it starts, each ends the start with an error and leaves nothing, or is done without.
"""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.builders import write_tiny_hf_llama
from tests.faults.rounds import OK, Rounds
from tests.sweeps import swept
from tinyvllm.config import CACHE_DIR_VARIABLE, EngineConfig
from tinyvllm.engine.async_engine import AsyncEngine
from tinyvllm.faults import NOTHING, POINTS, REQUEST, VARIABLE, Fault, Plan, planned

SERVING = ("runner.pack", "device.copy_in", "device.run", "device.copy_out", "device.pool", "device.logits")
# One model and one shape of engine for all tests of this folder, which share its programs. The head is its own,
# since no logits of a tied one would be finite if a token's embedding is not.
NUM_BLOCKS = 24
TINY: dict[str, Any] = {
    "layers": 1, "hidden": 32, "heads": 2, "kv_heads": 2, "head_dim": 16, "ffn": 32, "tie": False,
}  # fmt: skip
SHAPE: dict[str, Any] = {
    "max_model_len": 160, "max_num_batched_tokens": 16, "max_num_seqs": 2, "num_gpu_blocks_override": NUM_BLOCKS,
}  # fmt: skip


def make_config(model: Path, **settings: Any) -> EngineConfig:
    return EngineConfig(str(model), **{**SHAPE, "warm_up": "background", **settings})


@asynccontextmanager
async def running(config: EngineConfig) -> AsyncIterator[AsyncEngine]:
    engine = AsyncEngine.start(config)
    try:
        await engine.wait_ready()
        yield engine
    finally:
        await engine.shutdown()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(write_tiny_hf_llama(tmp_path_factory.mktemp("faults") / "tiny", **TINY).path)


@pytest.mark.parametrize("overlaps", [pytest.param(False, marks=pytest.mark.sweep), True])
async def test_each_point_of_a_device_that_serves_fails_once(model: Path, overlaps: bool) -> None:
    async with running(make_config(model, async_scheduling=overlaps)) as engine:
        rounds = Rounds(engine)
        with planned(Fault("runner.capture", "memory")) as plan:  # larger graphs take its place
            while engine.stats().num_captures_to_come:
                assert await rounds.answers() == OK
        assert engine.stats().num_failed_captures == len(plan.happened) == 1
        with planned() as quiet:
            outcomes = await rounds.run()
        assert set(outcomes.values()) == {OK} and set(quiet.reached) >= set(SERVING), (outcomes, quiet.reached)
        before = await rounds.left()
        for number, point in enumerate(SERVING):
            how = "nan" if point == "device.logits" else "device"
            times = (1, max(1, quiet.reached[point] // 2))
            for at in {times[number % 2]} if overlaps else {*times}:  # by default one of them
                with planned(Fault(point, how, at=at)) as plan:
                    outcomes = await rounds.run()
                failed = [kind for kind, outcome in outcomes.items() if outcome != OK]
                assert bool(failed) == bool(plan.happened) and (failed or at > 1), (point, outcomes)
                assert len(failed) == 1 or POINTS[point].ends != REQUEST, outcomes
                assert await rounds.answers() == OK, point
                left = await rounds.left()
                assert left["free_blocks"] == NUM_BLOCKS - 1 and left["owned_requests"] == left["calls"] == 0, left
                assert left["threads"] <= before["threads"] and left["tasks"] == before["tasks"], (before, left)


def buffers() -> int:
    from tinygrad.device import Buffer

    gc.collect()
    return sum(type(thing) is Buffer for thing in gc.get_objects())


async def start_once(config: EngineConfig, *faults: Fault) -> dict[str, int]:
    """Start an engine and have it answer; returns the points that its start reached. Raises what starting raises."""
    with planned(*faults) as plan:
        async with running(config) as engine:
            reached = dict(plan.reached)
            assert await Rounds(engine).answers() == OK
    return reached


async def fails_to_start(config: EngineConfig, fault: Fault) -> bool:
    try:
        await start_once(config, fault)
    except MemoryError as error:
        return str(error) == f"planned at {fault.point}"
    return False


START = ("device.allocate", "device.copy_in", "cache.open", "cache.read", "cache.write")


@pytest.mark.parametrize("points", swept([(START,), (START[::3],)], [(START[::3],)]), ids=["all", "some"])
async def test_each_point_of_a_start_ends_it_or_is_done_without(model: Path, points: tuple[str, ...]) -> None:
    config = make_config(model, warm_up="idle")
    reached = await start_once(config)
    num_threads = threading.active_count()
    for point in points:
        fault = Fault(point, "os" if point.startswith("cache") else "memory", at=max(1, reached.get(point, 0) // 2))
        if POINTS[point].ends == NOTHING:
            await start_once(config, fault)
        else:
            num_buffers = buffers()
            assert await fails_to_start(config, fault), point
            await asyncio.sleep(0)  # the event loop's current turn holds the error, and with it what failed
            assert buffers() <= num_buffers, point
        assert threading.active_count() <= num_threads, point


@pytest.mark.usefixtures("compiling_processes")
async def test_compiling_goes_on_without_failed_compilers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A cold start, of a shape that no other test has: a compiling process dies, the next ones fail, one is not given
    its kernel, and nothing can be saved; a process that traces dies too."""
    from tinyvllm.device.compiling import _end_pool

    files = write_tiny_hf_llama(tmp_path / "odd", **{**TINY, "ffn": 160, "hidden": 160})
    marks, cache = tmp_path / "marks", tmp_path / "cache"
    marks.mkdir()
    cache.mkdir(mode=0o700)
    monkeypatch.setenv(CACHE_DIR_VARIABLE, str(cache))
    faults = [
        Fault("compile.worker", "exit", at=2),
        Fault("compile.worker", "memory", at=3, times=2),
        Fault("trace.worker", "exit"),
    ]
    monkeypatch.setenv(VARIABLE, Plan(faults, str(marks)).encode())
    _end_pool()  # those that run have no plan
    try:
        with planned(Fault("compile.begin", "memory", at=3), Fault("cache.write", "os", times=1000)) as plan:
            async with running(make_config(Path(files.path), warm_up="idle")) as engine:
                assert await Rounds(engine).answers() == OK
    finally:
        _end_pool()
    assert {"compile.worker exit 2", "compile.worker memory 3"} <= {path.name for path in marks.iterdir()}
    assert {fault.point for fault in plan.happened} == {"compile.begin", "cache.write"}
    assert plan.reached["compile.here"] >= 3
    messages = [record.getMessage() for record in caplog.records]
    assert sum("cannot be kept for the next start" in message for message in messages) == 1
    assert any(message.startswith("kernel ") and "is done here" in message for message in messages)
