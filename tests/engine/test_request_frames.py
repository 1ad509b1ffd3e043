"""A request's way from the HTTP handler to the kernels, as docs/ARCHITECTURE.md draws it."""

from __future__ import annotations

import traceback

import pytest

from tests.house import PACKAGE, drawn_frames, read_package
from tinyvllm.config import EngineConfig, ModelFiles, SamplingParams
from tinyvllm.device import cpu_replay
from tinyvllm.engine.async_engine import AsyncEngine


def test_the_frames_on_the_page_exist_and_are_few() -> None:
    known = {f"{module.path}:{function.name}" for module in read_package() for function in module.functions}
    frames = drawn_frames()
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
    config = EngineConfig(
        str(tiny_gguf_files.path),
        max_model_len=64,
        max_num_seqs=1,
        max_num_batched_tokens=16,
        num_gpu_blocks_override=8,
    )
    engine = AsyncEngine.start(config)
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
