"""gpt-oss: every second layer attends to a window, every head has an attention sink, and all products have biases."""

from __future__ import annotations

from dataclasses import replace

from tinyvllm.config import LayerKind, ModelConfig
from tinyvllm.model.decoder import Decoder


class GptOss(Decoder):
    """gpt-oss model card (OpenAI, 2025), sec. 2: sinks (Xiao et al. 2023), windows, YaRN, a clamped SwiGLU."""

    @classmethod
    def layer_kinds(cls, config: ModelConfig) -> tuple[LayerKind, ...]:
        return tuple(replace(kind, has_sinks=True) for kind in super().layer_kinds(config))
