"""Mixtral: 2 of 4 experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.families.experts import expert_shapes
from tests.families.recipe import Recipe, Shapes, sizes


def layer_shapes(config: Mapping[str, Any], layer: int) -> Shapes:
    return expert_shapes(config, config["intermediate_size"], "block_sparse_moe")


RECIPES = {
    "mixtral": Recipe(
        "MixtralForCausalLM",
        "llama",
        sizes(2, 64, 4, 2, 32, 96)
        | {"model_type": "mixtral", "rope_theta": 1e6, "num_local_experts": 4, "num_experts_per_tok": 2},
        seed=4,
        more_shapes=layer_shapes,
        gguf_keys={"expert_count": 4, "expert_used_count": 2},
    ),
}
