"""Qwen3, Qwen3.5, Qwen3-Next and LFM2: llama's layers, and an RMSNorm of every head of queries and keys before they are
rotated. Which layers have experts, or are recurrent, and whether attention's output is gated, is in the config."""

from __future__ import annotations

from dataclasses import replace

from tinyvllm.config import LayerKind, ModelConfig
from tinyvllm.model.decoder import Decoder


class Qwen3(Decoder):
    """Llama with normed heads (Qwen3 Technical Report, 2025, sec. 2: QK-Norm)."""

    @classmethod
    def layer_kinds(cls, config: ModelConfig) -> tuple[LayerKind, ...]:
        kinds = super().layer_kinds(config)
        return tuple(kind if kind.state else replace(kind, head_norm_eps=config.norm_eps) for kind in kinds)
