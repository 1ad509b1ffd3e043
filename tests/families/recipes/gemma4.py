"""Gemma 4: a model like E2B (layers' own embeddings, shared keys, wider feed-forwards), one like 31B (values that are
keys), and one like 26B (which has experts, too). In all, layers without a window have larger heads, of which a quarter
rotates."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from tests.builders import gguf_name
from tests.families.recipe import NUM_TOKENS, Recipe, Shapes, sizes
from tests.families.recipes.gemma3 import NORMS, POST_NORMS

WINDOWED, FULL = "sliding_attention", "full_attention"
LAYERS = [WINDOWED, FULL, WINDOWED, FULL, WINDOWED, FULL]
EXPERT_NORMS = ("pre_feedforward_layernorm_2", "post_feedforward_layernorm_1", "post_feedforward_layernorm_2")
GLOBAL_DIM, SIZE = 64, 32  # of heads without a window; of a layer's own embedding
NUM_SHARED = 3

COMMON = {
    "model_type": "gemma4_text",
    "global_head_dim": GLOBAL_DIM,
    "sliding_window": 21,
    "rope_parameters": {
        WINDOWED: {"rope_type": "default", "rope_theta": 10000.0},
        FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
    },
    "final_logit_softcapping": 30.0,
    "tie_word_embeddings": True,
    "vocab_size_per_layer_input": NUM_TOKENS,
}
COMMON_KEYS = {
    "attention.key_length": GLOBAL_DIM,
    "attention.value_length": GLOBAL_DIM,
    "attention.key_length_swa": 32,
    "attention.value_length_swa": 32,
    "attention.sliding_window": 21,
    "rope.freq_base": 1e6,
    "rope.freq_base_swa": 10000.0,
    "rope.dimension_count": GLOBAL_DIM,
    "rope.dimension_count_swa": 32,
    "final_logit_softcapping": 30.0,
}


def layer_shapes(config: Mapping[str, Any], layer: int) -> Shapes:
    """What differs from a llama's layer. Layers that read others' keys store some too, as in Google's files."""
    is_global = config["layer_types"][layer] == FULL
    hidden, dim = config["hidden_size"], GLOBAL_DIM if is_global else config["head_dim"]
    has_v_from_k = is_global and config.get("attention_k_eq_v", False)
    kv_heads = config["num_global_key_value_heads" if has_v_from_k else "num_key_value_heads"]
    heads = {"q": config["num_attention_heads"], "k": kv_heads, "v": kv_heads}
    shapes: Shapes = {f"self_attn.{name}_proj.weight": (count * dim, hidden) for name, count in heads.items()}
    shapes |= {f"self_attn.{name}_norm.weight": (dim,) for name in "qk"} | {"layer_scalar": (1,)}
    shapes["self_attn.o_proj.weight"] = (hidden, heads["q"] * dim)
    if has_v_from_k:
        shapes["self_attn.v_proj.weight"] = ()
    if config.get("enable_moe_block"):
        shapes |= sparse_shapes(config)
    if layer >= config["num_hidden_layers"] - config["num_kv_shared_layers"]:
        ffn = 2 * config["intermediate_size"]
        shapes |= {"mlp.gate_proj.weight": (ffn, hidden), "mlp.up_proj.weight": (ffn, hidden)}
        shapes["mlp.down_proj.weight"] = (hidden, ffn)
    if size := config["hidden_size_per_layer_input"]:
        shapes |= {"per_layer_input_gate.weight": (size, hidden), "per_layer_projection.weight": (hidden, size)}
        shapes["post_per_layer_input_norm.weight"] = (hidden,)
    return shapes


def sparse_shapes(config: Mapping[str, Any]) -> Shapes:
    """Of experts, which have fused gates and up projections, beside the dense feed-forward."""
    hidden, count, ffn = config["hidden_size"], config["num_experts"], config["moe_intermediate_size"]
    shapes: Shapes = {"router.proj.weight": (count, hidden), "router.scale": (hidden,)}
    shapes |= {"router.per_expert_scale": (count,), "experts.gate_up_proj": (count, 2 * ffn, hidden)}
    shapes |= {f"{name}.weight": (hidden,) for name in EXPERT_NORMS}
    return shapes | {"experts.down_proj": (count, hidden, ffn)}


def gguf_expert_name(name: str) -> str:
    """llama.cpp's conversion/gemma.py, where it has another suffix than `weight`, or ours has none."""
    layer = name.split(".")[2]
    special = {
        "router.scale": f"blk.{layer}.ffn_gate_inp.scale",
        "router.per_expert_scale": f"blk.{layer}.ffn_down_exps.scale",
    }
    for end, found in special.items():
        if name.endswith(end):
            return found
    return gguf_name(f"{name}.weight" if ".experts." in name else name, "gemma4")


def mlx_tensors(weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """mlx-lm's gemma4_text: gate and up projection apart, in `switch_glu`."""
    found: dict[str, np.ndarray] = {}
    for name, weight in weights.items():
        module = name.replace(".experts.", ".experts.switch_glu.")
        if name.endswith("experts.gate_up_proj"):
            for part, rows in zip(("gate_proj", "up_proj"), np.split(weight, 2, axis=1), strict=True):
                found[module.replace("gate_up_proj", part) + ".weight"] = np.ascontiguousarray(rows)
        else:
            found[module + (".weight" if ".experts." in name else "")] = weight
    return found


def gguf_tensors(weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """llama.cpp's conversion/gemma.py: the pairs that do not rotate have a huge divisor."""
    found = {gguf_expert_name(name.replace("_scalar", "_scalar.weight")): w for name, w in weights.items()}
    rotated = GLOBAL_DIM // 8
    return found | {"rope_freqs.weight": np.array([1.0] * rotated + [1e30] * (GLOBAL_DIM // 2 - rotated), np.float32)}


make = partial(
    Recipe,
    "Gemma4ForCausalLM",
    "gemma4",
    layer_norms=NORMS,
    post_norms=(*POST_NORMS, "post_per_layer_input_norm"),
    more_shapes=layer_shapes,
    gguf_tensors=gguf_tensors,
    mlx_tensors=mlx_tensors,
)

RECIPES = {
    "gemma4_e2b": make(
        sizes(len(LAYERS), 96, 4, 1, 32, 96)
        | COMMON
        | {
            "layer_types": LAYERS,
            "num_kv_shared_layers": NUM_SHARED,
            "use_double_wide_mlp": True,
            "hidden_size_per_layer_input": SIZE,
        },
        seed=2,
        top_shapes={
            "model.embed_tokens_per_layer.weight": (NUM_TOKENS, len(LAYERS) * SIZE),
            "model.per_layer_model_projection.weight": (len(LAYERS) * SIZE, 96),
            "model.per_layer_projection_norm.weight": (SIZE,),
        },
        gguf_keys=COMMON_KEYS
        | {
            "attention.sliding_window_pattern": [kind == WINDOWED for kind in LAYERS],
            "attention.shared_kv_layers": NUM_SHARED,
            "embedding_length_per_layer_input": SIZE,
            "feed_forward_length": [96] * NUM_SHARED + [192] * NUM_SHARED,
        },
    ),
    "gemma4_31b": make(
        sizes(4, 96, 4, 2, 32, 96)
        | COMMON
        | {
            "layer_types": LAYERS[:4],
            "num_kv_shared_layers": 0,
            "hidden_size_per_layer_input": 0,
            "attention_k_eq_v": True,
            "num_global_key_value_heads": 1,
        },
        seed=2,
        gguf_keys=COMMON_KEYS
        | {
            "attention.sliding_window_pattern": [kind == WINDOWED for kind in LAYERS[:4]],
            "attention.shared_kv_layers": 0,
            "embedding_length_per_layer_input": 0,
            "attention.head_count_kv": [2, 1, 2, 1],
        },
    ),
    "gemma4_26b": make(
        sizes(2, 64, 4, 2, 32, 96)
        | COMMON
        | {
            "layer_types": LAYERS[:2],
            "num_kv_shared_layers": 0,
            "hidden_size_per_layer_input": 0,
            "attention_k_eq_v": True,
            "num_global_key_value_heads": 1,
            "enable_moe_block": True,
            "num_experts": 6,
            "top_k_experts": 2,
            "moe_intermediate_size": 32,
        },
        seed=8,
        gguf_keys=COMMON_KEYS
        | {
            "attention.sliding_window_pattern": [kind == WINDOWED for kind in LAYERS[:2]],
            "attention.shared_kv_layers": 0,
            "embedding_length_per_layer_input": 0,
            "attention.head_count_kv": [2, 1],
            "expert_count": 6,
            "expert_used_count": 2,
            "expert_feed_forward_length": 32,
        },
    ),
}
