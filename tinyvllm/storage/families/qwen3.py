"""Qwen3 (dense)."""

from __future__ import annotations

from tinyvllm.storage.families.family import FamilyFiles
from tinyvllm.storage.families.qwen2 import MROPE, QWEN_DEFAULTS, VISUAL, VL_NAMES

FILES = FamilyFiles(
    hf_classes=("Qwen3ForCausalLM", "Qwen3VLForConditionalGeneration"),
    hf_types=("qwen3", "qwen3_vl"),
    gguf=("qwen3", "qwen3vl"),
    hf_defaults=QWEN_DEFAULTS | {"head_dim": 128},
    hf_windows="by layer",
    hf_biases={"attention_bias": ("qkv", "out")},
    rope_aliases=MROPE,
    hf_renamed=VL_NAMES,
    hf_unread=VISUAL,
)
