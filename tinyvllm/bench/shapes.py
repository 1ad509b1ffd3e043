"""Shapes of well-known models, from their config.json: all that is needed to measure them with random weights."""

from __future__ import annotations

from tinyvllm.config import ModelConfig, RopeScaling
from tinyvllm.errors import UnsupportedModelError

SHAPES: dict[str, ModelConfig] = {
    shape.name: shape
    for shape in (
        ModelConfig(
            name="smollm2-135m",  # HuggingFaceTB/SmolLM2-135M
            architecture="llama",
            num_layers=30,
            hidden_size=576,
            ffn_size=1536,
            num_heads=9,
            num_kv_heads=3,
            head_dim=64,
            vocab_size=49152,
            max_position=8192,
            rope_theta=100000.0,
            norm_eps=1e-5,
            tie_embeddings=True,
        ),
        ModelConfig(
            name="tinyllama-1.1b",  # TinyLlama/TinyLlama-1.1B-Chat-v1.0
            architecture="llama",
            num_layers=22,
            hidden_size=2048,
            ffn_size=5632,
            num_heads=32,
            num_kv_heads=4,
            head_dim=64,
            vocab_size=32000,
            max_position=2048,
            rope_theta=10000.0,
            norm_eps=1e-5,
            tie_embeddings=False,
        ),
        ModelConfig(
            name="llama-3.2-1b",  # meta-llama/Llama-3.2-1B
            architecture="llama",
            num_layers=16,
            hidden_size=2048,
            ffn_size=8192,
            num_heads=32,
            num_kv_heads=8,
            head_dim=64,
            vocab_size=128256,
            max_position=131072,
            rope_theta=500000.0,
            norm_eps=1e-5,
            tie_embeddings=True,
            rope_scaling=RopeScaling("llama3", 32.0, 1.0, 4.0, 8192),
        ),
        ModelConfig(
            name="llama-3.1-8b",  # meta-llama/Llama-3.1-8B
            architecture="llama",
            num_layers=32,
            hidden_size=4096,
            ffn_size=14336,
            num_heads=32,
            num_kv_heads=8,
            head_dim=128,
            vocab_size=128256,
            max_position=131072,
            rope_theta=500000.0,
            norm_eps=1e-5,
            tie_embeddings=False,
            rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 8192),
        ),
        ModelConfig(
            name="qwen3-0.6b",  # Qwen/Qwen3-0.6B
            architecture="qwen3",
            num_layers=28,
            hidden_size=1024,
            ffn_size=3072,
            num_heads=16,
            num_kv_heads=8,
            head_dim=128,
            vocab_size=151936,
            max_position=40960,
            rope_theta=1000000.0,
            norm_eps=1e-6,
            tie_embeddings=True,
        ),
    )
}


def find_shape(name: str) -> ModelConfig:
    """The shape of that name, upper or lower case. Raises UnsupportedModelError."""
    shape = SHAPES.get(name.lower())
    if shape is None:
        raise UnsupportedModelError(f"shape {name!r} is not known; known: {', '.join(SHAPES)}")
    return shape
