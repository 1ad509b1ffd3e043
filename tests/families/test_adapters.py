"""Adapters of families whose layers differ: fused modules, norms after products, gates, scales, two ropes. With an
adapter, the engine's tokens and logprobs are those of the same model with the adapter merged into its weights.

python -m pytest -m sweep tests/families/test_adapters.py
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.builders import write_json
from tests.families.recipe import make_weights, write_hf
from tests.families.recipes import RECIPES
from tinyvllm import LLM, LoRARequest, SamplingParams

pytestmark = [pytest.mark.sweep, pytest.mark.timeout(600)]

RANK, ALPHA = 8, 4
ADAPTED = re.compile(r".*\.(?:q|k|v|o|qkv|gate|up|gate_up|down)_proj\.weight")
ENGINE: dict[str, Any] = {
    "dtype": "float32",
    "kv_cache_dtype": "float32",
    "max_model_len": 96,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 24,
    "num_gpu_blocks_override": 61,
    "block_size": 8,
    "decode_buckets": (4,),
    "token_buckets": (24,),
    "warm_up": "idle",  # only the two graphs that run everything
}
GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, logprobs=3)
PROMPTS = ["The", "two are company, three are a crowd, and four are many"]
FAMILIES = ("gemma2", "gemma3", "phi3", "glm4", "granite", "olmo2", "lfm2", "qwen3_5", "qwen2")


def make_deltas(weights: dict[str, np.ndarray]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """(A, B) by the names of the matrices of attention and dense feed-forwards."""
    rng, found = np.random.default_rng(5), {}
    for name, weight in weights.items():
        is_ours = ADAPTED.fullmatch(name) and re.search(r"self_attn\.|mlp\.(?:gate|up|down)", name)
        if is_ours and weight.ndim == 2 and "experts" not in name:
            rows, cols = weight.shape
            a, b = rng.standard_normal((RANK, cols)) / cols**0.5, rng.standard_normal((rows, RANK)) / RANK**0.5
            found[name] = a.astype(np.float32), b.astype(np.float32)
    return found


def generate(path: Path, adapter: str | None = None) -> list[Any]:
    llm = LLM(str(path), enable_lora=adapter is not None, max_lora_rank=8, **ENGINE)
    try:
        request = None if adapter is None else LoRARequest("mine", 1, adapter)
        return [output.outputs[0] for output in llm.generate(PROMPTS, GREEDY, lora_request=request)]
    finally:
        llm.close()


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_gives_what_merged_weights_give(tmp_path: Path, family: str) -> None:
    recipe = RECIPES[family]
    deltas = make_deltas(make_weights(recipe))

    def merge(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        scaled = {name: np.float32(ALPHA / RANK) * (b @ a) for name, (a, b) in deltas.items()}
        return {name: weight + scaled[name] if name in scaled else weight for name, weight in weights.items()}

    base, merged = tmp_path / "base", tmp_path / "merged"
    write_hf(base, recipe)
    write_hf(merged, recipe, transform=merge)
    folder = tmp_path / "adapter"
    folder.mkdir()
    write_json(folder / "adapter_config.json", {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "bias": "none"})
    tensors = {
        f"base_model.model.{name.removesuffix('.weight')}.lora_{half}.weight": matrix
        for name, pair in deltas.items()
        for half, matrix in zip("AB", pair, strict=True)
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    expected = generate(merged)
    for found, wanted in zip(generate(base, str(folder)), expected, strict=True):
        assert found.token_ids == wanted.token_ids
        for entries, other in zip(found.logprobs, wanted.logprobs, strict=True):
            logprobs = {token: entry.logprob for token, entry in entries.items()}
            assert logprobs == pytest.approx({token: entry.logprob for token, entry in other.items()}, abs=1e-3)
