"""OLMo 2 and 3: norms after only, norms of all heads' queries and of all keys; windows, and YaRN in other layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.families.recipe import Recipe, Shapes, sizes

NORMS = ("post_attention_layernorm", "post_feedforward_layernorm")
LAYER_TYPES = ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"]
YARN = {
    "rope_type": "yarn",
    "factor": 8.0,
    "original_max_position_embeddings": 48,
    "attention_factor": 1.1,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}


def whole_norms(config: Mapping[str, Any], layer: int) -> Shapes:
    """`more_shapes`: q_norm and k_norm of all heads, none before attention."""
    head_dim = config["head_dim"]
    return {
        "self_attn.q_norm.weight": (config["num_attention_heads"] * head_dim,),
        "self_attn.k_norm.weight": (config["num_key_value_heads"] * head_dim,),
    }


RECIPES = {
    "olmo2": Recipe(
        "Olmo2ForCausalLM",
        "olmo2",
        sizes(2, 96, 6, 2, 16, 160) | {"model_type": "olmo2", "rope_theta": 5e5},
        seed=1,
        layer_norms=NORMS,
        more_shapes=whole_norms,
    ),
    "olmo3": Recipe(
        "Olmo3ForCausalLM",
        "olmo2",
        sizes(4, 128, 4, 2, 32, 160)
        | {
            "model_type": "olmo3",
            "rope_theta": 5e5,
            "rope_scaling": YARN,
            "sliding_window": 23,
            "layer_types": LAYER_TYPES,
        },
        seed=3,
        gguf_keys={
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 8.0,
            "rope.scaling.original_context_length": 48,
            "rope.scaling.yarn_attn_factor": 1.1,
            "attention.sliding_window": 23,
            "attention.sliding_window_pattern": [kind == "sliding_attention" for kind in LAYER_TYPES],
        },
        layer_norms=NORMS,
        more_shapes=whole_norms,
    ),
}
