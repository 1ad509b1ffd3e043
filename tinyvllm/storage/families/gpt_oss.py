"""gpt-oss: 20b and 120b."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from tinyvllm.config import ExpertsKind, ModelConfig
from tinyvllm.storage.families.experts import gguf_experts, hf_experts
from tinyvllm.storage.families.family import FamilyFiles
from tinyvllm.storage.values import Values

SWIGLU = {"swiglu_limit": 7.0, "swiglu_alpha": 1.702}  # the numbers of the activation (ops/activation.py)


def _with_experts(config: ModelConfig, experts: ExpertsKind) -> ModelConfig:
    kind = replace(experts, activation="clamped_swiglu", has_router_bias=True, has_biases=True)
    return replace(config, experts=kind)


def refine_hf(config: ModelConfig, values: Values) -> ModelConfig:
    for key, number in SWIGLU.items():
        if values.optional_number(key) not in (None, number):
            values.unsupported(key, str(number))
    return _with_experts(config, hf_experts(values, "intermediate_size"))


def refine_gguf(config: ModelConfig, values: Values, tensors: Collection[str]) -> ModelConfig:
    """GGUF has no key for YaRN's limits that are not whole dimensions, with which the models were trained."""
    values.integer("attention.sliding_window")  # there is no usual one
    rope = config.rope
    if rope.scaling is not None:
        rope = replace(rope, scaling=replace(rope.scaling, truncate=False))
    return _with_experts(replace(config, rope=rope), gguf_experts(values))


FILES = FamilyFiles(
    hf_classes=("GptOssForCausalLM",),
    hf_types=("gpt_oss",),
    gguf=("gpt-oss",),
    hf_defaults={
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "sliding_window": 128,
        "sliding_window_pattern": 2,
        "attention_bias": True,
        "rope_theta": 150000.0,
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
        "num_local_experts": 128,
        "num_experts_per_tok": 4,
    },
    hf_windows="by layer",
    gguf_window_pattern=2,
    hf_biases={"attention_bias": ("qkv", "out")},
    gguf_layer_names={"post_attention_norm": "post_attention_layernorm"},
    has_experts=True,
    alternates_experts=True,
    hf_refine=refine_hf,
    gguf_refine=refine_gguf,
)
