"""Qwen3.5 and 3.6 with experts (35B-A3B and larger), and the text part of the multimodal models."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from tinyvllm.config import ModelConfig
from tinyvllm.storage.families import qwen3_5, qwen3_next
from tinyvllm.storage.values import Values

USUAL_SIZE = 512  # of an expert


def refine_hf(config: ModelConfig, values: Values) -> ModelConfig:
    """transformers' Qwen3_5MoeTextConfig: every layer has experts, and their weights are renormalized."""
    config = qwen3_next.refine_hf(config, values)
    assert config.experts is not None
    experts = replace(config.experts, renormalizes=True)
    return _without_dense(replace(config, experts=experts, with_experts=()))


def refine_gguf(config: ModelConfig, values: Values, tensors: Collection[str]) -> ModelConfig:
    return _without_dense(qwen3_next.refine_gguf(config, values, tensors))


def _without_dense(config: ModelConfig) -> ModelConfig:
    """No layer has a dense feed-forward, whose size files leave out."""
    assert config.experts is not None
    return replace(config, ffn_size=config.experts.ffn_size)


FILES = replace(
    qwen3_5.FILES,
    hf_classes=("Qwen3_5MoeForCausalLM", "Qwen3_5MoeForConditionalGeneration"),
    hf_types=("qwen3_5_moe_text", "qwen3_5_moe"),
    gguf=("qwen35moe",),
    hf_defaults=dict(qwen3_5.FILES.hf_defaults)
    | qwen3_next.EXPERTS
    | {"num_key_value_heads": 2, "num_experts_per_tok": 8, "num_experts": 256, "intermediate_size": USUAL_SIZE},
    gguf_defaults={"feed_forward_length": USUAL_SIZE},
    has_experts=True,
    hf_refine=refine_hf,
    gguf_refine=refine_gguf,
)
