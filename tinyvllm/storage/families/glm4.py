"""GLM-4-0414 (Glm4ForCausalLM): norms before and after, an interleaved rope in half of each head."""

from __future__ import annotations

from tinyvllm.storage.families.family import FamilyFiles

FILES = FamilyFiles(
    hf_classes=("Glm4ForCausalLM",),
    hf_types=("glm4",),
    gguf=("glm4",),
    hf_defaults={
        "num_key_value_heads": 2,
        "head_dim": 128,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1.5625e-7,
        "partial_rotary_factor": 0.5,
        "attention_bias": True,
    },
    hf_biases={"attention_bias": ("qkv",)},
    has_partial_rope=True,
    interleaves_rope=True,
    gguf_layer_names={
        "post_attention_norm": "post_self_attn_layernorm",
        "ffn_up": "mlp.gate_up_proj",
        "post_ffw_norm": "post_mlp_layernorm",
        "attn_qkv": "self_attn.qkv_proj",
    },
    fused={
        "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    },
)
