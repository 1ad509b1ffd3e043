"""Phi-3, Phi-3.5, Phi-4, Phi-4-mini: llama's layers (Abdin et al. 2024, sec. 2)."""

from __future__ import annotations

from tinyvllm.model.decoder import Decoder


class Phi3(Decoder):
    """The plain decoder: its stored tensors are split when they are read, and the rope (longrope, in a part of each
    head) and the window are in the config."""
