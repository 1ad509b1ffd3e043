"""Qwen3.5, 3.6 and 3.8 (dense), and the text part of the multimodal models."""

from __future__ import annotations

from tinyvllm.storage.families import delta_net
from tinyvllm.storage.families.family import FamilyFiles

FILES = FamilyFiles(
    hf_classes=("Qwen3_5ForCausalLM", "Qwen3_5ForConditionalGeneration"),
    hf_types=("qwen3_5_text", "qwen3_5"),
    gguf=("qwen35",),
    hf_defaults=delta_net.HF_DEFAULTS,
    hf_recurrent=delta_net.RECURRENT,
    has_partial_rope=True,
    rope_aliases=delta_net.ROPE_ALIASES,
    norm_offset=1.0,
    hf_renamed=delta_net.RENAMED,
    hf_unread=delta_net.UNREAD,
    gguf_layer_names=delta_net.GGUF_NAMES,
    gguf_tiles_value_heads=True,
    hf_refine=delta_net.refine_hf,
    gguf_refine=delta_net.refine_gguf,
)
