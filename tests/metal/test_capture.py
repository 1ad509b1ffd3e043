"""TinyJit captures the kernels that our replay launches on METAL, in their order, and an engine answers the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.builders import write_tiny_hf_llama
from tests.metal.scenarios import CROWDED, FUSED
from tests.metal.simulator import Settings, allowing_host_writes
from tinyvllm import LLM, SamplingParams
from tinyvllm.device.recording import MOST_ROWS
from tinyvllm.execution.runner import ModelRunner

# tests/engine/test_capture.py is on the CPU in every run; an engine compiles for 10 s on an idle core
pytestmark = [pytest.mark.sweep, pytest.mark.timeout(600)]

ENGINE = CROWDED  # whose programs tests/metal/test_engine.py needs, too
PROMPTS = ("the quick brown fox", "a")
SAMPLING = (
    SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True),
    SamplingParams(temperature=1.0, seed=3, max_tokens=6, ignore_eos=True, repetition_penalty=1.5, logprobs=2),
)


def kernels_of(runner: ModelRunner) -> dict[str, list[str]]:
    """Replays sample by programs for any number of rows."""
    instances = {
        f"{bucket.name} {index}": (instance, bucket.num_seqs)
        for bucket, graph in runner.captures.graphs.items()
        for index, instance in enumerate(graph.instances)
    }
    return {
        name: [
            call.target.arg.name.replace(f"_{MOST_ROWS}", f"_{num_rows}")
            for call in (*instance.step.calls, *instance.processed.calls)
        ]
        for name, (instance, num_rows) in instances.items()
    }


def test_tinyjit_captures_the_recorded_kernels_with_the_same_tokens(simulator: Settings | None, tmp_path: Path) -> None:
    files = write_tiny_hf_llama(tmp_path / "model", dtype="float16", **FUSED)
    kernels, answers = [], []
    for capture in ("replay", "tinyjit"):
        llm = LLM(str(files.path), capture=capture, **ENGINE)
        runner = llm._loaded.runner
        assert isinstance(runner, ModelRunner) and runner.max_in_flight == 2
        kernels.append(kernels_of(runner))
        plain = llm.generate(list(PROMPTS), SAMPLING[0])
        with allowing_host_writes(simulator):  # of inputs that the forward pass in flight does not read
            mixed = llm.generate(list(PROMPTS), SAMPLING)
        answers.append([(one.outputs[0].token_ids, one.outputs[0].logprobs) for one in (*plain, *mixed)])
        llm.close()
    assert kernels[0] == kernels[1] and len(kernels[1]) == 4
    assert answers[0] == answers[1]
