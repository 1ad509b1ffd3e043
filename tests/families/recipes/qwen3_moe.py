"""Qwen3 with experts, 3 of 8 renormalized; and a layer without."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.families.experts import expert_shapes
from tests.families.recipe import Recipe, Shapes, head_norms, sizes


def layer_shapes(config: Mapping[str, Any], layer: int) -> Shapes:
    own = {} if layer in config["mlp_only_layers"] else expert_shapes(config, config["moe_intermediate_size"])
    return head_norms(config, layer) | own


RECIPES = {
    "qwen3_moe": Recipe(
        "Qwen3MoeForCausalLM",
        "qwen3moe",
        sizes(3, 64, 4, 2, 32, 96)
        | {
            "model_type": "qwen3_moe",
            "rope_theta": 1e6,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 64,
            "norm_topk_prob": True,
            "mlp_only_layers": [1],
        },
        seed=3,
        more_shapes=layer_shapes,
        gguf_keys={"expert_count": 8, "expert_used_count": 3, "expert_feed_forward_length": 64},
    ),
}
