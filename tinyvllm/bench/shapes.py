"""Shapes of well-known models, from their config.json: all that is needed to measure them with random weights."""

from __future__ import annotations

from tinyvllm.config import LayerSizes, ModelConfig, Rope, RopeScaling
from tinyvllm.errors import UnsupportedModelError

GEMMA3_WINDOWED = (True, True, True, True, True, False)  # by layer: each sixth attends to everything

# each fifth attends to everything, with wider heads; the last 20 read the keys of layers 13 and 14
GEMMA4_E2B_SIZES = tuple(
    LayerSizes(
        num_kv_heads=1,
        head_dim=512 if layer % 5 == 4 else 256,
        ffn_size=6144 if layer < 15 else 12288,
        kv_layer=None if layer < 15 else 14 if layer % 5 == 4 else 13,
    )
    for layer in range(35)
)

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
            rope=Rope(100000.0),
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
            rope=Rope(10000.0),
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
            rope=Rope(500000.0, RopeScaling("llama3", 32.0, 1.0, 4.0, 8192)),
            norm_eps=1e-5,
            tie_embeddings=True,
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
            rope=Rope(500000.0, RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)),
            norm_eps=1e-5,
            tie_embeddings=False,
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
            rope=Rope(1000000.0),
            norm_eps=1e-6,
            tie_embeddings=True,
        ),
        ModelConfig(
            name="qwen2.5-0.5b",  # Qwen/Qwen2.5-0.5B
            architecture="qwen2",
            num_layers=24,
            hidden_size=896,
            ffn_size=4864,
            num_heads=14,
            num_kv_heads=2,
            head_dim=64,
            vocab_size=151936,
            max_position=32768,
            rope=Rope(1000000.0),
            norm_eps=1e-6,
            tie_embeddings=True,
        ),
        ModelConfig(
            name="gemma-3-270m",  # google/gemma-3-270m
            architecture="gemma3",
            num_layers=18,
            hidden_size=640,
            ffn_size=2048,
            num_heads=4,
            num_kv_heads=1,
            head_dim=256,
            vocab_size=262144,
            max_position=32768,
            rope=Rope(1000000.0),
            norm_eps=1e-6,
            tie_embeddings=True,
            activation="gelu_tanh",
            window=512,
            windowed=GEMMA3_WINDOWED,
            local_rope=Rope(10000.0),
            overflows_float16=True,
        ),
        ModelConfig(
            name="gemma-3-1b",  # google/gemma-3-1b-pt
            architecture="gemma3",
            num_layers=26,
            hidden_size=1152,
            ffn_size=6912,
            num_heads=4,
            num_kv_heads=1,
            head_dim=256,
            vocab_size=262144,
            max_position=32768,
            rope=Rope(1000000.0),
            norm_eps=1e-6,
            tie_embeddings=True,
            activation="gelu_tanh",
            window=512,
            windowed=GEMMA3_WINDOWED,
            local_rope=Rope(10000.0),
            overflows_float16=True,
        ),
        ModelConfig(
            name="gemma-4-e2b",  # google/gemma-4-E2B, the text part
            architecture="gemma4",
            num_layers=35,
            hidden_size=1536,
            ffn_size=6144,
            num_heads=8,
            num_kv_heads=1,
            head_dim=256,
            vocab_size=262144,
            max_position=131072,
            rope=Rope(1000000.0, RopeScaling("proportional", proportion=0.25)),
            norm_eps=1e-6,
            tie_embeddings=True,
            activation="gelu_tanh",
            window=512,
            windowed=(True, True, True, True, False),
            local_rope=Rope(10000.0),
            score_scale=1.0,
            logit_softcap=30.0,
            overflows_float16=True,
            layer_sizes=GEMMA4_E2B_SIZES,
            per_layer_size=256,
        ),
        ModelConfig(
            name="mistral-7b-v0.1",  # mistralai/Mistral-7B-v0.1
            architecture="mistral",
            num_layers=32,
            hidden_size=4096,
            ffn_size=14336,
            num_heads=32,
            num_kv_heads=8,
            head_dim=128,
            vocab_size=32000,
            max_position=32768,
            rope=Rope(10000.0),
            norm_eps=1e-5,
            tie_embeddings=False,
            window=4096,
        ),
        ModelConfig(
            name="qwen2.5-7b",  # Qwen/Qwen2.5-7B
            architecture="qwen2",
            num_layers=28,
            hidden_size=3584,
            ffn_size=18944,
            num_heads=28,
            num_kv_heads=4,
            head_dim=128,
            vocab_size=152064,
            max_position=131072,
            rope=Rope(1000000.0),
            norm_eps=1e-6,
            tie_embeddings=False,
        ),
        ModelConfig(
            name="gemma-3-4b",  # google/gemma-3-4b-pt, the text part
            architecture="gemma3",
            num_layers=34,
            hidden_size=2560,
            ffn_size=10240,
            num_heads=8,
            num_kv_heads=4,
            head_dim=256,
            vocab_size=262208,
            max_position=131072,
            rope=Rope(1000000.0, RopeScaling("linear", 8.0)),
            norm_eps=1e-6,
            tie_embeddings=True,
            activation="gelu_tanh",
            window=1024,
            windowed=GEMMA3_WINDOWED,
            local_rope=Rope(10000.0),
            overflows_float16=True,
        ),
        ModelConfig(
            name="phi-4-mini",  # microsoft/Phi-4-mini-instruct, without the factors of its longrope
            architecture="phi3",
            num_layers=32,
            hidden_size=3072,
            ffn_size=8192,
            num_heads=24,
            num_kv_heads=8,
            head_dim=128,
            vocab_size=200064,
            max_position=131072,
            rope=Rope(10000.0, num_dims=96),
            norm_eps=1e-5,
            tie_embeddings=True,
            window=262144,
        ),
    )
}


def find_shape(name: str) -> ModelConfig:
    """The shape of that name, upper or lower case. Raises UnsupportedModelError."""
    shape = SHAPES.get(name.lower())
    if shape is None:
        raise UnsupportedModelError(f"shape {name!r} is not known; known: {', '.join(SHAPES)}")
    return shape
