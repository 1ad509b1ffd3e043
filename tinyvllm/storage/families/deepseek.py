"""DeepSeek V2 (Lite) and V3: latent attention, and experts in all but the first layers."""

from __future__ import annotations

from dataclasses import replace

from tinyvllm.config import ExpertsKind, ModelConfig
from tinyvllm.storage.families.experts import hf_experts, with_groups
from tinyvllm.storage.families.family import FamilyFiles
from tinyvllm.storage.families.latents import dense_first, with_hf_latents
from tinyvllm.storage.values import Values


def sigmoid_experts(values: Values) -> ExpertsKind:
    """Experts chosen by the sigmoid of their logits and a bias that serves the choice alone (DeepSeek-V3, 2024,
    sec. 2.1.2)."""
    experts = hf_experts(values, "moe_intermediate_size")
    if values.get("topk_method") not in (None, "noaux_tc"):
        values.unsupported("topk_method", "noaux_tc")
    if values.get("scoring_func") not in (None, "sigmoid"):
        values.unsupported("scoring_func", "sigmoid")
    return replace(
        with_groups(experts, values, ("n_group", "topk_group")),
        score="sigmoid",
        renormalizes=values.flag("norm_topk_prob", default=True),
        scale=values.positive("routed_scaling_factor"),
        has_choice_bias=True,
        shared_size=shared_size(values, experts),
    )


def shared_size(values: Values, experts: ExpertsKind) -> int:
    """Shared experts are one of their sizes together."""
    return (values.optional_integer("n_shared_experts", at_least=0) or 0) * experts.ffn_size


def refine_v3(config: ModelConfig, values: Values) -> ModelConfig:
    first = values.optional_integer("first_k_dense_replace", at_least=0) or 0
    config = replace(config, experts=sigmoid_experts(values), with_experts=dense_first(config, first))
    return with_hf_latents(config, values)


def refine_v2(config: ModelConfig, values: Values) -> ModelConfig:
    """V2-Lite's choice among all experts. That of V2, among those of a few groups by their best scores, is refused."""
    if values.get("topk_method") not in (None, "greedy"):
        values.unsupported("topk_method", "greedy")
    experts = hf_experts(values, "moe_intermediate_size")
    experts = replace(
        experts,
        renormalizes=False,  # transformers ignores norm_topk_prob
        scale=values.positive("routed_scaling_factor", 1.0),
        shared_size=shared_size(values, experts),
    )
    first = values.optional_integer("first_k_dense_replace", at_least=0) or 0
    return with_hf_latents(replace(config, experts=experts, with_experts=dense_first(config, first)), values)


V3_FILES = FamilyFiles(
    hf_classes=("DeepseekV3ForCausalLM",),
    hf_types=("deepseek_v3",),
    gguf=(),  # glm4_moe_lite.py reads all files of llama.cpp's "deepseek2"
    hf_defaults={
        "kv_lora_rank": 512,
        "q_lora_rank": 1536,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128,
        "v_head_dim": 128,
        "n_routed_experts": 256,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 2048,
        "n_shared_experts": 1,
        "n_group": 8,
        "topk_group": 4,
        "routed_scaling_factor": 2.5,
        "first_k_dense_replace": 3,
        "max_position_embeddings": 4096,
    },
    has_latents=True,
    has_experts=True,
    hf_refine=refine_v3,
)
V2_FILES = replace(
    V3_FILES,
    hf_classes=("DeepseekV2ForCausalLM",),
    hf_types=("deepseek_v2",),
    hf_defaults={
        "kv_lora_rank": 512,
        "q_lora_rank": 1536,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128,
        "v_head_dim": 128,
        "n_routed_experts": 64,
        "moe_intermediate_size": 1407,
        "n_shared_experts": 2,
        "max_position_embeddings": 2048,
    },
    hf_refine=refine_v2,
)
