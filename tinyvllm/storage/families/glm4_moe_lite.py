"""GLM-4.7-Flash (Glm4MoeLiteForCausalLM): DeepSeek V3's layers. llama.cpp calls both, and DeepSeek V2, "deepseek2"."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from tinyvllm.config import ModelConfig
from tinyvllm.storage.families.deepseek import sigmoid_experts
from tinyvllm.storage.families.experts import gguf_experts, with_groups
from tinyvllm.storage.families.family import FamilyFiles
from tinyvllm.storage.families.latents import dense_first, with_gguf_latents, with_hf_latents
from tinyvllm.storage.values import Values

KINDS = ("dense", "sparse")  # of mlp_layer_types
GATINGS = {1: "softmax", 2: "sigmoid"}  # {arch}.expert_gating_func


def refine_hf(config: ModelConfig, values: Values) -> ModelConfig:
    kinds, with_experts = values.get("mlp_layer_types"), dense_first(config, _first_dense(values))
    if kinds is not None:
        if not isinstance(kinds, list) or len(kinds) != config.num_layers or any(kind not in KINDS for kind in kinds):
            values.refuse("mlp_layer_types", f"a list of num_hidden_layers ({config.num_layers}) of dense and sparse")
        with_experts = tuple(kind == "sparse" for kind in kinds)
    return with_hf_latents(replace(config, experts=sigmoid_experts(values), with_experts=with_experts), values)


def _first_dense(values: Values) -> int:
    return values.optional_integer("first_k_dense_replace", at_least=0) or 0


def refine_gguf(config: ModelConfig, values: Values, tensors: Collection[str]) -> ModelConfig:
    has_choice_bias = any(".exp_probs_b." in name for name in tensors)
    gating = values.optional_integer("expert_gating_func", at_least=0) or (2 if has_choice_bias else 1)
    if gating not in GATINGS:
        values.unsupported("expert_gating_func", "1 (softmax), 2 (sigmoid)")
    experts = gguf_experts(values)
    has_groups = (values.optional_integer("expert_group_count", at_least=0) or 1) > 1
    if has_groups and gating != 2:  # V2's groups are chosen by their best score, not by the sum of two
        values.unsupported("expert_group_count", "1, with the gating softmax")
    if has_groups:
        experts = with_groups(experts, values, ("expert_group_count", "expert_group_used_count"))
    experts = replace(
        experts,
        score=GATINGS[gating],
        renormalizes=values.flag("expert_weights_norm"),
        scale=values.optional_number("expert_weights_scale") or 1.0,
        has_choice_bias=has_choice_bias,
        shared_size=(values.optional_integer("expert_shared_count", at_least=0) or 0) * experts.ffn_size,
    )
    first = values.optional_integer("leading_dense_block_count", at_least=0) or 0
    return with_gguf_latents(replace(config, experts=experts, with_experts=dense_first(config, first)), values)


FILES = FamilyFiles(
    hf_classes=("Glm4MoeLiteForCausalLM",),
    hf_types=("glm4_moe_lite",),
    gguf=("deepseek2",),
    hf_defaults={
        "kv_lora_rank": 512,
        "q_lora_rank": 768,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 192,
        "v_head_dim": 256,
        "n_routed_experts": 64,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 1536,
        "n_shared_experts": 1,
        "routed_scaling_factor": 1.8,
        "first_k_dense_replace": 1,
        "max_position_embeddings": 202752,
        "rms_norm_eps": 1e-5,
    },
    has_latents=True,
    has_experts=True,
    interleaves_rope=True,
    gguf_layer_names={
        "attn_q_a": "self_attn.q_a_proj",
        "attn_q_a_norm": "self_attn.q_a_layernorm",
        "attn_q_b": "self_attn.q_b_proj",
        "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
        "attn_kv_a_norm": "self_attn.kv_a_layernorm",
        "attn_kv_b": "self_attn.kv_b_proj",
        "attn_k_b": "self_attn.k_b_proj",
        "attn_v_b": "self_attn.v_b_proj",
    },
    hf_refine=refine_hf,
    gguf_refine=refine_gguf,
)
