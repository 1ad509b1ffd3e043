"""Qwen3 (dense): llama's layers, and an RMSNorm of every head of queries and keys before they are rotated."""

from __future__ import annotations

from tinyvllm.model.llama import Llama
from tinyvllm.ops.backend import Norm


class Qwen3(Llama):
    """Llama with normed heads (Qwen3 Technical Report, 2025, sec. 2: QK-Norm)."""

    def _head_norm(self, prefix: str) -> Norm:
        return self._norm(f"{prefix}.q_norm.weight", f"{prefix}.k_norm.weight", size=self.config.head_dim)
