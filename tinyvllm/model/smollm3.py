"""SmolLM3: llama's layers, each fourth without positions (NoPE; Yang et al. 2025, "RoPE to NoRoPE and Back Again")."""

from __future__ import annotations

from tinyvllm.model.decoder import Decoder


class SmolLM3(Decoder):
    """The plain decoder: which layers have no rope is in the config."""
