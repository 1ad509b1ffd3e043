"""Gemma 2: norms before and after attention and the feed-forward, softcaps, windows in every other layer."""

from __future__ import annotations

import math
from typing import ClassVar

from tinyvllm.config import ModelConfig
from tinyvllm.model.decoder import Decoder


class Gemma2(Decoder):
    """Gemma 2: Improving Open Language Models at a Practical Size, 2024, sec. 2. The config says which layers have a
    window, the softcaps, the scale of scores, GELU, and the 1 that is added to norms in Hugging Face's files."""

    ATTENTION_POST_NORM: ClassVar[str | None] = "post_attention_layernorm"
    FFN_NORM: ClassVar[str] = "pre_feedforward_layernorm"
    FFN_POST_NORM: ClassVar[str | None] = "post_feedforward_layernorm"

    @classmethod
    def embedding_scale(cls, config: ModelConfig) -> float:
        return math.sqrt(config.hidden_size)
