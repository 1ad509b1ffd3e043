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

# Of multimodal models: the text part's names, and those of the vision tower's tensors
VL_NAMES = {"model.language_model.": "model.", "language_model.model.": "model.", "language_model.lm_head.": "lm_head."}
VISUAL = ("model.visual.", "visual.", "vision_tower.")
# M-RoPE (Qwen2-VL, 2024, sec. 2.1) splits positions into time, height and width, which are equal for text
MROPE = {"mrope": "default"}

FILES = FamilyFiles(
    hf_classes=("Qwen2ForCausalLM", "Qwen2VLForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration"),
    hf_types=("qwen2", "qwen2_vl", "qwen2_5_vl"),
    gguf=("qwen2", "qwen2vl"),
    hf_defaults=QWEN_DEFAULTS,
    hf_windows="by layer",
    rope_aliases=MROPE,
    hf_renamed=VL_NAMES,
    hf_unread=VISUAL,
)
