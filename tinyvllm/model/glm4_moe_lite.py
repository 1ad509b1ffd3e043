"""GLM-4.7-Flash, and DeepSeek V2 and V3: latent attention, and experts in all but the first layers."""

from __future__ import annotations

from tinyvllm.model.decoder import Decoder


class Glm4MoeLite(Decoder):
    """The plain decoder: latents and experts are in the config (DeepSeek-V3, 2024, sec. 2.1)."""
