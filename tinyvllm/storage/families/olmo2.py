"""OLMo 2. Its GGUF files are read as OLMo 3's, which have the same name and may have windows."""

from __future__ import annotations

from tinyvllm.storage.families.family import FamilyFiles

FILES = FamilyFiles(
    hf_classes=("Olmo2ForCausalLM",),
    hf_types=("olmo2",),
    gguf=(),
    hf_defaults={"max_position_embeddings": 2048, "rms_norm_eps": 1e-5},
    hf_biases={"attention_bias": ("qkv", "out")},
)
