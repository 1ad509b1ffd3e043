"""Qwen2: biases; windows from a layer on."""

from __future__ import annotations

from tests.families.recipe import Recipe, sizes

BIASES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
RECIPES = {
    "qwen2": Recipe(
        "Qwen2ForCausalLM",
        "qwen2",
        sizes(3, 96, 6, 2, 16, 160) | {"model_type": "qwen2", "rope_theta": 1e6},
        seed=2,
        biases=BIASES,
    ),
    "qwen2_windowed": Recipe(
        "Qwen2ForCausalLM",
        None,
        sizes(3, 64, 4, 2, 16, 96)
        | {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 19, "max_window_layers": 1},
        seed=1,
        biases=BIASES,
    ),
}
