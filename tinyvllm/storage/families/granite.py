"""Granite 3: Llama's layers with four multipliers."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from tinyvllm.config import ModelConfig
from tinyvllm.storage.families.family import FamilyFiles
from tinyvllm.storage.families.llama import BIASES
from tinyvllm.storage.values import Values


def refine_hf(config: ModelConfig, values: Values) -> ModelConfig:
    return replace(
        config,
        embedding_scale=values.positive("embedding_multiplier", 1.0),
        residual_scale=values.positive("residual_multiplier", 1.0),
        score_scale=values.positive("attention_multiplier", 1.0),
        logit_scale=1.0 / values.positive("logits_scaling", 1.0),
    )


def refine_gguf(config: ModelConfig, values: Values, tensors: Collection[str]) -> ModelConfig:
    """A multiplier of 0 is none, and so is a rope that was not trained (llama.cpp's granite.cpp)."""
    return replace(
        config,
        embedding_scale=values.optional_number("embedding_scale") or 1.0,
        residual_scale=values.optional_number("residual_scale") or 1.0,
        score_scale=values.optional_number("attention.scale") or None,
        logit_scale=1.0 / (values.optional_number("logit_scale") or 1.0),
        ropeless=() if values.flag("rope.scaling.finetuned", default=True) else (True,),
    )


FILES = FamilyFiles(
    hf_classes=("GraniteForCausalLM",),
    hf_types=("granite",),
    gguf=("granite",),
    hf_defaults={"max_position_embeddings": 2048},
    hf_biases=BIASES,
    gguf_interleaves_pairs=True,
    hf_refine=refine_hf,
    gguf_refine=refine_gguf,
)
