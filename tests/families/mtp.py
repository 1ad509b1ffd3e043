"""A drafting layer (MTP) for the tiny models of Qwen3.5's families, in both formats. No oracle, no tinyvllm."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tests.families.recipe import LAST_NORM, Recipe, layer_shapes, make_weights, write_gguf, write_hf
from tests.families.recipes.qwen3_5 import INTERVAL, as_ggml
from tinyvllm.config import ModelFiles

ATTENTION_LAYER = INTERVAL - 1  # a layer of the kind that drafts
GGUF_NAMES = {
    "fc": "nextn.eh_proj",
    "pre_fc_norm_embedding": "nextn.enorm",
    "pre_fc_norm_hidden": "nextn.hnorm",
    "norm": "nextn.shared_head_norm",
}


def mtp_weights(recipe: Recipe) -> dict[str, np.ndarray]:
    """By the names of Hugging Face's files. Norms are stored less 1."""
    hidden = recipe.config["hidden_size"]
    own = layer_shapes(recipe, ATTENTION_LAYER)
    shapes: dict[str, tuple[int, ...]] = {f"mtp.layers.0.{name}": shape for name, shape in own.items()}
    shapes |= {"mtp.fc.weight": (hidden, 2 * hidden)}
    shapes |= {f"mtp.{name}.weight": (hidden,) for name in GGUF_NAMES if name != "fc"}
    return {name: _draw(recipe, name, shape) for name, shape in shapes.items()}


def _draw(recipe: Recipe, name: str, shape: tuple[int, ...]) -> np.ndarray:
    values = np.random.default_rng([recipe.seed, zlib.crc32(name.encode())]).standard_normal(shape)
    if len(shape) > 1:
        return (values / np.sqrt(shape[-1])).astype(np.float32)
    middle = LAST_NORM if name == "mtp.norm.weight" else 1.0
    return (middle + 0.2 * values - recipe.norm_offset).astype(np.float32)


def write_hf_with_mtp(directory: Path, recipe: Recipe, dtype: str = "float32") -> ModelFiles:
    def transform(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {name: weight.astype(dtype) for name, weight in (weights | mtp_weights(recipe)).items()}

    return write_hf(directory, recipe, dtype, transform)


def write_gguf_with_mtp(path: Path, recipe: Recipe) -> ModelFiles:
    """The layer is block N of N + 1, as llama.cpp's converter has it."""
    count, arch = recipe.config["num_hidden_layers"], recipe.gguf_arch
    assert arch is not None
    layer = {
        name.replace("mtp.layers.0.", f"model.layers.{count}."): weight
        for name, weight in mtp_weights(recipe).items()
        if name.startswith("mtp.layers.")
    }
    tensors: dict[str, np.ndarray] = as_ggml(layer, arch)
    for name, ours in GGUF_NAMES.items():
        weight = mtp_weights(recipe)[f"mtp.{name}.weight"]
        tensors[f"blk.{count}.{ours}.weight"] = weight if weight.ndim > 1 else weight + np.float32(1)
    keys: Mapping[str, Any] = {**recipe.gguf_keys, "nextn_predict_layers": 1}
    deeper = dict(recipe.config) | {"num_hidden_layers": count + 1}
    own = recipe.gguf_tensors
    assert own is not None
    # the converter's tensors are those of the model without the layer
    known = own(make_weights(recipe))
    return write_gguf(path, replace(recipe, config=deeper, gguf_keys=keys, gguf_tensors=lambda _: known | tensors))
