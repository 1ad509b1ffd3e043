"""Tiny models of each family with a quantized KV cache: windows, sinks, shared layers, odd heads. All of them:

pytest -m sweep tests/families/test_kv_formats.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.families.recipe import write_hf
from tests.families.recipes import RECIPES
from tests.families.test_tiny import ENGINE, read_cases
from tinyvllm import LLM, SamplingParams
from tinyvllm.errors import UnsupportedModelError

SCORED = SamplingParams(temperature=0.0, max_tokens=4, prompt_logprobs=0, ignore_eos=True)


def scores(path: str, prompts: list[str], kv: str) -> np.ndarray:
    """The log-probabilities of the prompts' tokens."""
    llm = LLM(path, **(ENGINE | {"kv_cache_dtype": kv, "num_gpu_blocks_override": 64}))
    found = [
        next(iter(entry.values())).logprob
        for output in llm.generate(prompts, SCORED)
        for entry in output.prompt_logprobs or []
        if entry is not None
    ]
    llm.close()
    return np.array(found)


@pytest.mark.sweep
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", RECIPES)
def test_every_family_runs_with_8_bits_or_says_why_not(tmp_path: Path, name: str) -> None:
    path = str(write_hf(tmp_path / "tiny", RECIPES[name]).path)
    prompts = [case["prompt"] for case in read_cases(name)]
    exact = scores(path, prompts, "float32")
    for kv, limit in (("q8_0", 0.3), ("fp8_e4m3", 1.0)):  # random weights magnify every rounding
        try:
            change = np.abs(scores(path, prompts, kv) - exact)
        except UnsupportedModelError as error:
            assert "latents (MLA)" in str(error) or (kv == "q8_0" and "needs a multiple of 32" in str(error))
            continue
        print(f"{name} {kv}: median {np.median(change):.4f}, max {change.max():.3f}")
        # the median, since a token for which another expert is chosen changes much
        assert 0 < np.median(change) < limit, "a cache that changed nothing would not be quantized"
