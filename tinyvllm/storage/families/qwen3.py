"""Qwen3 (dense)."""

from __future__ import annotations

from tinyvllm.storage.families.family import FamilyFiles
from tinyvllm.storage.families.qwen2 import QWEN_DEFAULTS

FILES = FamilyFiles(
    hf_classes=("Qwen3ForCausalLM",),
    hf_types=("qwen3",),
    gguf=("qwen3",),
    hf_defaults=QWEN_DEFAULTS | {"head_dim": 128},
    hf_windows="by layer",
)
