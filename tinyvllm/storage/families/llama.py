"""Llama 2, 3, 3.x and kin. Mistral's GGUF files are llama's, with a window where they have one."""

from __future__ import annotations

from tinyvllm.storage.families.family import FamilyFiles

BIASES = {"attention_bias": ("qkv", "out"), "mlp_bias": ("ffn",)}

FILES = FamilyFiles(
    hf_classes=("LlamaForCausalLM",),
    hf_types=("llama",),
    gguf=("llama",),
    hf_biases=BIASES,
    gguf_window_pattern=0,
    gguf_interleaves_pairs=True,
)
