"""A request's way from the HTTP handler to the kernels, as docs/ARCHITECTURE.md draws it."""

from __future__ import annotations

import traceback

import pytest

from tests.engine.requests import SETTINGS
from tests.house import PACKAGE, drawn_frames, functions_in
from tinyvllm.config import EngineConfig, ModelFiles, SamplingParams
from tinyvllm.device import cpu_replay
from tinyvllm.engine.async_engine import AsyncEngine


def test_the_frames_on_the_page_exist_and_are_few() -> None:
    frames = drawn_frames()
    paths = {frame.partition(":")[0] for frame in frames}
    known = {f"{path}:{function.name}" for path in paths for function in functions_in(PACKAGE / path)}
    assert 10 < len(frames) <= 14
    assert not [frame for frame in frames if frame not in known]


async def test_a_real_request_goes_through_the_frames_on_the_page(
    tiny_gguf_files: ModelFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, stacks = cpu_replay._Queue.submit, []

    def submit(queue: cpu_replay._Queue) -> None:
        stacks.append(traceback.extract_stack()[:-1])  # without this function, which stands in for the last frame
        original(queue)

    monkeypatch.setattr(cpu_replay._Queue, "submit", submit)
    engine = AsyncEngine.start(EngineConfig(str(tiny_gguf_files.path), **SETTINGS))
    async for _ in engine.generate([1, 2, 3], SamplingParams(max_tokens=2), request_id="a"):
        pass
    await engine.shutdown()
    names = [
        f"{path}:{frame.name}"
        for frame in stacks[-1]
        if (path := frame.filename.removeprefix(f"{PACKAGE}/")) != frame.filename
    ]
    drawn = [frame.partition(":")[0] + ":" + frame.rpartition(":")[2].rpartition(".")[2] for frame in drawn_frames()]
    assert [*names, "device/cpu_replay.py:submit"] == drawn[5:]
