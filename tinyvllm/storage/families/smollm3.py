"""SmolLM3: layers without a rope."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from tinyvllm.config import ModelConfig
from tinyvllm.storage.families.family import FamilyFiles
from tinyvllm.storage.families.llama import BIASES
from tinyvllm.storage.values import Values

INTERVAL = 4  # each fourth layer has no rope


def refine_hf(config: ModelConfig, values: Values) -> ModelConfig:
    flags = values.get("no_rope_layers")  # 1: the layer has a rope
    if flags is None:
        interval = values.integer("no_rope_layer_interval", INTERVAL)
        flags = [int((layer + 1) % interval != 0) for layer in range(config.num_layers)]
    if not isinstance(flags, list) or len(flags) < config.num_layers or any(flag not in (0, 1) for flag in flags):
        values.refuse("no_rope_layers", f"a list of at least {config.num_layers} of 0 and 1")
    return replace(config, ropeless=tuple(not flag for flag in flags[: config.num_layers]))


def refine_gguf(config: ModelConfig, values: Values, tensors: Collection[str]) -> ModelConfig:
    """llama.cpp has no key for it."""
    return replace(config, ropeless=tuple((layer + 1) % INTERVAL == 0 for layer in range(config.num_layers)))


FILES = FamilyFiles(
    hf_classes=("SmolLM3ForCausalLM",),
    hf_types=("smollm3",),
    gguf=("smollm3",),
    hf_defaults={
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "rope_theta": 2e6,
        "use_sliding_window": False,
        "tie_word_embeddings": True,
    },
    hf_windows="by layer",
    hf_biases=BIASES,
    gguf_interleaves_pairs=True,
    hf_refine=refine_hf,
    gguf_refine=refine_gguf,
)
