"""Gemma 3, text: norms before and after attention and the feed-forward, norms of heads, windows with their own rope."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import ClassVar

from tinyvllm.config import LayerKind, ModelConfig
from tinyvllm.model.decoder import Decoder


class Gemma3(Decoder):
    """Gemma 3 Technical Report, 2025, sec. 2: of six layers, five attend to a window. The config says which, their
    rope, the scale of scores, GELU, and the 1 that is added to norms' weights in Hugging Face's files."""

    ATTENTION_POST_NORM: ClassVar[str | None] = "post_attention_layernorm"
    FFN_NORM: ClassVar[str] = "pre_feedforward_layernorm"
    FFN_POST_NORM: ClassVar[str | None] = "post_feedforward_layernorm"

    @classmethod
    def layer_kinds(cls, config: ModelConfig) -> tuple[LayerKind, ...]:
        return tuple(replace(kind, head_norm_eps=config.norm_eps) for kind in super().layer_kinds(config))

    @classmethod
    def embedding_scale(cls, config: ModelConfig) -> float:
        return math.sqrt(config.hidden_size)
