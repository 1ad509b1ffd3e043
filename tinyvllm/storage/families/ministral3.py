"""Ministral 3: YaRN, and queries that grow with their position. GGUF's mistral3, which is Mistral Small 3's too."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from tinyvllm.config import ModelConfig, QueryScaling
from tinyvllm.storage.families import mistral
from tinyvllm.storage.families.family import FamilyFiles
from tinyvllm.storage.hf_rope import rope_values
from tinyvllm.storage.values import Values


def refine_hf(config: ModelConfig, values: Values) -> ModelConfig:
    """transformers' get_llama_4_attn_scale."""
    rope = rope_values(values)
    beta = rope.optional_number("llama_4_scaling_beta")
    if not beta:
        return config
    span = rope.integer("original_max_position_embeddings", values.integer("max_position_embeddings"))
    return replace(config, query_scaling=QueryScaling(beta, span))


def refine_gguf(config: ModelConfig, values: Values, tensors: Collection[str]) -> ModelConfig:
    """llama.cpp's mistral3: the span is the context before YaRN."""
    beta = values.optional_number("attention.temperature_scale")
    if not beta:
        return config
    span = values.integer("rope.scaling.original_context_length", config.max_position)
    return replace(config, query_scaling=QueryScaling(beta, span))


FILES = FamilyFiles(
    hf_classes=("Ministral3ForCausalLM",),
    hf_types=("ministral3",),
    hf_wrappers=(mistral.WRAPPER,),
    gguf=("mistral3",),
    hf_defaults={
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 262144,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e6,
            "factor": 16.0,
            "original_max_position_embeddings": 16384,
            "mscale_all_dim": 1.0,
            "mscale": 1.0,
            "llama_4_scaling_beta": 0.1,
        },
    },
    hf_windows="all",
    gguf_window_pattern=0,
    gguf_interleaves_pairs=True,
    hf_renamed=mistral.RENAMED,
    hf_unread=mistral.UNREAD,
    hf_refine=refine_hf,
    gguf_refine=refine_gguf,
)
