"""Granite 3: multipliers of the embedding, the scores, what is added to the residual, and the logits."""

from __future__ import annotations

from tests.families.recipe import Recipe, sizes

RECIPES = {
    "granite": Recipe(
        "GraniteForCausalLM",
        "granite",
        sizes(3, 96, 6, 2, 16, 160)
        | {
            "model_type": "granite",
            "rope_theta": 1e6,
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.11,
            "residual_multiplier": 0.7,
            "logits_scaling": 1.6,
        },
        seed=9,
        gguf_keys={
            "embedding_scale": 3.0,
            "attention.scale": 0.11,
            "residual_scale": 0.7,
            "logit_scale": 1.6,
        },
    ),
}
