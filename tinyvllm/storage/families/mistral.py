"""Mistral 7B and kin, and the text part of Mistral Small 3."""

from __future__ import annotations

from tinyvllm.storage.families.family import FamilyFiles

# Mistral3ForConditionalGeneration's names of the language model's tensors, and its other parts
WRAPPER = "Mistral3ForConditionalGeneration"
RENAMED = {
    "model.language_model.": "model.",
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
}
UNREAD = tuple(f"{prefix}{part}." for prefix in ("model.", "") for part in ("vision_tower", "multi_modal_projector"))

FILES = FamilyFiles(
    hf_classes=("MistralForCausalLM",),
    hf_types=("mistral",),
    hf_wrappers=(WRAPPER,),
    gguf=(),  # its files are llama's, and Mistral Small 3's are ministral3's
    hf_defaults={"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
    hf_windows="all",
    hf_renamed=RENAMED,
    hf_unread=UNREAD,
)
