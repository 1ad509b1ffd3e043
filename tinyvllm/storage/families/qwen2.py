"""Qwen2 and Qwen2.5 (dense)."""

from __future__ import annotations

from tinyvllm.storage.families.family import FamilyFiles

QWEN_DEFAULTS = {
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}

FILES = FamilyFiles(
    hf_classes=("Qwen2ForCausalLM",),
    hf_types=("qwen2",),
    gguf=("qwen2",),
    hf_defaults=QWEN_DEFAULTS,
    hf_windows="by layer",
)
