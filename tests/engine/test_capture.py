"""An engine whose steps TinyJit captured answers as one whose steps are replayed: docs/CAPTURE.md."""

from __future__ import annotations

import asyncio
import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.engine.requests import SETTINGS, make_runner, run
from tests.families.recipe import write_hf
from tests.families.recipes import RECIPES
from tests.sweeps import swept
from tinyvllm import LLM, SamplingParams
from tinyvllm.config import CAPTURE_VARIABLE, EngineConfig, ModelFiles
from tinyvllm.device.recording import MOST_ROWS, Call
from tinyvllm.engine.async_engine import AsyncEngine
from tinyvllm.errors import TinyvllmError
from tinyvllm.execution.runner import ModelRunner

from tinygrad.helpers import GlobalCounters  # isort: skip  (tinyvllm makes its settings first)

TEXT = "to be or not to be, that is the question"


def kernels_of(runner: ModelRunner) -> dict[str, tuple[list[Any], list[Any]]]:
    """By bucket and instance: the kernels of the step, and those that sample from processed logits, in their order.
    Replays launch programs for any number of rows where rows are independent."""

    def kernel(call: Call) -> tuple[Any, ...]:
        info = call.target.arg
        name = info.name.replace(f"_{MOST_ROWS}", f"_{info.global_size[0]}")
        return name, info.global_size, info.local_size, call.target.key.hex()

    found = {}
    for bucket, graph in runner.captures.graphs.items():
        for index, instance in enumerate(graph.instances):
            calls = [[kernel(call) for call in step.calls] for step in (instance.step, instance.processed)]
            found[f"{bucket.name} {index}"] = calls[0], calls[1]
    return found


def assert_same_kernels(replayed: dict[str, Any], captured: dict[str, Any]) -> None:
    """By content, or those of any number of rows by name and size."""
    assert replayed.keys() == captured.keys()
    for bucket, steps in replayed.items():
        for ours, theirs in zip(steps, captured[bucket], strict=True):
            assert ours and [kernel[:3] for kernel in ours] == [kernel[:3] for kernel in theirs], bucket
            others = [(a, b) for a, b in zip(ours, theirs, strict=True) if f"_{a[1][0]}x" not in a[0]]
            assert all(a == b for a, b in others), bucket


@pytest.mark.parametrize("overlaps", swept((False, True), [True]), ids=["in turn", "overlapped"])
def test_tinyjit_captures_the_recorded_kernels_in_their_order_with_the_same_tokens(
    tiny_gguf_files: ModelFiles, overlaps: bool
) -> None:
    """Penalties, biases, masks that need the token before, seeds, chunks and preemptions among the requests."""
    kernels, answers = [], []
    for capture in ("replay", "tinyjit"):
        rows = {"max_num_seqs": 8, "decode_buckets": (8,)}  # as prompts have
        runner = make_runner(tiny_gguf_files, async_scheduling=overlaps, capture=capture, **rows)
        assert runner.max_in_flight == 1 + overlaps
        kernels.append(kernels_of(runner))
        tokens, core = run(runner, is_processed=True, num=12)
        assert core.stats.num_preemptions > 0
        answers.append((tokens, *run(runner)[:1]))
        runner.close()
    assert_same_kernels(*kernels)
    assert answers[0] == answers[1]


@pytest.mark.sweep  # the kernels and the tokens of both kinds are compared above
def test_cached_prefixes_scores_and_logprobs_are_the_same(tiny_gguf_files: ModelFiles) -> None:
    answers = []
    for capture in ("replay", "tinyjit"):
        settings = SETTINGS | {"num_gpu_blocks_override": 33, "capture": capture}
        llm = LLM(str(tiny_gguf_files.path), **settings)
        params = SamplingParams(temperature=0.0, max_tokens=8, logprobs=3, prompt_logprobs=2, ignore_eos=True)
        first = llm.generate([TEXT, TEXT[:9]], params)
        cached = llm.generate(TEXT, SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True))[0]
        assert cached.num_cached_tokens >= 32
        assert cached.outputs[0].token_ids == first[0].outputs[0].token_ids
        answers.append([(one.outputs[0].token_ids, one.outputs[0].logprobs, one.prompt_logprobs) for one in first])
        llm.close()
    assert answers[0] == answers[1]


@pytest.mark.sweep
def test_windows_and_general_kernels_are_captured_too(tmp_path: Path) -> None:
    """Of Gemma 3, whose operations are not all ours: tinygrad schedules some."""
    files = write_hf(tmp_path / "gemma3", RECIPES["gemma3"])
    answers, kernels = [], []
    for capture in ("replay", "tinyjit"):
        llm = LLM(str(files.path), capture=capture, **SETTINGS)
        outputs = llm.generate([TEXT, TEXT[:7]], SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True))
        answers.append([one.outputs[0].token_ids for one in outputs])
        runner = llm._loaded.runner
        assert isinstance(runner, ModelRunner)
        kernels.append(kernels_of(runner))
        llm.close()
    assert answers[0] == answers[1]
    assert_same_kernels(*kernels)


# by default, the same kernels and tokens above, and graphs that come one by one in tests/execution/test_captures.py
@pytest.mark.sweep
async def test_embeddings_and_streams_of_a_server_are_the_same(tiny_gguf_files: ModelFiles) -> None:
    """Graphs that come one by one while requests run, as a server's do."""

    async def answer(capture: str) -> tuple[list[int], np.ndarray]:
        config = EngineConfig(
            str(tiny_gguf_files.path), warm_up="background", capture=capture, async_scheduling=True, **SETTINGS
        )
        engine = AsyncEngine.start(config)
        params = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)

        async def stream(name: str) -> list[int]:
            deltas = [delta async for delta in engine.generate([5, 9, 11], params, request_id=name)]
            return [token for delta in deltas for token in delta.token_ids]

        texts = await asyncio.gather(*[stream(f"s{number}") for number in range(3)])
        embedding = await engine.embed(list(range(3, 40)), "mean", request_id="e")
        assert texts[1:] == texts[:-1]
        await engine.shutdown()
        return texts[0], embedding

    (tokens, embedding), (expected_tokens, expected_embedding) = await answer("tinyjit"), await answer("replay")
    assert tokens == expected_tokens
    np.testing.assert_array_equal(embedding, expected_embedding)


def test_a_closed_runner_holds_no_memory(tiny_gguf_files: ModelFiles) -> None:
    def used() -> int:
        gc.collect()
        return sum(GlobalCounters.mem_used_per_device[name] for name in ("CPU", "CPU:1"))

    before = used()
    for _ in range(2):
        runner = make_runner(tiny_gguf_files, capture="tinyjit", max_num_seqs=8, decode_buckets=(8,))
        bucket = runner.buckets[0]
        taken = used()
        runner.captures.remake(bucket)
        assert used() == taken, "a graph that was captured again leaves nothing of the one before"
        assert runner.captures.scratch_bytes > 0
        runner.close()
        del runner
    assert used() <= before


def test_what_keeps_tinyjit_from_capturing_is_refused(
    tiny_gguf_files: ModelFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(**settings: Any) -> None:
        LLM(str(tiny_gguf_files.path), max_model_len=64, **settings)

    with pytest.raises(TinyvllmError, match="--capture is 'graph': choose one of replay, tinyjit"):
        start(capture="graph")
    monkeypatch.setenv(CAPTURE_VARIABLE, "tinyjit")
    assert EngineConfig("tiny").capture == "tinyjit" and EngineConfig("tiny", capture="replay").capture == "replay"
    monkeypatch.setattr("tinygrad.helpers.JIT.value", 0)
    with pytest.raises(TinyvllmError, match="JIT=0 turns TinyJit off: unset it, or use --capture replay"):
        start()
