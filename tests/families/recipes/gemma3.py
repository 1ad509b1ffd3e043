"""Gemma 3: norms after attention and the feed-forward, normed heads, windows with a rope of their own, softcaps."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.builders import write_json, write_safetensors
from tests.families.recipe import Recipe, head_norms, make_weights, sizes, write_hf
from tinyvllm.config import ModelFiles

POST_NORMS = ("post_attention_layernorm", "post_feedforward_layernorm")
NORMS = ("input_layernorm", *POST_NORMS, "pre_feedforward_layernorm")

RECIPES = {
    "gemma3": Recipe(
        "Gemma3ForCausalLM",
        "gemma3",
        sizes(7, 96, 3, 1, 32, 160)
        | {
            "model_type": "gemma3_text",
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": 32,
            "sliding_window": 21,
            "sliding_window_pattern": 6,
            "rope_theta": 1e6,
            "rope_local_base_freq": 10000.0,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            "tie_word_embeddings": True,
        },
        seed=1,
        gguf_keys={
            "attention.sliding_window": 21,
            "rope.scaling.type": "linear",
            "rope.scaling.factor": 8.0,
        },
        layer_norms=NORMS,
        post_norms=POST_NORMS,
        more_shapes=head_norms,
        norm_offset=1.0,
    ),
    "gemma3_capped": Recipe(
        "Gemma3ForCausalLM",
        None,
        sizes(4, 96, 4, 2, 32, 128)
        | {
            "model_type": "gemma3_text",
            "query_pre_attn_scalar": 24,
            "sliding_window": 13,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
                "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 2e6},
            },
            "final_logit_softcapping": 25.0,
        },
        seed=2,
        layer_norms=NORMS,
        post_norms=POST_NORMS,
        more_shapes=head_norms,
        norm_offset=1.0,
    ),
}


def write_multimodal_hf(directory: Path, recipe: Recipe) -> ModelFiles:
    """The same language model as the text part of Gemma3ForConditionalGeneration, next to a vision tower's tensors."""
    files = write_hf(directory, recipe)
    text = dict(recipe.config) | {"dtype": "float32"}
    config = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "text_config": text}
    write_json(directory / "config.json", config)
    weights = {name.replace("model.", "language_model.model.", 1): w for name, w in make_weights(recipe).items()}
    weights["vision_tower.vision_model.post_layernorm.weight"] = np.ones(8, np.float32)
    write_safetensors(directory / "model.safetensors", weights)
    return files
