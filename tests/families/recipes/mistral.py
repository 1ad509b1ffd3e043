"""Mistral: heads wider than hidden_size / heads, and a window. Ministral: a window in some layers. Ministral 3: YaRN
with DeepSeek's slopes, and queries that grow with their position."""

from __future__ import annotations

from tests.families.recipe import Recipe, sizes

YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e5,
    "factor": 4.0,
    "original_max_position_embeddings": 24,
    "max_position_embeddings": 512,
    "beta_fast": 16.0,
    "beta_slow": 0.5,
    "mscale": 1.0,
    "mscale_all_dim": 0.5,
    "llama_4_scaling_beta": 0.4,
}

RECIPES = {
    "mistral": Recipe(
        "MistralForCausalLM",
        "llama",
        sizes(3, 96, 4, 2, 48, 160) | {"model_type": "mistral", "sliding_window": 17, "rope_theta": 1e6},
        seed=1,
        gguf_keys={"attention.sliding_window": 17},
    ),
    "ministral": Recipe(
        "MinistralForCausalLM",
        None,
        sizes(3, 64, 4, 2, 16, 96)
        | {
            "model_type": "ministral",
            "sliding_window": 15,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_theta": 1e6,
        },
        seed=1,
    ),
    "ministral3": Recipe(
        "Ministral3ForCausalLM",
        "mistral3",
        sizes(3, 96, 4, 2, 32, 160) | {"model_type": "ministral3", "rope_parameters": YARN},
        seed=1,
        gguf_keys={
            "rope.freq_base": 1e5,
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": 24,
            "rope.scaling.yarn_beta_fast": 16.0,
            "rope.scaling.yarn_beta_slow": 0.5,
            "rope.scaling.yarn_log_multiplier": 0.5,
            "attention.temperature_scale": 0.4,
        },
    ),
}
