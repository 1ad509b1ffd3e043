"""Ministral 8B (2410) and kin: Mistral's layers, of which some attend to the window."""

from __future__ import annotations

from dataclasses import replace

from tinyvllm.storage.families import mistral

FILES = replace(
    mistral.FILES,
    hf_classes=("MinistralForCausalLM",),
    hf_types=("ministral",),
    hf_wrappers=(),
    hf_defaults=dict(mistral.FILES.hf_defaults) | {"max_window_layers": 0},  # all, if there are no layer_types
    hf_windows="by layer",
)
