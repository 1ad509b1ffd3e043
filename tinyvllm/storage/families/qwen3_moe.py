"""Qwen3 with experts: 30B-A3B, 235B-A22B, Coder; and the text part of Qwen3-VL's."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from tinyvllm.config import ModelConfig
from tinyvllm.storage.families.experts import gguf_experts, hf_experts, sparse_layers
from tinyvllm.storage.families.family import FamilyFiles
from tinyvllm.storage.families.qwen2 import MROPE, QWEN_DEFAULTS, VISUAL, VL_NAMES
from tinyvllm.storage.values import Values


def refine_hf(config: ModelConfig, values: Values) -> ModelConfig:
    experts = replace(hf_experts(values, "moe_intermediate_size"), renormalizes=values.flag("norm_topk_prob"))
    return replace(config, experts=experts, with_experts=sparse_layers(config, values))


def refine_gguf(config: ModelConfig, values: Values, tensors: Collection[str]) -> ModelConfig:
    """llama.cpp renormalizes in all of these models."""
    sparse = tuple(f"blk.{layer}.ffn_gate_inp.weight" in tensors for layer in range(config.num_layers))
    return replace(config, experts=gguf_experts(values), with_experts=() if all(sparse) else sparse)


FILES = FamilyFiles(
    hf_classes=("Qwen3MoeForCausalLM", "Qwen3VLMoeForConditionalGeneration"),
    hf_types=("qwen3_moe", "qwen3_vl_moe"),
    gguf=("qwen3moe", "qwen3vlmoe"),
    hf_defaults=QWEN_DEFAULTS
    | {
        "num_key_value_heads": 4,
        "moe_intermediate_size": 768,
        "num_experts_per_tok": 8,
    },
    hf_windows="all",
    hf_biases={"attention_bias": ("qkv", "out")},
    rope_aliases=MROPE,
    hf_renamed=VL_NAMES,
    hf_unread=VISUAL,
    has_experts=True,
    hf_refine=refine_hf,
    gguf_refine=refine_gguf,
)
