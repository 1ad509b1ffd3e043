"""Llama 2, 3, 3.x and kin. Mistral's GGUF files are llama's, with a window where they have one."""

from __future__ import annotations

from tinyvllm.storage.families.family import FamilyFiles

FILES = FamilyFiles(
    hf_classes=("LlamaForCausalLM",),
    hf_types=("llama",),
    gguf=("llama",),
    gguf_window_pattern=0,
    gguf_interleaves_pairs=True,
)
