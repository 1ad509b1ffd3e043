"""MLX's directories through the whole engine: mlx-lm's greedy tokens (data/mlx.json, by write_mlx_references.py)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.families.mlx import MODELS, write_mlx
from tests.families.test_tiny import ENGINE
from tests.families.write_mlx_references import DATA, NUM_STEPS, PROMPT
from tests.sweeps import swept
from tinyvllm import LLM, SamplingParams
from tinyvllm.model.weights.safetensors import read_safetensors

WRITTEN: dict[str, Any] = json.loads(DATA.read_text(encoding="utf-8"))


# the others' layers run by default from Hugging Face's files, and gpt-oss's stacks are read in tests/model/weights
@pytest.mark.parametrize("name", swept(MODELS, ["llama"]))
def test_greedy_tokens_are_mlx_lm_s(tmp_path: Path, name: str) -> None:
    files = write_mlx(tmp_path / "tiny", MODELS[name])
    stored = read_safetensors(files.path)
    assert sorted(key for key in stored if ".layers." not in key or ".layers.0." in key) == WRITTEN[name]["names"]
    llm = LLM(str(files.path), **ENGINE | {"max_num_seqs": 1, "decode_buckets": (1,)})
    params = SamplingParams(temperature=0.0, max_tokens=NUM_STEPS, ignore_eos=True)
    (choice,) = llm.generate(PROMPT, params)[0].outputs
    llm.close()
    assert list(choice.token_ids) == WRITTEN[name]["tokens"]
