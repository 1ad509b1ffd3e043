"""MLX's directories through the whole engine: mlx-lm's greedy tokens (data/mlx.json, by write_mlx_references.py)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.families.mlx import MODELS, write_mlx
from tests.families.test_tiny import ENGINE
from tests.families.write_mlx_references import DATA, NUM_STEPS, PROMPT
from tests.reference_model import next_logprobs
from tinyvllm import LLM, SamplingParams
from tinyvllm.config import ModelFiles
from tinyvllm.model.weights.safetensors import read_safetensors

WRITTEN: dict[str, Any] = json.loads(DATA.read_text(encoding="utf-8"))


def write(tmp_path: Path, name: str) -> ModelFiles:
    files = write_mlx(tmp_path / "tiny", MODELS[name])
    stored = read_safetensors(files.path)
    assert sorted(key for key in stored if ".layers." not in key or ".layers.0." in key) == WRITTEN[name]["names"]
    return files


@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens_in_numpy_are_mlx_lm_s(tmp_path: Path, name: str) -> None:
    files, tokens = write(tmp_path, name), WRITTEN[name]["tokens"][:8]
    assert next_logprobs(files, [*PROMPT.encode(), *tokens[:-1]], 8).argmax(axis=1).tolist() == tokens


@pytest.mark.sweep  # tests/ops/formats multiplies by MLX's codes
@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens_are_mlx_lm_s(tmp_path: Path, name: str) -> None:
    files = write(tmp_path, name)
    llm = LLM(str(files.path), **ENGINE | {"max_num_seqs": 1, "decode_buckets": (1,)})
    params = SamplingParams(temperature=0.0, max_tokens=NUM_STEPS, ignore_eos=True)
    (choice,) = llm.generate(PROMPT, params)[0].outputs
    llm.close()
    assert list(choice.token_ids) == WRITTEN[name]["tokens"]
