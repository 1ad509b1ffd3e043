"""Tiers below the pool of tiny models on the CPU: copied blocks give the tokens that computed ones give."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from tests.builders import write_tiny_hf_llama
from tests.families.recipe import write_hf
from tests.families.recipes import RECIPES
from tinyvllm import LLM, SamplingParams
from tinyvllm.execution.kv_tiers.rates import Rates
from tinyvllm.scheduling.tiers import STATE

ENGINE: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 160,
    "max_num_seqs": 2,
    "max_num_batched_tokens": 32,
    "num_gpu_blocks_override": 24,  # a prompt and a half
    "block_size": 8,
    "decode_buckets": (2,),
    "token_buckets": (32,),
    "kv_offloading_size": 0.01,
}
GREEDY = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)


@pytest.mark.parametrize(
    ("recipe", "settings", "num_kinds"),
    [
        ("llama", {"kv_cache_dtype_k": "q8_0", "kv_cache_dtype_v": "q4_0"}, 1),
        pytest.param("gemma3", {"kv_cache_dtype": "float32"}, 2, marks=pytest.mark.sweep),
        # by default, states on a device of integers: test_kv_tiers.py
        pytest.param("qwen3_5", {"kv_cache_dtype": "float32", "async_scheduling": True}, 2, marks=pytest.mark.sweep),
    ],
)
def test_prefixes_from_host_memory_and_from_disk_give_the_same_tokens(
    recipe: str, settings: dict[str, Any], num_kinds: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Rates, "pays", lambda *_: True)  # so small a model may be computed faster than copied
    directory = tmp_path / "tiny"
    files = write_hf(directory, RECIPES[recipe]) if recipe in RECIPES else write_tiny_hf_llama(directory, head_dim=32)
    path = str(files.path)
    folder = str(tmp_path / "kv")
    rng = random.Random(0)
    prompts = [[rng.randrange(3, 200) for _ in range(120)] for _ in range(3)]

    def start(**more: Any) -> LLM:
        return LLM(path, **{**ENGINE, **settings, "kv_disk_cache": folder, **more})

    def ask(llm: LLM, prompt: list[int], salt: str | None = None) -> tuple[list[int], int]:
        asked = {"prompt_token_ids": prompt, "cache_salt": salt}
        (output,) = llm.generate(asked, GREEDY, use_tqdm=False)
        return output.outputs[0].token_ids, output.num_cached_tokens

    llm = start()
    tiers: Any = llm._loaded.core.scheduler.block_manager.tiers
    assert len(tiers._copies) == num_kinds and (STATE in tiers._copies) == (recipe == "qwen3_5")
    computed = [ask(llm, prompt) for prompt in prompts]
    assert [cached for _, cached in computed] == [0, 0, 0]
    for prompt, (tokens, _) in zip(prompts, computed, strict=True):
        again, cached = ask(llm, prompt)
        assert again == tokens and cached == 112, recipe
    assert llm.stats.extra["tier_host_hits"] > 200 and llm.stats.extra["tier_failures"] == 0
    tiers.host.audit()
    llm.close()
    llm = start(kv_offloading_size=None)
    assert llm._loaded.core.look_up_prefix(prompts[0]) == [0, 0, 112]
    assert ask(llm, prompts[0], salt="another") == (computed[0][0], 0)
    for prompt, (tokens, _) in zip(prompts, computed, strict=True):
        assert ask(llm, prompt) == (tokens, 112), recipe
    assert llm.stats.extra["tier_disk_hits"] >= 300
    llm.reset_prefix_cache(reset_external=True)
    assert llm._loaded.core.look_up_prefix(prompts[0]) == [0, 0, 0]
    llm.close()
    assert not list(Path(folder).rglob("*.kv"))
