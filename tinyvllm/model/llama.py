"""Llama 2, 3, 3.x and kin (SmolLM2): RMSNorm, grouped-query attention with RoPE, SwiGLU (Touvron et al. 2023)."""

from __future__ import annotations

from tinyvllm.model.decoder import Decoder


class Llama(Decoder):
    """The plain decoder."""
