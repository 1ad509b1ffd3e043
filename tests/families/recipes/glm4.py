"""GLM-4: an interleaved rope in half of each head, biases of queries, keys and values, norms before and after."""

from __future__ import annotations

from tests.families.recipe import Recipe, sizes

BIASES = tuple(f"self_attn.{name}_proj" for name in "qkv")
POST_NORMS = ("post_self_attn_layernorm", "post_mlp_layernorm")
FUSED = {"mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj")}
CONFIG = {"rope_theta": 10000.0, "partial_rotary_factor": 0.5, "attention_bias": True}

RECIPES = {
    "glm": Recipe(
        "GlmForCausalLM",
        None,
        sizes(2, 64, 4, 2, 16, 96) | {"model_type": "glm"} | CONFIG,
        seed=2,
        biases=BIASES,
        fused=FUSED,
    ),
    "glm4": Recipe(
        "Glm4ForCausalLM",
        "glm4",
        sizes(3, 96, 4, 2, 32, 160) | {"model_type": "glm4"} | CONFIG,
        seed=2,
        gguf_keys={"rope.dimension_count": 16},
        layer_norms=("input_layernorm", "post_attention_layernorm", *POST_NORMS),
        post_norms=POST_NORMS,
        biases=BIASES,
        fused=FUSED,
    ),
}
