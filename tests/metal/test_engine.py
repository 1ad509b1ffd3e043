"""The whole engine on METAL gives the tokens that NumPy gives."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import sweeps
from tests.builders import without_logits_processing
from tests.metal.scenarios import QUANTIZED, SCENARIOS, Answer, answer
from tests.metal.simulator import Settings, without_checks
from tests.reference_model import next_logprobs
from tests.sweeps import swept
from tinyvllm.config import ModelFiles

pytestmark = pytest.mark.timeout(600)  # an engine compiles for 10 s on an idle core, and there may be no idle one


def assert_greedy(found: Answer, files: ModelFiles, tie: float) -> None:
    """Token for token in NumPy, but where that is undecided itself."""
    compared, total = 0, sum(map(len, found.tokens))
    for prompt, tokens in zip(found.prompts, found.tokens, strict=True):
        logprobs = next_logprobs(files, [*prompt, *tokens[:-1]], len(tokens))
        for place, (token, row) in enumerate(zip(tokens, logprobs, strict=True)):
            gap = row.max() - row[token]
            assert gap < tie, f"{tokens} after {prompt}: {row.argmax()} is likelier by {gap:.4f} at {place}"
            compared += gap == 0
    assert compared >= 0.8 * total, f"only {compared} of {total} tokens were the likeliest"


def run(name: str, path: Path) -> Answer:
    scenario = SCENARIOS[name]
    files = scenario.write(path)
    found = answer(scenario, files)
    assert_greedy(found, files, scenario.tie)
    return found


@pytest.mark.parametrize("name", swept(("medium", "float16", "float32", "bfloat16"), ["float16"]))
def test_chunks_batches_preemption_and_prefix_hits_give_numpys_tokens(name: str, tmp_path: Path) -> None:
    """No request asks for logits processing, and by default nothing is compiled for it."""
    with contextlib.nullcontext() if sweeps.is_sweeping else without_logits_processing():
        found = run(name, tmp_path / name)
    assert found.num_preemptions > 0 and found.cached_tokens > 0, "the pool was meant to be small, the prompt cached"
    assert found.num_captures == len(SCENARIOS[name].engine["decode_buckets"]) + 1


@pytest.mark.parametrize("name", swept(("mixed", *QUANTIZED), []))
def test_quantized_weights_give_numpys_tokens(name: str, tmp_path: Path) -> None:
    run(name, tmp_path / name)


@pytest.mark.parametrize("name", swept(("gemma3", "qwen3", "qwen2", "mistral", "qwen3_5", "mtp"), []))
def test_every_family_gives_numpys_tokens(name: str, tmp_path: Path) -> None:
    run(name, tmp_path / name)


@pytest.mark.parametrize("name", swept(["drafts"], []))
def test_steps_with_drafts_give_numpys_tokens(name: str, tmp_path: Path) -> None:
    assert run(name, tmp_path / name).num_accepted > 0


@pytest.mark.sweep
def test_samplers_with_seeds_draw_the_cpus_tokens_with_its_logprobs(tmp_path: Path) -> None:
    scenario = SCENARIOS["sampled"]
    found = answer(scenario, scenario.write(tmp_path / "here"))
    command = [sys.executable, "-m", "tests.metal.scenarios", str(tmp_path / "there"), "sampled"]
    done = subprocess.run(command, env=os.environ | {"DEV": "CPU"}, capture_output=True, text=True, check=True)
    expected = Answer(**json.loads(done.stdout))
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
