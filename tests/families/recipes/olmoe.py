"""OLMoE: 2 of 6 experts, not renormalized; norms of all heads' queries and of all keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.families.experts import expert_shapes
from tests.families.recipe import Recipe, Shapes, sizes
from tests.families.recipes.olmo import whole_norms


def layer_shapes(config: Mapping[str, Any], layer: int) -> Shapes:
    return whole_norms(config, layer) | expert_shapes(config, config["intermediate_size"])


RECIPES = {
    "olmoe": Recipe(
        "OlmoeForCausalLM",
        "olmoe",
        sizes(2, 96, 6, 2, 16, 64)
        | {
            "model_type": "olmoe",
            "rope_theta": 1e4,
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "norm_topk_prob": False,
        },
        seed=7,
        more_shapes=layer_shapes,
        gguf_keys={"expert_count": 6, "expert_used_count": 2},
    ),
}
