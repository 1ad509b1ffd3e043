"""OLMoE 1B-7B."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from tinyvllm.config import ModelConfig
from tinyvllm.storage.families.experts import gguf_experts, hf_experts
from tinyvllm.storage.families.family import FamilyFiles
from tinyvllm.storage.values import Values


def refine_hf(config: ModelConfig, values: Values) -> ModelConfig:
    if values.get("clip_qkv") is not None:
        values.unsupported("clip_qkv", "null (queries, keys and values are not clipped)")
    experts = hf_experts(values, "intermediate_size")
    return replace(config, experts=replace(experts, renormalizes=values.flag("norm_topk_prob")))


def refine_gguf(config: ModelConfig, values: Values, tensors: Collection[str]) -> ModelConfig:
    """llama.cpp does not renormalize in these models."""
    if values.optional_number("attention.clamp_kqv"):
        values.unsupported("attention.clamp_kqv", "0 (queries, keys and values are not clipped)")
    return replace(config, experts=replace(gguf_experts(values, "feed_forward_length"), renormalizes=False))


FILES = FamilyFiles(
    hf_classes=("OlmoeForCausalLM",),
    hf_types=("olmoe",),
    gguf=("olmoe",),
    hf_defaults={
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "num_experts": 64,
        "num_experts_per_tok": 8,
    },
    hf_biases={"attention_bias": ("qkv", "out")},
    has_experts=True,
    hf_refine=refine_hf,
    gguf_refine=refine_gguf,
)
