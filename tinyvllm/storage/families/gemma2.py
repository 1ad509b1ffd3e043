"""Gemma 2."""

from __future__ import annotations

from tinyvllm.storage.families.family import SOFTCAPS, FamilyFiles

WINDOW, SCORE_SOFTCAP, LOGIT_SOFTCAP = 4096, 50.0, 30.0

FILES = FamilyFiles(
    hf_classes=("Gemma2ForCausalLM",),
    hf_types=("gemma2",),
    gguf=("gemma2",),
    activation="gelu_tanh",
    hf_defaults={
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "vocab_size": 256000,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "query_pre_attn_scalar": 256,
        "sliding_window": WINDOW,
        "sliding_window_pattern": 2,
        "attn_logit_softcapping": SCORE_SOFTCAP,
        "final_logit_softcapping": LOGIT_SOFTCAP,
    },
    hf_windows="by layer",
    gguf_window_pattern=2,
    gguf_defaults={
        "attention.sliding_window": WINDOW,
        "attn_logit_softcapping": SCORE_SOFTCAP,
        "final_logit_softcapping": LOGIT_SOFTCAP,
    },
    softcaps=SOFTCAPS,
    norm_offset=1.0,
    overflows_float16=True,
    gguf_wide_scale_layers=(46,),  # 27B
    gguf_layer_names={
        "post_attention_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    },
)
