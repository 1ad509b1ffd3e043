"""Mistral: heads wider than hidden_size / heads, and a window."""

from __future__ import annotations

from tests.families.recipe import Recipe, sizes

RECIPES = {
    "mistral": Recipe(
        "MistralForCausalLM",
        "llama",
        sizes(3, 96, 4, 2, 48, 160) | {"model_type": "mistral", "sliding_window": 17, "rope_theta": 1e6},
        seed=1,
        gguf_keys={"attention.sliding_window": 17},
    ),
}
