"""Qwen3-Next and Qwen3.5: Gated DeltaNet layers, and every few layers one of Qwen3's attention with an output gate.

Which layers are recurrent, and that attention's output is gated, is in the config: see model/delta_net.py and
model/attention.py.
"""

from __future__ import annotations

from tinyvllm.model.qwen3 import Qwen3


class Qwen3Next(Qwen3):
    """Qwen3 with recurrent layers in its config."""
