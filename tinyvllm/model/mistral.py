"""Mistral 7B and kin: llama's layers, each of which attends to a window (Jiang et al. 2023, sec. 2)."""

from __future__ import annotations

from tinyvllm.model.decoder import Decoder


class Mistral(Decoder):
    """The plain decoder: the window is in the config, if the model has one."""
