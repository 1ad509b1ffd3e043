"""LFM2 and LFM2.5 (dense): gated short convolutions, and every few layers attention."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from tinyvllm.config import ConvKind, ModelConfig
from tinyvllm.storage.families.delta_net import MIN_TAPS
from tinyvllm.storage.families.family import FamilyFiles
from tinyvllm.storage.values import MAX_SIZE, Values

CONV, FULL = "conv", "full_attention"  # of layer_types


def refine_hf(config: ModelConfig, values: Values) -> ModelConfig:
    """transformers' Lfm2Config, and the size that Lfm2MLP makes of it."""
    if values.flag("conv_bias"):
        values.unsupported("conv_bias", "false (no biases)")
    kinds = values.get("layer_types")
    if kinds is None:
        attends = _attending_layers(values, config.num_layers)
        kinds = [FULL if layer in attends else CONV for layer in range(config.num_layers)]
    config = replace(
        config,
        norm_eps=values.positive("norm_eps", 1e-5),
        ffn_size=_ffn_size(values),
        tie_embeddings=values.flag("tie_embedding", config.tie_embeddings),
    )
    return _with_convolutions(
        config, values, tuple(kind == CONV for kind in kinds), values.integer("conv_L_cache", at_least=MIN_TAPS)
    )


def _attending_layers(values: Values, num_layers: int) -> set[int]:
    """Where a file does not list them, all layers have attention."""
    if values.get("full_attn_idxs") is None:
        return set(range(num_layers))
    limit = f"a list of layers, each less than num_hidden_layers ({num_layers})"
    layers = values.indices("full_attn_idxs", num_layers, limit)
    if not layers:
        values.refuse("full_attn_idxs", limit)
    return layers


def _ffn_size(values: Values) -> int:
    size = values.integer("block_ff_dim", values.integer("intermediate_size"), at_most=MAX_SIZE)
    if not values.flag("block_auto_adjust_ff_dim", default=True):
        return size
    size = int(values.positive("block_ffn_dim_multiplier", 1.0, at_most=1024) * int(2 * size / 3))
    multiple = values.integer("block_multiple_of", 256, at_most=MAX_SIZE)
    return -(-size // multiple) * multiple


def refine_gguf(config: ModelConfig, values: Values, tensors: Collection[str]) -> ModelConfig:
    """llama.cpp's src/models/lfm2.cpp: layers without heads of keys are convolutions."""
    heads = values.get("attention.head_count_kv")
    flags = tuple(count == 0 for count in heads) if isinstance(heads, list) else (False,) * config.num_layers
    return _with_convolutions(config, values, flags, values.integer("shortconv.l_cache", at_least=MIN_TAPS))


def _with_convolutions(config: ModelConfig, values: Values, recurrent: tuple[bool, ...], width: int) -> ModelConfig:
    if all(recurrent):
        values.unsupported("layer_types", f"a list with {FULL} in one layer at least")
    return replace(config, state=ConvKind.of(config.hidden_size, width), recurrent=recurrent)


FILES = FamilyFiles(
    hf_classes=("Lfm2ForCausalLM",),
    hf_types=("lfm2",),
    gguf=("lfm2",),
    hf_defaults={
        "intermediate_size": 12288,
        "num_key_value_heads": 8,
        "max_position_embeddings": 128000,
        "rope_theta": 1e6,
        "tie_word_embeddings": True,
        "conv_L_cache": 3,
    },
    hf_recurrent=CONV,
    hf_renamed={"model.embedding_norm.": "model.norm."},
    hf_layer_names={
        "operator_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "self_attn.out_proj": "self_attn.o_proj",
        "self_attn.q_layernorm": "self_attn.q_norm",
        "self_attn.k_layernorm": "self_attn.k_norm",
        "feed_forward.w1": "mlp.gate_proj",
        "feed_forward.w2": "mlp.down_proj",
        "feed_forward.w3": "mlp.up_proj",
    },
    gguf_layer_names={
        "shortconv.conv": "conv.conv",
        "shortconv.in_proj": "conv.in_proj",
        "shortconv.out_proj": "conv.out_proj",
    },
    hf_refine=refine_hf,
    gguf_refine=refine_gguf,
)
