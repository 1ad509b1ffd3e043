"""Multimodal checkpoints hold the language model under other names, beside towers that are left out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.builders import write_json, write_safetensors
from tests.families.pooled_models import RECIPE as QWEN3
from tests.families.recipe import Recipe, make_weights, write_hf
from tests.families.recipes import RECIPES
from tinyvllm.config import ModelFiles
from tinyvllm.model.weights.checkpoint import open_checkpoint
from tinyvllm.storage.model_config import read_model_config

QWEN2 = RECIPES["qwen2"]
GEMMA4_TOWERS = ("model.vision_tower.x", "model.embed_vision.x", "model.audio_tower.x", "model.embed_audio.x")
MODEL, MLX = "model.language_model.", "language_model.model."  # transformers' names, and MLX's


def write(directory: Path, recipe: Recipe, hf_class: str, prefix: str, towers: tuple[str, ...]) -> ModelFiles:
    files = write_hf(directory, recipe)
    text = dict(recipe.config) | {"dtype": "float32"}
    write_json(directory / "config.json", {"architectures": [hf_class], "text_config": text})
    weights = {name.replace("model.", prefix, 1): weight for name, weight in make_weights(recipe).items()}
    weights |= {f"{tower}.weight": np.ones((2, 2), np.float32) for tower in towers}
    write_safetensors(directory / "model.safetensors", weights)
    return files


@pytest.mark.parametrize(
    ("recipe", "hf_class", "prefix", "towers"),
    [
        (RECIPES["gemma4_e2b"], "Gemma4ForConditionalGeneration", MODEL, GEMMA4_TOWERS),
        (RECIPES["gemma4_e2b"], "Gemma4ForConditionalGeneration", MLX, ("vision_tower.x", "embed_vision.x")),
        (RECIPES["gemma4_31b"], "Gemma4UnifiedForConditionalGeneration", MODEL, ("model.vision_embedder.x",)),
        (QWEN2, "Qwen2_5_VLForConditionalGeneration", "model.", ("visual.blocks.0.x",)),
        (QWEN3, "Qwen3VLForConditionalGeneration", MODEL, ("model.visual.blocks.0.x",)),
    ],
)
def test_the_text_part_is_the_text_model(
    tmp_path: Path, recipe: Recipe, hf_class: str, prefix: str, towers: tuple[str, ...]
) -> None:
    alone = write_hf(tmp_path / "tiny", recipe)
    part = write(tmp_path / "whole/tiny", recipe, hf_class, prefix, towers)
    expected, config = read_model_config(alone), read_model_config(part)
    assert config.layers == expected.layers and config.per_layer_size == expected.per_layer_size
    assert open_checkpoint(part, config).names() == open_checkpoint(alone, expected).names()
