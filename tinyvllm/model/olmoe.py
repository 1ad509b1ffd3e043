"""OLMoE: llama's layers with experts, and norms over all heads of queries and of keys."""

from __future__ import annotations

from dataclasses import replace

from tinyvllm.config import LayerKind, ModelConfig
from tinyvllm.model.decoder import Decoder


class Olmoe(Decoder):
    """OLMoE, 2024 (Muennighoff et al.), sec. 4.2: QK-norm."""

    @classmethod
    def layer_kinds(cls, config: ModelConfig) -> tuple[LayerKind, ...]:
        kinds = super().layer_kinds(config)
        return tuple(replace(kind, head_norm_eps=config.norm_eps, head_norm_is_whole=True) for kind in kinds)
