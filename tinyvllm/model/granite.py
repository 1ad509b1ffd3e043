"""Granite 3 (IBM): llama's layers with multipliers of embeddings, scores, residual branches and logits."""

from __future__ import annotations

from tinyvllm.model.decoder import Decoder


class Granite(Decoder):
    """The plain decoder: the multipliers are in the config."""
