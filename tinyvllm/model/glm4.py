"""GLM-4 (dense): llama's layers with biases on queries, keys and values, and an interleaved rope in a part of each head
(GLM Team 2024, sec. 2)."""

from __future__ import annotations

from typing import ClassVar

from tinyvllm.model.decoder import Decoder


class Glm(Decoder):
    """The plain decoder: the rope and the biases are in the config."""


class Glm4(Glm):
    """GLM-4-0414: norms after attention and the feed-forward too."""

    ATTENTION_POST_NORM: ClassVar[str | None] = "post_self_attn_layernorm"
    FFN_POST_NORM: ClassVar[str | None] = "post_mlp_layernorm"
