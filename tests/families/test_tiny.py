"""Tiny seeded models of transformers' classes through the whole engine: its greedy tokens and logprobs, however the
work is cut and from either format. Expected: data/*.json, which write_references.py makes.

By default every recipe is computed in NumPy, and those with the most to keep between steps by an engine, with one graph
for prompts and one for decoding: a convolution's states here, windows in test_windows.py. The kernels of latents are
tests/ops/test_latent_attention.py's. All recipes, and graphs for several sizes:
python -m pytest -m sweep tests/families"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.families.recipe import write_gguf, write_hf
from tests.families.recipes import RECIPES
from tests.families.recipes.gemma3 import write_multimodal_hf
from tests.families.write_references import DATA, NUM_STEPS, NUM_TOP, weights_sum
from tests.reference_model import next_logprobs
from tests.sweeps import swept
from tinyvllm import LLM, SamplingParams
from tinyvllm.config import ModelFiles

ENGINE: dict[str, Any] = {
    "dtype": "float32",
    "kv_cache_dtype": "float32",
    "max_model_len": 192,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 24,  # prompts in chunks, in steps with others' decodes
    "num_gpu_blocks_override": 31,  # 240 tokens, where the prompts and outputs of four need more: preemption
    "block_size": 8,
    "decode_buckets": (1, 4),
    "token_buckets": (24,),
}
ATOL = 1e-3  # of a logprob
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_STEPS, ignore_eos=True, logprobs=NUM_TOP)


def read_cases(name: str) -> list[dict[str, Any]]:
    written = json.loads((DATA / f"{name}.json").read_text(encoding="utf-8"))
    assert written["weights_sum"] == pytest.approx(weights_sum(RECIPES[name]), rel=1e-6), (
        "other weights: write it again"
    )
    cases: list[dict[str, Any]] = written["cases"]
    return cases


def check(output: Any, case: dict[str, Any]) -> None:
    (choice,) = output.outputs
    assert list(choice.token_ids) == case["tokens"], case["prompt"]
    for found, expected in zip(choice.logprobs, case["top"], strict=True):
        assert {token: entry.logprob for token, entry in found.items()} == pytest.approx(dict(expected), abs=ATOL)


def check_engine(files: ModelFiles, cases: list[dict[str, Any]], **settings: Any) -> None:
    """Alone; in a batch that the pool is too small for; again, where the prompts are found in the cache."""
    llm = LLM(str(files.path), **ENGINE | settings)
    longest = cases[-1]  # in chunks, and several windows long
    check(llm.generate(longest["prompt"], GREEDY)[0], longest)
    outputs = llm.generate([case["prompt"] for case in cases], GREEDY)
    if llm._loaded.runner.capacity.window is None:  # else it holds the windows of four
        assert llm.stats.num_preemptions > 0, "the pool was meant to be too small"
    for output, case in zip(outputs, cases, strict=True):
        check(output, case)
    for _ in range(2):
        (output,) = llm.generate(longest["prompt"], GREEDY)
        check(output, longest)
    assert output.num_cached_tokens == (len(longest["prompt"]) - 1) // 8 * 8
    llm.close()


# of each of them another recipe has the layers, or an engine runs it
LIKES = (
    *("gemma3_capped", "gemma4_31b", "deepseek_v2_lite", "qwen3_5", "qwen3_next"),
    *("qwen2", "mistral", "phi3", "olmo2", "gemma3", "lfm2"),
)


@pytest.mark.parametrize("name", swept(RECIPES, RECIPES.keys() - LIKES))
def test_logprobs_in_numpy_are_transformers(tmp_path: Path, name: str) -> None:
    *_, case = read_cases(name)
    check_numpy(write_hf(tmp_path / "tiny", RECIPES[name]), case)


def check_numpy(files: ModelFiles, case: dict[str, Any], count: int = 8) -> None:
    """The first `count` tokens after a prompt that is several windows long."""
    tokens, top = case["tokens"][:count], case["top"][:count]
    found = next_logprobs(files, [*case["prompt"].encode(), *tokens[:-1]], count)
    assert found.argmax(axis=1).tolist() == tokens
    for row, expected in zip(found, top, strict=True):
        assert {token: row[token] for token, _ in expected} == pytest.approx(dict(expected), abs=ATOL)


@pytest.mark.parametrize("name", swept(RECIPES, ["lfm2"]))
def test_tokens_and_logprobs_are_transformers(tmp_path: Path, name: str) -> None:
    check_engine(write_hf(tmp_path / "tiny", RECIPES[name]), read_cases(name), decode_buckets=(4,))


@pytest.mark.sweep
@pytest.mark.parametrize("name", RECIPES)
def test_tokens_and_logprobs_are_transformers_in_graphs_of_several_sizes(tmp_path: Path, name: str) -> None:
    check_engine(write_hf(tmp_path / "tiny", RECIPES[name]), read_cases(name))


def check_alone(files: ModelFiles, case: dict[str, Any], max_num_seqs: int = 1) -> None:
    llm = LLM(str(files.path), **ENGINE | {"max_num_seqs": max_num_seqs, "decode_buckets": (max_num_seqs,)})
    check(llm.generate(case["prompt"], GREEDY)[0], case)
    llm.close()


GGUF_NAMES = [name for name, recipe in RECIPES.items() if recipe.gguf_arch]


def test_logprobs_of_gguf_in_numpy_are_transformers(tmp_path: Path) -> None:
    """test_gguf.py says that GGUF holds the same models."""
    check_numpy(write_gguf(tmp_path / "tiny.gguf", RECIPES["qwen2"]), read_cases("qwen2")[-1])


@pytest.mark.sweep
@pytest.mark.parametrize("name", GGUF_NAMES)
def test_gguf_gives_the_same(tmp_path: Path, name: str) -> None:
    check_alone(write_gguf(tmp_path / "tiny.gguf", RECIPES[name]), read_cases(name)[-1])


@pytest.mark.sweep  # test_multimodal.py compares what is read of such models
def test_the_text_part_of_a_multimodal_gemma3_gives_the_same(tmp_path: Path) -> None:
    files = write_multimodal_hf(tmp_path / "tiny", RECIPES["gemma3"])
    check_alone(files, read_cases("gemma3")[-1], max_num_seqs=4)  # by the programs of the text model
