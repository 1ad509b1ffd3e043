"""Phi-3: fused tensors, a rope in a part of each head with longrope's factors, a window."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from tests.families.recipe import Recipe, sizes

FUSED = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}
SHORT, LONG = [1.0 + 0.05 * i for i in range(12)], [1.0 + 0.4 * i for i in range(12)]


def recipe(original: int, window: int | None, seed: int) -> Recipe:
    """Longrope's long factors apply where `original` is less than the longest context of the tests, 192."""
    config: dict[str, Any] = {
        "model_type": "phi3",
        "partial_rotary_factor": 0.75,
        "original_max_position_embeddings": original,
        "rope_scaling": {"type": "longrope", "short_factor": SHORT, "long_factor": LONG},
        "rope_theta": 10000.0,
        "sliding_window": window,
    }
    factor = math.sqrt(1 + math.log(512 / original) / math.log(original))
    return Recipe(
        "Phi3ForCausalLM",
        "phi3",
        sizes(3, 128, 4, 2, 32, 160) | config,
        seed=seed,
        gguf_keys={
            "rope.dimension_count": 24,
            "rope.scaling.original_context_length": original,
            "rope.scaling.attn_factor": factor,
            "attention.sliding_window": window or 0,
        },
        gguf_more={
            "rope_factors_short.weight": np.array(SHORT, np.float32),
            "rope_factors_long.weight": np.array(LONG, np.float32),
        },
        fused=FUSED,
    )


RECIPES = {
    "phi3": recipe(original=256, window=19, seed=1),
    "phi3_long": recipe(original=2, window=None, seed=2),
}
