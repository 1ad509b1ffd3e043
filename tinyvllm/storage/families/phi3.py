"""Phi-3, Phi-3.5, Phi-4 and Phi-4-mini."""

from __future__ import annotations

from tinyvllm.storage.families.family import FamilyFiles

FILES = FamilyFiles(
    hf_classes=("Phi3ForCausalLM",),
    hf_types=("phi3",),
    gguf=("phi3",),
    hf_defaults={
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
    },
    hf_windows="all",
    gguf_window_pattern=0,  # llama.cpp itself ignores Phi's window
    has_partial_rope=True,
    rope_aliases={"su": "longrope", "yarn": "longrope"},
    gguf_layer_names={"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"},
    fused={
        "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    },
)
