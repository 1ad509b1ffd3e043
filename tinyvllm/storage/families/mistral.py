"""Mistral 7B and kin."""

from __future__ import annotations

from tinyvllm.storage.families.family import FamilyFiles

FILES = FamilyFiles(
    hf_classes=("MistralForCausalLM",),
    hf_types=("mistral",),
    gguf=(),  # its files are llama's
    hf_defaults={"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
    hf_windows="all",
)
