"""Gemma 3, text, and the text part of the multimodal models."""

from __future__ import annotations

from tinyvllm.storage.families.family import FamilyFiles

FILES = FamilyFiles(
    hf_classes=("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"),
    hf_types=("gemma3_text", "gemma3"),
    gguf=("gemma3",),
    activation="gelu_tanh",
    # config.json of 4B and above leaves most of them out
    hf_defaults={
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "vocab_size": 262208,
        "max_position_embeddings": 131072,
        "rope_theta": 1e6,
        "tie_word_embeddings": True,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
    },
    hf_windows="by layer",
    gguf_window_pattern=6,
    softcaps=("final_logit_softcapping",),  # its class reads attn_logit_softcapping and makes no use of it
    has_local_rope=True,
    local_rope_theta=10000.0,
    norm_offset=1.0,
    overflows_float16=True,  # 103,795 in 270M; more in larger ones
    gguf_wide_scale_layers=(62,),  # 27B
    hf_renamed={
        "model.language_model.": "model.",
        "language_model.model.": "model.",
        "language_model.lm_head.": "lm_head.",
    },
    hf_unread=("model.vision_tower.", "vision_tower.", "model.multi_modal_projector.", "multi_modal_projector."),
    gguf_layer_names={
        "post_attention_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    },
)
