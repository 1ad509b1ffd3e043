"""GLM-4.7-Flash: latents of queries and of keys and values, an interleaved rope, experts chosen by sigmoid and bias
from some of their groups, a shared expert, and a first dense layer. DeepSeek V2 Lite: queries without a latent,
softmax, YaRN with its factor of scores, a shared expert of another size."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from tests.builders import gguf_name
from tests.families.experts import LLAMA_CPP, MLX, expert_shapes, stacked
from tests.families.recipe import Recipe, Shapes, sizes

LATENTS = {"kv_lora_rank": 64, "qk_rope_head_dim": 32, "qk_nope_head_dim": 32, "v_head_dim": 32}
SPARSE = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 64,
    "first_k_dense_replace": 1,
    "mlp_layer_types": ["dense", "sparse", "sparse"],
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
}
GGUF_KEYS = {
    "attention.kv_lora_rank": 64,
    "rope.dimension_count": 32,
    "leading_dense_block_count": 1,
    "expert_count": 8,
    "expert_used_count": 3,
    "expert_feed_forward_length": 64,
}


def layer_shapes(config: Mapping[str, Any], layer: int) -> Shapes:
    hidden, heads, rank = config["hidden_size"], config["num_attention_heads"], config["kv_lora_rank"]
    nope, rope, value = (config[key] for key in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    query_rank = config["q_lora_rank"]
    shapes: Shapes = {f"self_attn.{name}_proj.weight": () for name in "kv"}
    if query_rank is not None:
        shapes |= {"self_attn.q_proj.weight": (), "self_attn.q_a_proj.weight": (query_rank, hidden)}
        shapes["self_attn.q_a_layernorm.weight"] = (query_rank,)
    name = "q_proj" if query_rank is None else "q_b_proj"
    shapes[f"self_attn.{name}.weight"] = (heads * (nope + rope), query_rank or hidden)
    shapes["self_attn.kv_a_proj_with_mqa.weight"] = (rank + rope, hidden)
    shapes["self_attn.kv_a_layernorm.weight"] = (rank,)
    shapes["self_attn.kv_b_proj.weight"] = (heads * (nope + value), rank)
    shapes["self_attn.o_proj.weight"] = (hidden, heads * value)
    return shapes if layer < config["first_k_dense_replace"] else shapes | _sparse(config)


def _sparse(config: Mapping[str, Any]) -> Shapes:
    hidden, ffn = config["hidden_size"], config["moe_intermediate_size"]
    shapes = expert_shapes(dict(config) | {"num_experts": config["n_routed_experts"]}, ffn)
    if config["model_type"] != "deepseek_v2":
        shapes["mlp.gate.e_score_correction_bias"] = (config["n_routed_experts"],)
    shared = config["n_shared_experts"] * ffn
    shapes |= {f"mlp.shared_experts.{name}_proj.weight": (shared, hidden) for name in ("gate", "up")}
    return shapes | {"mlp.shared_experts.down_proj.weight": (hidden, shared)}


def by_head(config: Mapping[str, Any], weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """kv_b_proj as llama.cpp's and mlx-lm's converters split it: keys (H, rank, nope) and values (H, value, rank)."""
    heads = weight.reshape(config["num_attention_heads"], -1, config["kv_lora_rank"])
    nope = config["qk_nope_head_dim"]
    return np.ascontiguousarray(heads[:, :nope].swapaxes(1, 2)), np.ascontiguousarray(heads[:, nope:])


def to_gguf(config: Mapping[str, Any], weights: Mapping[str, np.ndarray], *, is_split: bool) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for name, weight in stacked(weights, LLAMA_CPP).items():
        if is_split and name.endswith("kv_b_proj.weight"):
            for letter, part in zip("kv", by_head(config, weight), strict=True):
                found[gguf_name(name.replace("kv_b_proj", f"{letter}_b_proj"), "deepseek2")] = part
        elif name.endswith("e_score_correction_bias"):
            found[f"blk.{name.split('.')[2]}.exp_probs_b.bias"] = weight
        else:
            found[gguf_name(name, "deepseek2")] = weight
    return found


def to_mlx(config: Mapping[str, Any], weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for key, weight in stacked(weights, MLX).items():
        if key.endswith("kv_b_proj.weight"):
            for module, part in zip(("embed_q", "unembed_out"), by_head(config, weight), strict=True):
                found[key.replace("kv_b_proj", module)] = part
        else:
            found[key] = weight
    return found


GLM = (
    sizes(3, 64, 4, 4, 32, 96)
    | LATENTS
    | SPARSE
    | {
        "model_type": "glm4_moe_lite",
        "rope_theta": 1e6,
        "q_lora_rank": 32,
        "n_shared_experts": 1,
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 1.8,
        "norm_topk_prob": True,
    }
)
LITE = (
    sizes(3, 64, 4, 4, 32, 96)
    | LATENTS
    | SPARSE
    | {
        "model_type": "deepseek_v2",
        "rope_scaling": YARN,
        "q_lora_rank": None,
        "n_shared_experts": 2,
        "routed_scaling_factor": 1.0,
        "norm_topk_prob": False,
        "topk_method": "greedy",
    }
)

RECIPES = {
    "glm4_moe_lite": Recipe(
        "Glm4MoeLiteForCausalLM",
        "deepseek2",
        GLM,
        seed=1,
        more_shapes=layer_shapes,
        gguf_keys=GGUF_KEYS
        | {
            "attention.head_count_kv": 1,  # the latents as one head of keys and values
            "attention.key_length": 96,
            "attention.value_length": 64,
            "attention.key_length_mla": 64,
            "attention.value_length_mla": 32,
            "attention.q_lora_rank": 32,
            "expert_shared_count": 1,
            "expert_weights_scale": 1.8,
            "expert_weights_norm": True,
            "expert_gating_func": 2,
            "expert_group_count": 4,
            "expert_group_used_count": 2,
        },
        gguf_tensors=partial(to_gguf, GLM, is_split=True),
        mlx_tensors=partial(to_mlx, GLM),
    ),
    "deepseek_v2_lite": Recipe(
        "DeepseekV2ForCausalLM",
        "deepseek2",
        LITE,
        seed=1,
        more_shapes=layer_shapes,
        gguf_keys=GGUF_KEYS  # as older files have it
        | {
            "attention.key_length": 64,
            "attention.value_length": 32,
            "expert_shared_count": 2,
            "expert_weights_scale": 1.0,
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": 128,
            "rope.scaling.yarn_log_multiplier": 0.0707,
        },
        gguf_tensors=partial(to_gguf, LITE, is_split=False),
    ),
}
