"""OLMo 3: OLMo 2's layers, three of four with a window, and YaRN in the others."""

from __future__ import annotations

from tinyvllm.storage.families.family import FamilyFiles

FILES = FamilyFiles(
    hf_classes=("Olmo3ForCausalLM",),
    hf_types=("olmo3",),
    gguf=("olmo2",),
    hf_defaults={
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        # transformers 5 gives config.json's rope_theta to layers without a window only, llama.cpp a file's to all
        "rope_local_base_freq": 500000.0,
        "sliding_window": 4096,
        "sliding_window_pattern": 4,
    },
    hf_windows="by layer",
    hf_biases={"attention_bias": ("qkv", "out")},
    gguf_window_pattern=4,
    has_local_rope=True,
    gguf_layer_names={
        "post_attention_norm": "post_attention_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    },
)
