"""LFM2: gated short convolutions, and attention with normed heads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from tests.builders import gguf_name
from tests.families.recipe import Recipe, Shapes, sizes

KINDS = ["conv", "full_attention", "conv", "full_attention"]


def layer_shapes(config: Mapping[str, Any], layer: int) -> Shapes:
    """By the names of its class."""
    hidden, ffn, head_dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    theirs = ("self_attn.o_proj", *(f"mlp.{name}_proj" for name in ("gate", "up", "down")))
    if KINDS[layer] == "conv":
        theirs += tuple(f"self_attn.{name}_proj" for name in "qkv")
    shapes: Shapes = dict.fromkeys((f"{name}.weight" for name in theirs), ())
    shapes |= {f"feed_forward.{name}.weight": (ffn, hidden) for name in ("w1", "w3")}
    shapes["feed_forward.w2.weight"] = (hidden, ffn)
    if KINDS[layer] == "conv":
        return shapes | {
            "conv.in_proj.weight": (3 * hidden, hidden),
            "conv.conv.weight": (hidden, 1, config["conv_L_cache"]),
            "conv.out_proj.weight": (hidden, hidden),
        }
    heads = config["num_attention_heads"] * head_dim
    return shapes | {
        "self_attn.out_proj.weight": (hidden, heads),
        "self_attn.q_layernorm.weight": (head_dim,),
        "self_attn.k_layernorm.weight": (head_dim,),
    }


def gguf_tensors(weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Convolutions have two dimensions."""
    return {
        gguf_name(name, "lfm2"): weight.squeeze(1) if name.endswith("conv.conv.weight") else weight
        for name, weight in weights.items()
    }


def mlx_tensors(weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """mlx_lm/models/lfm2.py, sanitize: taps before the one input channel."""
    return {
        name: np.ascontiguousarray(np.moveaxis(weight, 2, 1)) if name.endswith("conv.conv.weight") else weight
        for name, weight in weights.items()
    }


RECIPES = {
    "lfm2": Recipe(
        "Lfm2ForCausalLM",
        "lfm2",
        sizes(4, 64, 4, 2, 16, 96)
        | {
            "model_type": "lfm2",
            "layer_types": KINDS,
            "norm_eps": 1e-6,
            "conv_L_cache": 3,
            "conv_bias": False,
            "block_auto_adjust_ff_dim": False,
            "rope_theta": 1e6,
        },
        seed=1,
        gguf_keys={
            "attention.head_count_kv": [0 if kind == "conv" else 2 for kind in KINDS],
            "shortconv.l_cache": 3,
        },
        layer_norms=("operator_norm", "ffn_norm"),
        more_shapes=layer_shapes,
        top_shapes={"model.norm.weight": (), "model.embedding_norm.weight": (64,)},
        vectors={"model.embedding_norm.weight": (4.0, 0.2)},
        gguf_tensors=gguf_tensors,
        mlx_tensors=mlx_tensors,
    ),
}
