"""Qwen3.5 and Qwen3-Next: Gated DeltaNet layers, attention with an output gate and a partial rope; and experts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from tests.builders import gguf_name
from tests.families.experts import LLAMA_CPP, MLX, expert_shapes, stacked
from tests.families.recipe import Recipe, Shapes, head_norms, sizes

INTERVAL, TAPS = 3, 4  # every third layer has attention
# A sequence's state fades slowly: by a factor of about exp(-0.13) a token
VECTORS = {"linear_attn.A_log": (-2.0, 0.7), "linear_attn.dt_bias": (0.5, 0.5), "linear_attn.norm.weight": (1.0, 0.2)}
ROPE = {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.25}
MROPE = ROPE | {"mrope_interleaved": True, "mrope_section": [2, 1, 1]}
MROPE_KEYS = {"rope.freq_base": 1e6, "rope.dimension_sections": [2, 1, 1, 0]}
EXPERTS = {
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
}
EXPERT_KEYS = {
    "expert_count": 8,
    "expert_used_count": 3,
    "expert_feed_forward_length": 64,
    "expert_shared_feed_forward_length": 64,
}


def linear(value_heads: int, key_heads: int, dim: int) -> dict[str, Any]:
    """config.json's keys of the recurrent layers."""
    return {
        "full_attention_interval": INTERVAL,
        "linear_num_value_heads": value_heads,
        "linear_num_key_heads": key_heads,
        "linear_key_head_dim": dim,
        "linear_value_head_dim": dim,
        "linear_conv_kernel_dim": TAPS,
    }


def ssm(value_heads: int, key_heads: int, dim: int) -> dict[str, Any]:
    """llama.cpp's, and of the rope."""
    return {
        "ssm.conv_kernel": TAPS,
        "ssm.state_size": dim,
        "ssm.group_count": key_heads,
        "ssm.time_step_rank": value_heads,
        "ssm.inner_size": value_heads * dim,
        "full_attention_interval": INTERVAL,
        "rope.dimension_count": 8,
    }


def mixer_shapes(config: Mapping[str, Any], layer: int, *, is_fused: bool = False) -> Shapes:
    """Attention has rows of queries and of the gate by head. `is_fused`: projections by key head (Qwen3-Next)."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    modules = ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")
    if (layer + 1) % INTERVAL == 0:
        return head_norms(config, layer) | {"self_attn.q_proj.weight": (2 * heads * config["head_dim"], hidden)}
    values, keys = (config[f"linear_num_{name}_heads"] * config[f"linear_{name}_head_dim"] for name in ("value", "key"))
    count = config["linear_num_value_heads"]
    projections = {"qkvz": 2 * keys + 2 * values, "ba": 2 * count}
    if not is_fused:
        projections = {"qkv": 2 * keys + values, "z": values, "b": count, "a": count}
    shapes: Shapes = dict.fromkeys((f"self_attn.{name}.weight" for name in modules), ())
    shapes |= {f"linear_attn.in_proj_{name}.weight": (rows, hidden) for name, rows in projections.items()}
    return shapes | {
        "linear_attn.conv1d.weight": (2 * keys + values, 1, TAPS),
        "linear_attn.A_log": (count,),
        "linear_attn.dt_bias": (count,),
        "linear_attn.norm.weight": (config["linear_value_head_dim"],),
        "linear_attn.out_proj.weight": (hidden, values),
    }


def shared_shapes(config: Mapping[str, Any]) -> Shapes:
    hidden, size = config["hidden_size"], config["shared_expert_intermediate_size"]
    return {
        "mlp.shared_expert.gate_proj.weight": (size, hidden),
        "mlp.shared_expert.up_proj.weight": (size, hidden),
        "mlp.shared_expert.down_proj.weight": (hidden, size),
        "mlp.shared_expert_gate.weight": (1, hidden),
    }


def moe_shapes(config: Mapping[str, Any], layer: int) -> Shapes:
    """The experts of Qwen3.5 are two tensors."""
    hidden, count, size = config["hidden_size"], config["num_experts"], config["moe_intermediate_size"]
    fused: Shapes = {
        "mlp.gate.weight": (count, hidden),
        "mlp.experts.gate_up_proj": (count, 2 * size, hidden),
        "mlp.experts.down_proj": (count, hidden, size),
    }
    dense: Shapes = dict.fromkeys((f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")), ())
    return mixer_shapes(config, layer) | dense | fused | shared_shapes(config)


def next_shapes(config: Mapping[str, Any], layer: int) -> Shapes:
    experts = expert_shapes(config, config["moe_intermediate_size"])
    return mixer_shapes(config, layer, is_fused=True) | experts | shared_shapes(config)


# --- llama.cpp's converter (conversion/qwen.py) ------------------------------------------------------------------


def by_key_head(weight: np.ndarray, key_heads: int, *sizes: int) -> list[np.ndarray]:
    """The parts, of these rows for each key head, of a tensor that holds them key head by key head."""
    groups = weight.reshape(key_heads, sum(sizes), -1)
    return [part.reshape(-1, weight.shape[1]) for part in np.split(groups, np.cumsum(sizes)[:-1], axis=1)]


def tiled(weight: np.ndarray, value_heads: int, key_heads: int, axis: int = 0) -> np.ndarray:
    """The value heads of an axis in another order: the first of each key head, then the second of each."""
    shape = weight.shape
    width = shape[axis] // value_heads
    return (
        weight.reshape(*shape[:axis], key_heads, -1, width, *shape[axis + 1 :]).swapaxes(axis, axis + 1).reshape(shape)
    )


def qwen35_tensors(config: Mapping[str, Any], arch: str, weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Of Qwen3.5: value heads in turns by key head, experts one tensor for each product."""
    heads = config["linear_num_value_heads"], config["linear_num_key_heads"]
    key_rows, found = 2 * heads[1] * config["linear_key_head_dim"], {}
    for name, weight in weights.items():
        part = name.partition(".linear_attn.")[2]
        if part in ("in_proj_qkv.weight", "conv1d.weight"):
            found[name] = np.concatenate([weight[:key_rows], tiled(weight[key_rows:], *heads)])
        elif part.startswith(("in_proj", "A_log", "dt_bias")):
            found[name] = tiled(weight, *heads)
        elif part == "out_proj.weight":
            found[name] = tiled(weight, *heads, axis=1)
        else:
            found[name] = weight
    return as_ggml(split_experts(found), arch)


def split_experts(weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Qwen3.5's experts as one tensor for each product."""
    found: dict[str, np.ndarray] = {}
    for name, weight in weights.items():
        if name.endswith("experts.gate_up_proj"):
            halves = zip(("gate_proj.weight", "up_proj.weight"), np.split(weight, 2, axis=1), strict=True)
            found |= {name.replace("gate_up_proj", half): rows for half, rows in halves}
        else:
            found[f"{name}.weight" if name.endswith("experts.down_proj") else name] = weight
    return found


def qwen3next_tensors(config: Mapping[str, Any], arch: str, weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Of Qwen3-Next: q, k and v apart from z, and b and a by key head as they are."""
    key_heads, dim = config["linear_num_key_heads"], config["linear_key_head_dim"]
    group, found = config["linear_num_value_heads"] // key_heads * dim, {}
    for name, weight in weights.items():
        if name.endswith("in_proj_qkvz.weight"):
            q, k, v, z = by_key_head(weight, key_heads, dim, dim, group, group)
            found[name.replace("qkvz", "qkv")], found[name.replace("qkvz", "z")] = np.concatenate([q, k, v]), z
        else:
            found[name] = weight
    return as_ggml(stacked(found, LLAMA_CPP), arch)


def as_ggml(weights: Mapping[str, np.ndarray], arch: str) -> dict[str, np.ndarray]:
    """By llama.cpp's names: -exp(A_log), norms with 1 added, convolutions and the shared expert's gate without the
    dimension of 1."""
    found = {}
    for name, weight in weights.items():
        if name.endswith("norm.weight") and not name.endswith("linear_attn.norm.weight"):
            weight = weight + np.float32(1)
        elif name.endswith("A_log"):
            weight = -np.exp(weight)
        elif name.endswith(("conv1d.weight", "shared_expert_gate.weight")):
            weight = weight.squeeze()
        found[gguf_name(name.replace("dt_bias", "dt_proj.bias"), arch)] = weight
    return found


# --- mlx-lm's `sanitize` -----------------------------------------------------------------------------------------


def mlx_tensors(weights: Mapping[str, np.ndarray], prefix: str = "language_model.") -> dict[str, np.ndarray]:
    """mlx_lm/models/qwen3_5.py: taps before the one input channel, norms with 1 added, stacks of experts."""
    found = {}
    for name, weight in stacked(split_experts(weights), MLX).items():
        if name.endswith("conv1d.weight"):
            weight = np.ascontiguousarray(np.moveaxis(weight, 2, 1))
        elif name.endswith("norm.weight") and not name.endswith("linear_attn.norm.weight"):
            weight = weight + np.float32(1)
        found[prefix + name.replace(".mlp.experts.", ".mlp.switch_mlp.")] = weight
    return found


# --- Recipes -----------------------------------------------------------------------------------------------------

Convert = Callable[[Mapping[str, Any], str, Mapping[str, np.ndarray]], dict[str, np.ndarray]]


def recipe(
    hf_class: str,
    arch: str,
    config: Mapping[str, Any],
    keys: Mapping[str, Any],
    convert: Convert,
    shapes: Callable[[Mapping[str, Any], int], Shapes],
    **more: Any,
) -> Recipe:
    return Recipe(
        hf_class,
        arch,
        config,
        gguf_keys=keys,
        more_shapes=shapes,
        norm_offset=1.0,
        vectors=VECTORS,
        gguf_tensors=partial(convert, config, arch),
        mlx_tensors=partial(mlx_tensors, prefix="" if arch == "qwen3next" else "language_model."),
        **more,
    )


RECIPES = {
    "qwen3_5": recipe(
        "Qwen3_5ForCausalLM",
        "qwen35",
        sizes(4, 96, 4, 2, 32, 160)
        | linear(4, 2, 32)
        | {"model_type": "qwen3_5_text", "attn_output_gate": True, "rope_parameters": MROPE},
        ssm(4, 2, 32) | MROPE_KEYS,
        qwen35_tensors,
        mixer_shapes,
        seed=1,
    ),
    "qwen3_5_moe": recipe(
        "Qwen3_5MoeForCausalLM",
        "qwen35moe",
        sizes(4, 64, 4, 2, 32, 64)
        | linear(4, 2, 32)
        | EXPERTS
        | {"model_type": "qwen3_5_moe_text", "rope_parameters": MROPE},
        ssm(4, 2, 32) | EXPERT_KEYS | MROPE_KEYS,
        qwen35_tensors,
        moe_shapes,
        seed=3,
    ),
    "qwen3_next": recipe(
        "Qwen3NextForCausalLM",
        "qwen3next",
        sizes(4, 64, 4, 2, 32, 96)
        | linear(6, 2, 32)
        | EXPERTS
        | {"model_type": "qwen3_next", "norm_topk_prob": True, "rope_theta": 1e6, "partial_rotary_factor": 0.25},
        ssm(6, 2, 32) | EXPERT_KEYS,
        qwen3next_tensors,
        next_shapes,
        seed=2,
    ),
}
