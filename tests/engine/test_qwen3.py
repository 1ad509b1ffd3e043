"""A tiny seeded Qwen3 through the whole engine gives transformers' greedy tokens and logprobs, however the work is cut
and from either format. Expected: data/qwen3_reference.json, which write_qwen3_reference.py makes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.builders import write_tiny_gguf, write_tiny_hf_llama
from tests.engine.write_qwen3_reference import NUM_STEPS, NUM_TOP, NUMBERS, OUTPUT, weights_sum
from tinyvllm import LLM, SamplingParams

ENGINE: dict[str, Any] = {
    "max_model_len": 160,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 24,  # prompts in chunks, in steps with others' decodes
    "num_gpu_blocks_override": 61,
    "block_size": 8,
    "decode_buckets": (4,),
    "token_buckets": (24,),
    "kv_cache_dtype": "float32",
}
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_STEPS, ignore_eos=True, logprobs=NUM_TOP)


@pytest.fixture(scope="module")
def reference() -> list[dict[str, Any]]:
    written = json.loads(OUTPUT.read_text(encoding="utf-8"))
    assert written["weights_sum"] == pytest.approx(weights_sum(), rel=1e-6), "other weights: write the reference again"
    cases: list[dict[str, Any]] = written["cases"]
    return cases


def check(output: Any, case: dict[str, Any]) -> None:
    (choice,) = output.outputs
    assert list(choice.token_ids) == case["tokens"], case["prompt"]
    for found, expected in zip(choice.logprobs, case["top"], strict=True):
        assert {token: entry.logprob for token, entry in found.items()} == pytest.approx(dict(expected), abs=1e-4)


@pytest.mark.parametrize("kind", ["safetensors", pytest.param("gguf", marks=pytest.mark.sweep)])
def test_tokens_and_logprobs_are_transformers(tmp_path: Path, reference: list[dict[str, Any]], kind: str) -> None:
    """Alone; in a batch of more prompts than fit at once; again, where the prompts are found in the cache."""
    hf = kind == "safetensors"
    path = tmp_path / ("tiny" if hf else "tiny.gguf")
    files = write_tiny_hf_llama(path, **NUMBERS) if hf else write_tiny_gguf(path, quant="F32", **NUMBERS)
    llm = LLM(str(files.path), **ENGINE)
    check(llm.generate(reference[0]["prompt"], GREEDY)[0], reference[0])
    for is_again in (False, True):
        outputs = llm.generate([case["prompt"] for case in reference], GREEDY)
        for output, case in zip(outputs, reference, strict=True):
            check(output, case)
        assert outputs[-1].num_cached_tokens > 80 if is_again else outputs[-1].num_cached_tokens == 0
    llm.close()
