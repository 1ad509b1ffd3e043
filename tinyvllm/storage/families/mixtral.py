"""Mixtral 8x7B and 8x22B. Their GGUF files are called llama's."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from tinyvllm.config import ModelConfig
from tinyvllm.storage.families.experts import gguf_experts, hf_experts
from tinyvllm.storage.families.family import FamilyFiles
from tinyvllm.storage.values import Values


def refine_hf(config: ModelConfig, values: Values) -> ModelConfig:
    return replace(config, experts=hf_experts(values, "intermediate_size"))


def refine_gguf(config: ModelConfig, values: Values, tensors: Collection[str]) -> ModelConfig:
    return replace(config, experts=gguf_experts(values, "feed_forward_length"))


FILES = FamilyFiles(
    hf_classes=("MixtralForCausalLM",),
    hf_types=("mixtral",),
    gguf=("llama",),
    hf_defaults={
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    hf_windows="all",
    gguf_window_pattern=0,
    gguf_interleaves_pairs=True,
    has_experts=True,
    hf_refine=refine_hf,
    gguf_refine=refine_gguf,
)
