"""Gemma 2: Gemma 3's norms around attention and the feed-forward, both softcaps, a window in every other layer."""

from __future__ import annotations

from tests.families.recipe import Recipe, sizes
from tests.families.recipes.gemma3 import NORMS, POST_NORMS

RECIPES = {
    "gemma2": Recipe(
        "Gemma2ForCausalLM",
        "gemma2",
        sizes(3, 96, 3, 1, 32, 160)
        | {
            "model_type": "gemma2",
            "query_pre_attn_scalar": 32,
            "sliding_window": 21,
            "rope_theta": 10000.0,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 30.0,
            "tie_word_embeddings": True,
        },
        seed=1,
        gguf_keys={
            "attention.sliding_window": 21,
            "attn_logit_softcapping": 5.0,
        },
        layer_norms=NORMS,
        post_norms=POST_NORMS,
        norm_offset=1.0,
    ),
}
