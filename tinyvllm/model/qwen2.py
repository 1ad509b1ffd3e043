"""Qwen2 and Qwen2.5 (dense): llama's layers, and a bias on queries, keys and values."""

from __future__ import annotations

from dataclasses import replace

from tinyvllm.config import LayerKind, ModelConfig
from tinyvllm.model.decoder import Decoder


class Qwen2(Decoder):
    """Llama with a QKV bias (Qwen2 Technical Report, 2024, sec. 2.2.1), which config.json does not mention."""

    @classmethod
    def layer_kinds(cls, config: ModelConfig) -> tuple[LayerKind, ...]:
        return tuple(replace(kind, has_bias=True) for kind in super().layer_kinds(config))
