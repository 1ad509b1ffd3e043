"""OLMo 2 and OLMo 3: norms of queries and keys, and norms after attention and the feed-forward instead of before."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from tinyvllm.config import LayerKind, ModelConfig
from tinyvllm.model.decoder import Decoder


class Olmo2(Decoder):
    """2 OLMo 2 Furious, 2025, sec. 3.2: reordered norm, QK-norm over all heads. OLMo 3's windows, and YaRN in the
    layers without one, are in the config."""

    ATTENTION_NORM: ClassVar[str | None] = None
    ATTENTION_POST_NORM: ClassVar[str | None] = "post_attention_layernorm"
    FFN_NORM: ClassVar[str | None] = None
    FFN_POST_NORM: ClassVar[str | None] = "post_feedforward_layernorm"

    @classmethod
    def layer_kinds(cls, config: ModelConfig) -> tuple[LayerKind, ...]:
        kinds = super().layer_kinds(config)
        return tuple(replace(kind, head_norm_eps=config.norm_eps, head_norm_is_whole=True) for kind in kinds)
