"""The whole engine on METAL gives the tokens that it gives on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.metal.scenarios import QUANTIZED, SCENARIOS, Answer, answer
from tests.metal.simulator import Settings, without_checks
from tests.sweeps import swept
from tinyvllm.config import ModelFiles

pytestmark = pytest.mark.timeout(600)  # an engine compiles for 10 s on an idle core, and there may be no idle one


class CpuProcess:
    """The CPU's answers, made in another process meanwhile."""

    def __init__(self, folder: Path, names: list[str]) -> None:
        self.folder, self._names = folder, names
        self._answers: dict[str, Answer] = {}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.metal.scenarios", str(folder), *names],
            env=os.environ | {"DEV": "CPU"},
            stdout=subprocess.PIPE,
            text=True,
        )

    def answer(self, name: str) -> Answer:
        assert self._process.stdout is not None
        while name not in self._answers:
            line = self._process.stdout.readline()
            assert line, f"the CPU's process ended with {self._process.wait()} before {name}"
            self._answers[self._names[len(self._answers)]] = Answer(**json.loads(line))
        return self._answers[name]

    def close(self) -> None:
        assert self._process.stdout is not None
        self._process.terminate()
        self._process.wait()
        self._process.stdout.close()


@pytest.fixture(scope="module")
def cpu(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[CpuProcess]:
    """Of the scenarios that this run has tests for, in their order."""
    chosen = (item.callspec.params.get("name") for item in request.session.items if hasattr(item, "callspec"))
    names = list(dict.fromkeys(name for name in chosen if name in SCENARIOS))
    process = CpuProcess(tmp_path_factory.mktemp("scenarios"), names)
    yield process
    process.close()


def assert_same_tokens(found: Answer, expected: Answer, tie: float) -> None:
    """Token for token, up to a place where the CPU itself was undecided."""
    compared = 0
    sequences = zip(found.tokens, expected.tokens, [*expected.gaps, expected.gaps[0]], strict=True)
    for index, (tokens, wanted, gaps) in enumerate(sequences):
        for place, (token, right, gap) in enumerate(zip(tokens, wanted, gaps, strict=True)):
            if token != right:
                assert gap < tie, f"sequence {index}: {tokens}, on the CPU {wanted}; a gap of {gap:.4f} at {place}"
                break
            compared += 1
    total = sum(len(tokens) for tokens in expected.tokens)
    assert compared >= 0.8 * total, f"only {compared} of {total} tokens could be compared"


@pytest.mark.parametrize("name", swept(("medium", "float16", "float32", "bfloat16"), ["float16"]))
def test_chunks_batches_preemption_and_prefix_hits_give_the_cpus_tokens(name: str, cpu: CpuProcess) -> None:
    expected = cpu.answer(name)
    found = answer(name, cpu.folder / name)
    assert found.num_preemptions > 0 and found.cached_tokens > 0, "the pool was meant to be small, the prompt cached"
    assert found.num_captures == len(SCENARIOS[name].engine["decode_buckets"]) + 1
    assert_same_tokens(found, expected, SCENARIOS[name].tie)


@pytest.mark.parametrize("name", swept(("mixed", *QUANTIZED), []))
def test_quantized_weights_give_the_cpus_tokens(name: str, cpu: CpuProcess) -> None:
    expected = cpu.answer(name)
    assert_same_tokens(answer(name, cpu.folder / name), expected, SCENARIOS[name].tie)


@pytest.mark.parametrize("name", swept(("gemma3", "qwen3", "qwen2", "mistral", "qwen3_5", "mtp"), []))
def test_every_family_gives_the_cpus_tokens(name: str, cpu: CpuProcess) -> None:
    expected = cpu.answer(name)
    assert_same_tokens(answer(name, cpu.folder / name), expected, SCENARIOS[name].tie)


@pytest.mark.parametrize("name", swept(["drafts"], []))
def test_steps_with_drafts_give_the_cpus_tokens(name: str, cpu: CpuProcess) -> None:
    expected = cpu.answer(name)
    found = answer(name, cpu.folder / name)
    assert found.num_accepted > 0
    assert_same_tokens(found, expected, SCENARIOS[name].tie)


@pytest.mark.parametrize("name", swept(["sampled"], []))
def test_samplers_with_seeds_draw_the_cpus_tokens_with_its_logprobs(name: str, cpu: CpuProcess) -> None:
    expected = cpu.answer(name)
    found = answer(name, cpu.folder / name)
    assert found.tokens == expected.tokens
    for rows, wanted in zip(found.logprobs, expected.logprobs, strict=True):
        assert (rows is None) == (wanted is None)
        for row, right in zip(rows or [], wanted or [], strict=True):
            assert row == pytest.approx({int(token): value for token, value in right.items()}, abs=1e-4)


@pytest.mark.slow
@pytest.mark.model
def test_the_default_model_gives_the_references_tokens(
    simulator: Settings | None, smollm2_files: ModelFiles, smollm2_reference: dict[str, Any]
) -> None:
    """The first tokens of two prompts, in float16; the reference computed in float32. Each run of a step takes seconds,
    so that there are few: one decode bucket, one lane."""
    from tinyvllm import LLM, SamplingParams

    cases = sorted(smollm2_reference["prompts"], key=lambda case: len(case["prompt_ids"]))
    chosen = cases[:2]
    params = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True)
    with without_checks(simulator):
        llm = LLM(
            str(smollm2_files.path), max_model_len=64, max_num_seqs=2, max_num_batched_tokens=16, decode_buckets=(2,),
            num_gpu_blocks_override=9, async_scheduling=False,
        )  # fmt: skip
        outputs = llm.generate([{"prompt_token_ids": case["prompt_ids"]} for case in chosen], params)
        llm.close()
    for case, output in zip(chosen, outputs, strict=True):
        assert list(output.outputs[0].token_ids) == case["output_ids"][:3], case["name"]
