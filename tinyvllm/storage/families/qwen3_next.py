"""Qwen3-Next."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from tinyvllm.config import ModelConfig
from tinyvllm.storage.families import delta_net
from tinyvllm.storage.families.experts import gguf_experts, hf_experts, sparse_layers
from tinyvllm.storage.families.family import FamilyFiles
from tinyvllm.storage.values import Values


def refine_hf(config: ModelConfig, values: Values) -> ModelConfig:
    """transformers' Qwen3NextConfig."""
    experts = replace(
        hf_experts(values, "moe_intermediate_size"),
        renormalizes=values.flag("norm_topk_prob", default=True),
        shared_size=values.integer("shared_expert_intermediate_size"),
        has_shared_gate=True,
    )
    config = delta_net.refine_hf(config, values)
    return replace(config, experts=experts, with_experts=sparse_layers(config, values))


def refine_gguf(config: ModelConfig, values: Values, tensors: Collection[str]) -> ModelConfig:
    """llama.cpp renormalizes, and has experts in every layer."""
    experts = replace(
        gguf_experts(values), shared_size=values.integer("expert_shared_feed_forward_length"), has_shared_gate=True
    )
    return replace(delta_net.refine_gguf(config, values, tensors), experts=experts)


EXPERTS = {"moe_intermediate_size": 512, "shared_expert_intermediate_size": 512}
FILES = FamilyFiles(
    hf_classes=("Qwen3NextForCausalLM",),
    hf_types=("qwen3_next",),
    gguf=("qwen3next",),
    hf_defaults=delta_net.HF_DEFAULTS | EXPERTS | {"num_key_value_heads": 2, "num_experts_per_tok": 10},
    hf_recurrent=delta_net.RECURRENT,
    has_experts=True,
    has_partial_rope=True,
    norm_offset=1.0,
    hf_unread=delta_net.UNREAD,
    gguf_layer_names=delta_net.GGUF_NAMES,
    hf_refine=refine_hf,
    gguf_refine=refine_gguf,
)
