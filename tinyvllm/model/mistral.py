"""Mistral 7B, Mistral Small, Ministral: llama's layers, which may attend to a window (Jiang et al. 2023, sec. 2)."""

from __future__ import annotations

from tinyvllm.model.decoder import Decoder


class Mistral(Decoder):
    """The plain decoder: the window is in the config, if the model has one."""


class Ministral3(Mistral):
    """Mistral's layers. YaRN, and the factor by which queries grow with their position, are in the config."""
