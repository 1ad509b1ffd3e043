"""SmolLM3: a layer in four has no rope; the others' is YaRN's. Biases of attention and of the feed-forward."""

from __future__ import annotations

from tests.families.recipe import Recipe, sizes

BIASES = tuple(f"self_attn.{name}_proj" for name in "qkvo") + tuple(
    f"mlp.{name}_proj" for name in ("gate", "up", "down")
)
YARN = {"rope_type": "yarn", "factor": 3.0, "original_max_position_embeddings": 64, "rope_theta": 1e5}

RECIPES = {
    "smollm3": Recipe(
        "SmolLM3ForCausalLM",
        "smollm3",
        sizes(4, 96, 6, 2, 16, 160)
        | {
            "model_type": "smollm3",
            "rope_parameters": YARN,
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": False,
        },
        seed=6,
        biases=BIASES,
        gguf_keys={
            "rope.freq_base": 1e5,
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 3.0,
            "rope.scaling.original_context_length": 64,
        },
    ),
}
