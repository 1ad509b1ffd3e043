"""Qwen3.5 and Qwen3-Next: Gated DeltaNet layers, and attention with an output gate and a partial rope."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from tests.builders import gguf_name
from tests.families.recipe import Recipe, Shapes, head_norms, sizes

LINEAR = {
    "full_attention_interval": 3,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4,
}
# As in GGUF. A sequence's state fades slowly: by a factor of about exp(-0.13) a token
VECTORS = {"linear_attn.A_log": (-2.0, 0.7), "linear_attn.dt_bias": (0.5, 0.5), "linear_attn.norm.weight": (1.0, 0.2)}
ROPE = {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.25}
SSM_KEYS = {
    "ssm.conv_kernel": 4,
    "ssm.state_size": 32,
    "ssm.group_count": 2,
    "ssm.time_step_rank": 4,
    "ssm.inner_size": 128,
    "full_attention_interval": 3,
    "rope.dimension_count": 8,
    "rope.freq_base": 1e6,
}


def mixer_shapes(config: Mapping[str, Any], layer: int) -> Shapes:
    """Every third layer has attention, with rows of queries and of the gate by head; the others have a recurrence."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    modules = ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")
    if (layer + 1) % config["full_attention_interval"] == 0:
        return head_norms(config, layer) | {"self_attn.q_proj.weight": (2 * heads * config["head_dim"], hidden)}
    values, keys = (config[f"linear_num_{name}_heads"] * config[f"linear_{name}_head_dim"] for name in ("value", "key"))
    count = config["linear_num_value_heads"]
    return dict.fromkeys((f"self_attn.{name}.weight" for name in modules), ()) | {
        "linear_attn.in_proj_qkv.weight": (2 * keys + values, hidden),
        "linear_attn.in_proj_z.weight": (values, hidden),
        "linear_attn.in_proj_b.weight": (count, hidden),
        "linear_attn.in_proj_a.weight": (count, hidden),
        "linear_attn.conv1d.weight": (2 * keys + values, 1, config["linear_conv_kernel_dim"]),
        "linear_attn.A_log": (count,),
        "linear_attn.dt_bias": (count,),
        "linear_attn.norm.weight": (config["linear_value_head_dim"],),
        "linear_attn.out_proj.weight": (hidden, values),
    }


def tiled(weight: np.ndarray, heads: int, axis: int = 0) -> np.ndarray:
    """The value heads of an axis in llama.cpp's order: the first of each key head, then the second of each."""
    shape = weight.shape
    groups = weight.reshape(*shape[:axis], LINEAR["linear_num_key_heads"], -1, shape[axis] // heads, *shape[axis + 1 :])
    return groups.swapaxes(axis, axis + 1).reshape(shape)


def qwen35_tensors(weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What llama.cpp's converter (conversion/qwen.py) makes of them."""
    found, heads = {}, LINEAR["linear_num_value_heads"]
    key_rows = 2 * LINEAR["linear_num_key_heads"] * LINEAR["linear_key_head_dim"]
    for name, weight in weights.items():
        part = name.partition(".linear_attn.")[2]
        if name.endswith("norm.weight") and part != "norm.weight":
            weight = weight + np.float32(1)
        if part in ("in_proj_qkv.weight", "conv1d.weight"):
            weight = weight.reshape(len(weight), -1)
            weight = np.concatenate([weight[:key_rows], tiled(weight[key_rows:], heads)])
        elif part.startswith(("in_proj", "A_log", "dt_bias")):
            weight = tiled(weight, heads)
        elif part == "out_proj.weight":
            weight = tiled(weight, heads, axis=1)
        if part == "A_log":
            weight = -np.exp(weight)
        found[gguf_name(name.replace("dt_bias", "dt_proj.bias"), "qwen35")] = weight
    return found


RECIPES = {
    "qwen3_5": Recipe(
        "Qwen3_5ForCausalLM",
        "qwen35",
        sizes(4, 96, 4, 2, 32, 160)
        | LINEAR
        | {
            "model_type": "qwen3_5_text",
            "attn_output_gate": True,
            "rope_parameters": ROPE | {"mrope_interleaved": True, "mrope_section": [2, 1, 1]},
        },
        seed=1,
        gguf_keys=SSM_KEYS | {"rope.dimension_sections": [2, 1, 1, 0]},
        more_shapes=mixer_shapes,
        norm_offset=1.0,
        vectors=VECTORS,
        gguf_tensors=qwen35_tensors,
        is_slow=True,
    ),
}
