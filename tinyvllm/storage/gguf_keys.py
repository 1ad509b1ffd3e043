"""A model's configuration under GGUF's keys, for files that are written and models that are described."""

from __future__ import annotations

from typing import Any

from tinyvllm.config import ModelConfig


def size_keys(config: ModelConfig) -> dict[str, Any]:
    """The keys that every model has, without the architecture before them."""
    return {
        "context_length": config.max_position,
        "embedding_length": config.hidden_size,
        "block_count": config.num_layers,
        "feed_forward_length": config.ffn_size,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.norm_eps,
        "rope.freq_base": config.rope.theta,
        "vocab_size": config.vocab_size,
    }
