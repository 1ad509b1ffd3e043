"""Gemma 3, text: Gemma 2's layers with norms of heads and without softcaps; windows with their own rope."""

from __future__ import annotations

from dataclasses import replace

from tinyvllm.config import LayerKind, ModelConfig
from tinyvllm.model.gemma2 import Gemma2


class Gemma3(Gemma2):
    """Gemma 3 Technical Report, 2025, sec. 2: of six layers, five attend to a window. The config says which, and their
    rope."""

    @classmethod
    def layer_kinds(cls, config: ModelConfig) -> tuple[LayerKind, ...]:
        return tuple(replace(kind, head_norm_eps=config.norm_eps) for kind in super().layer_kinds(config))
