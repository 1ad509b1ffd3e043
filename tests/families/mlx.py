"""Tiny models as MLX's directories, quantized by NumPy in bits and groups that differ from module to module."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tests.families.recipe import Recipe, mlx_weights, sizes, write_hf
from tests.families.recipes import RECIPES
from tests.families.recipes.gpt_oss import YARN
from tinyvllm.config import ModelFiles

DEFAULT = {"group_size": 32, "bits": 4}
# Modules that have settings of their own, by the ends of their names; False: not quantized
OTHERS: dict[str, Any] = {
    "embed_tokens": {"group_size": 32, "bits": 6},
    "lm_head": {"group_size": 32, "bits": 8},
    "v_proj": {"group_size": 32, "bits": 5},
    "layers.1.mlp.down_proj": False,
    "layers.2.mlp.gate": False,  # GLM's router is no matrix that mlx-lm quantizes
}
LLAMA = sizes(2, 64, 4, 2, 16, 128) | {"model_type": "llama", "rope_theta": 10000.0}
PHI = sizes(2, 64, 4, 2, 16, 128) | {"model_type": "phi3", "rope_theta": 10000.0}
GLM = dict(RECIPES["glm4_moe_lite"].config) | {
    "first_k_dense_replace": 2,
    "mlp_layer_types": ["dense", "dense", "sparse"],
}
# mlx-lm reads the older keys, and makes YaRN's limits whole dimensions
GPT_OSS = {key: value for key, value in RECIPES["gpt_oss"].config.items() if key != "rope_parameters"}
GPT_OSS |= {"rope_theta": 150000.0, "rope_scaling": YARN | {"truncate": True}}
GEMMA = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
MODELS: dict[str, Recipe] = {
    "llama": replace(RECIPES["mistral"], hf_class="LlamaForCausalLM", config=LLAMA, seed=1),
    "qwen2": replace(RECIPES["qwen2"], seed=3),
    "phi3": replace(RECIPES["phi3"], config=PHI, seed=1),  # fused tensors, of which rows are taken
    # MLX rounds the square root of hidden_size to bfloat16: that of 64 is exact
    "gemma3": replace(RECIPES["gemma3"], config=dict(RECIPES["gemma3"].config) | GEMMA, seed=7),
    "qwen3_5": replace(RECIPES["qwen3_5"], config=dict(RECIPES["qwen3_5"].config) | {"model_type": "qwen3_5"}),
    "glm4_moe_lite": replace(RECIPES["glm4_moe_lite"], config=GLM, seed=3),
    "gpt_oss": replace(RECIPES["gpt_oss"], config=GPT_OSS, seed=2),
}


def write_mlx(directory: Path, recipe: Recipe) -> ModelFiles:
    quantization: dict[str, Any] = dict(DEFAULT)

    def quantize(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        tensors: dict[str, np.ndarray] = {}
        for name, weight in mlx_weights(recipe).items():
            module = name.removesuffix(".weight")
            own = next((value for end, value in OTHERS.items() if module.endswith(end)), None)
            if weight.ndim < 2 or module == name or module.endswith("conv1d") or own is False:
                tensors[name] = weight
                continue
            if own is not None:
                quantization[module] = own
            tensors |= {f"{module}.{end}": part for end, part in quantize_affine(weight, **(own or DEFAULT)).items()}
        return tensors

    files = write_hf(directory, recipe, transform=quantize)
    write_settings(directory, quantization)
    return files


def write_settings(directory: Path, quantization: Mapping[str, Any]) -> None:
    """As mlx_lm.convert has it: under both names."""
    import json

    path = directory / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config |= {"quantization": quantization, "quantization_config": quantization}
    path.write_text(json.dumps(config), encoding="utf-8")


def quantize_affine(weight: np.ndarray, group_size: int, bits: int) -> dict[str, np.ndarray]:
    """MLX's three tensors of a matrix (N, K), or of several (E, N, K). Every second group has a negative scale, as
    MLX's may be."""
    groups = weight.reshape(*weight.shape[:-1], -1, group_size)
    low, high = groups.min(axis=-1, keepdims=True), groups.max(axis=-1, keepdims=True)
    is_odd = np.arange(groups.shape[-2])[:, None] % 2 == 1
    bias = np.where(is_odd, high, low)
    scale = np.where(is_odd, low - high, high - low) / np.float32((1 << bits) - 1)
    codes = np.rint((groups - bias) / scale).astype(np.uint8).reshape(weight.shape)
    stream = np.unpackbits(codes[..., None], axis=-1, count=bits, bitorder="little").reshape(*weight.shape[:-1], -1)
    words = np.packbits(stream, axis=-1, bitorder="little").view(np.uint32)
    return {"weight": words, "scales": scale[..., 0].astype(np.float32), "biases": bias[..., 0].astype(np.float32)}
