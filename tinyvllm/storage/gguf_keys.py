"""GGUF's keys: a model's configuration under these keys, for writing files and describing models, and token ids."""

from __future__ import annotations

from typing import Any

from tinyvllm.config import ModelConfig
from tinyvllm.storage.values import Values

MAX_STORED = 2**64 - 1  # the largest number that a file can hold


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


def token_id_below(values: Values, key: str, num_tokens: int) -> int | None:
    """The id of a token, or None. An id that the vocabulary does not have counts as absent, as in llama.cpp, because
    real files have such ids for tokens that a model lacks. Raises ModelError for a value that is not an id."""
    token_id = values.optional_integer(key, at_least=0, at_most=MAX_STORED)
    return token_id if token_id is not None and token_id < num_tokens else None
