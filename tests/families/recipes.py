"""Tiny seeded models of each family, with every feature of it, written in both formats. No oracle, no tinyvllm.

The weights follow from the seed by NumPy alone, so that the tests make the same ones that the references were made of.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from tests.builders import (
    add_tokenizer_metadata,
    gguf_name,
    interleave_rotary_rows,
    write_byte_tokenizer,
    write_json,
    write_safetensors,
)
from tinyvllm.config import ModelFiles

# Means of norms' weights. The last one's makes logits sharp, so that no two tokens are nearly as likely. Those after
# attention and the feed-forward outweigh the embedding in the residual: a tied head would repeat the last token.
LAST_NORM, POST_NORM = 4.0, 3.0
BIAS_SPREAD = 0.3
NUM_TOKENS = 263  # bytes, specials, and an odd number of rows


@dataclass(frozen=True)
class Recipe:
    """A model of transformers' class `hf_class`, by its config.json."""

    hf_class: str
    gguf_arch: str | None  # None: GGUF cannot say all of this config
    config: Mapping[str, Any]
    seed: int
    gguf_keys: Mapping[str, Any] = field(default_factory=dict)  # besides those of every family

    @property
    def is_gemma(self) -> bool:
        return self.hf_class.startswith("Gemma3")

    @property
    def has_bias(self) -> bool:
        return self.hf_class.startswith("Qwen2")


def sizes(layers: int, hidden: int, heads: int, kv_heads: int, head_dim: int, ffn: int) -> dict[str, Any]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "intermediate_size": ffn,
        "vocab_size": NUM_TOKENS,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "bos_token_id": 257,
        "eos_token_id": 258,
        "pad_token_id": 256,
        "tie_word_embeddings": False,
    }


RECIPES: dict[str, Recipe] = {
    "qwen2": Recipe(
        "Qwen2ForCausalLM",
        "qwen2",
        sizes(3, 96, 6, 2, 16, 160) | {"model_type": "qwen2", "rope_theta": 1e6},
        seed=2,
    ),
    "qwen2_windowed": Recipe(
        "Qwen2ForCausalLM",
        None,
        sizes(3, 64, 4, 2, 16, 96)
        | {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 19, "max_window_layers": 1},
        seed=1,
    ),
    "gemma3": Recipe(
        "Gemma3ForCausalLM",
        "gemma3",
        sizes(7, 96, 3, 1, 32, 160)
        | {
            "model_type": "gemma3_text",
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": 32,
            "sliding_window": 21,
            "sliding_window_pattern": 6,
            "rope_theta": 1e6,
            "rope_local_base_freq": 10000.0,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            "tie_word_embeddings": True,
        },
        seed=1,
        gguf_keys={
            "attention.sliding_window": 21,
            "rope.scaling.type": "linear",
            "rope.scaling.factor": 8.0,
        },
    ),
    "gemma3_capped": Recipe(
        "Gemma3ForCausalLM",
        None,
        sizes(4, 96, 4, 2, 32, 128)
        | {
            "model_type": "gemma3_text",
            "query_pre_attn_scalar": 24,
            "sliding_window": 13,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
                "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 2e6},
            },
            "final_logit_softcapping": 25.0,
        },
        seed=2,
    ),
    "mistral": Recipe(
        "MistralForCausalLM",
        "llama",
        sizes(3, 96, 4, 2, 48, 160) | {"model_type": "mistral", "sliding_window": 17, "rope_theta": 1e6},
        seed=1,
        gguf_keys={"attention.sliding_window": 17},
    ),
}


def tensor_shapes(recipe: Recipe) -> dict[str, tuple[int, ...]]:
    """Shapes by Hugging Face's names."""
    c = recipe.config
    hidden, ffn, head_dim = c["hidden_size"], c["intermediate_size"], c["head_dim"]
    rows = {"q": c["num_attention_heads"] * head_dim, "k": c["num_key_value_heads"] * head_dim}
    rows["v"] = rows["k"]
    norms = ["input_layernorm", "post_attention_layernorm"]
    if recipe.is_gemma:
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (c["vocab_size"], hidden)}
    for index in range(c["num_hidden_layers"]):
        layer = f"model.layers.{index}."
        for name, count in rows.items():
            shapes[f"{layer}self_attn.{name}_proj.weight"] = (count, hidden)
            if recipe.has_bias:
                shapes[f"{layer}self_attn.{name}_proj.bias"] = (count,)
        shapes[f"{layer}self_attn.o_proj.weight"] = (hidden, rows["q"])
        if recipe.is_gemma:
            shapes |= {f"{layer}self_attn.{name}_norm.weight": (head_dim,) for name in "qk"}
        shapes |= {f"{layer}{norm}.weight": (hidden,) for norm in norms}
        shapes |= {f"{layer}mlp.{name}_proj.weight": (ffn, hidden) for name in ("gate", "up")}
        shapes[f"{layer}mlp.down_proj.weight"] = (hidden, ffn)
    shapes["model.norm.weight"] = (hidden,)
    if not c["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (c["vocab_size"], hidden)
    return shapes


def make_weights(recipe: Recipe) -> dict[str, np.ndarray]:
    """Float32 weights as Hugging Face stores them: Gemma's norms less 1."""
    return {name: _draw(recipe, name, shape) for name, shape in tensor_shapes(recipe).items()}


def _draw(recipe: Recipe, name: str, shape: tuple[int, ...]) -> np.ndarray:
    values = np.random.default_rng([recipe.seed, zlib.crc32(name.encode())]).standard_normal(shape)
    if len(shape) == 2:
        return (values / math.sqrt(shape[1])).astype(np.float32)
    if name.endswith(".bias"):
        return (BIAS_SPREAD * values).astype(np.float32)
    middle = LAST_NORM if name == "model.norm.weight" else 1.0
    if recipe.is_gemma and name.endswith(("post_attention_layernorm.weight", "post_feedforward_layernorm.weight")):
        middle = POST_NORM
    return (middle + 0.2 * values - (1.0 if recipe.is_gemma else 0.0)).astype(np.float32)


def write_hf(directory: Path, recipe: Recipe, dtype: str = "float32") -> ModelFiles:
    """A directory in Hugging Face's format, with the byte tokenizer."""
    directory.mkdir(parents=True, exist_ok=True)
    config = dict(recipe.config) | {"architectures": [recipe.hf_class], "dtype": dtype}
    write_json(directory / "config.json", config)
    write_safetensors(directory / "model.safetensors", make_weights(recipe), dtype)
    write_byte_tokenizer(directory, NUM_TOKENS)
    return ModelFiles("hf", directory, directory.name)


def write_multimodal_hf(directory: Path, recipe: Recipe) -> ModelFiles:
    """The same language model as the text part of Gemma3ForConditionalGeneration, next to a vision tower's tensors."""
    files = write_hf(directory, recipe)
    text = dict(recipe.config) | {"dtype": "float32"}
    config = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "text_config": text}
    write_json(directory / "config.json", config)
    weights = {name.replace("model.", "language_model.model.", 1): w for name, w in make_weights(recipe).items()}
    weights["vision_tower.vision_model.post_layernorm.weight"] = np.ones(8, np.float32)
    write_safetensors(directory / "model.safetensors", weights)
    return files


def write_gguf(path: Path, recipe: Recipe, dtype: str = "float32") -> ModelFiles:
    """A file as llama.cpp's converter writes it, with matrices of `dtype`."""
    arch, c = recipe.gguf_arch, recipe.config
    assert arch is not None
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(c["num_hidden_layers"])
    writer.add_context_length(c["max_position_embeddings"])
    writer.add_embedding_length(c["hidden_size"])
    writer.add_feed_forward_length(c["intermediate_size"])
    writer.add_head_count(c["num_attention_heads"])
    writer.add_head_count_kv(c["num_key_value_heads"])
    writer.add_key_length(c["head_dim"])
    writer.add_value_length(c["head_dim"])
    writer.add_rope_freq_base(c["rope_theta"])
    writer.add_layer_norm_rms_eps(c["rms_norm_eps"])
    for key, value in recipe.gguf_keys.items():
        writer.add_key_value(f"{arch}.{key}", value, gguf.GGUFValueType.get_type(value))
    add_tokenizer_metadata(writer, NUM_TOKENS)
    for name, weight in make_weights(recipe).items():
        if recipe.is_gemma and weight.ndim == 1:
            weight = weight + np.float32(1)
        if arch == "llama" and ("q_proj" in name or "k_proj" in name):
            weight = interleave_rotary_rows(weight, c["head_dim"])
        writer.add_tensor(gguf_name(name, arch), weight.astype(dtype) if weight.ndim == 2 else weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return ModelFiles("gguf", path, path.stem)
