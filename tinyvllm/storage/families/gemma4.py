"""Gemma 4, text, and the text part of the multimodal models."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from tinyvllm.config import ExpertsKind, LayerSizes, ModelConfig
from tinyvllm.storage.families.experts import gguf_experts, hf_experts
from tinyvllm.storage.families.family import FamilyFiles
from tinyvllm.storage.values import MAX_SIZE, Values


def _shared(config: ModelConfig, sizes: Sequence[LayerSizes], num_shared: int) -> tuple[LayerSizes, ...]:
    """The sizes of layers of which the last `num_shared` read the keys and values of the last layer of their kind (with
    a window, or without) that stores its own."""
    first = config.num_layers - num_shared
    is_windowed = [kind.window is not None for kind in config.layers]
    last = {flag: layer for layer, flag in enumerate(is_windowed[:first])}
    return tuple(
        replace(size, kv_layer=last[is_windowed[layer]], has_v_from_k=False) if layer >= first else size
        for layer, size in enumerate(sizes)
    )


def _num_shared(config: ModelConfig, values: Values, key: str) -> int:
    """Layers that read others' keys: those of each kind need a layer before them that stores its own."""
    count = values.optional_integer(key, at_least=0) or 0
    windows = [kind.window is not None for kind in config.layers]
    if count >= config.num_layers or set(windows[: config.num_layers - count]) != set(windows):
        values.refuse(key, "less than the number of layers, with a layer of each kind before those that it counts")
    return count


def refine_hf(config: ModelConfig, values: Values) -> ModelConfig:
    """transformers' Gemma4TextConfig: layers without a window have heads of another size, and perhaps no v_proj."""
    if values.inner("rope_parameters") is None:
        values.refuse("rope_parameters", "an object with those of sliding_attention and of full_attention")
    # the class makes the last layer see every token, whatever layer_types says
    windowed = tuple(kind.window is not None for kind in config.layers)
    config = replace(config, windowed=(*windowed[:-1], False)) if windowed[-1] else config
    num_shared = _num_shared(config, values, "num_kv_shared_layers")
    wide = 2 if values.flag("use_double_wide_mlp") else 1
    sizes = []
    for layer, kind in enumerate(config.layers):
        num_kv_heads, head_dim = _head_sizes(config, values, layer, is_global=kind.window is None)
        is_shared = layer >= config.num_layers - num_shared
        sizes.append(
            LayerSizes(
                num_kv_heads=num_kv_heads,
                head_dim=head_dim,
                ffn_size=config.ffn_size * (wide if is_shared else 1),
                has_v_from_k=kind.window is None and values.flag("attention_k_eq_v"),
            )
        )
    per_layer_size = values.optional_integer("hidden_size_per_layer_input", at_least=0) or 0
    if per_layer_size and values.integer("vocab_size_per_layer_input") != config.vocab_size:
        values.unsupported("vocab_size_per_layer_input", f"{config.vocab_size} (vocab_size)")
    experts = None
    if values.flag("enable_moe_block"):
        experts = _as_gemma_has_them(hf_experts(values, "moe_intermediate_size", "top_k_experts"))
    return replace(
        config,
        layer_sizes=_shared(config, sizes, num_shared),
        per_layer_size=per_layer_size,
        score_scale=1.0,
        experts=experts,
    )


def _as_gemma_has_them(experts: ExpertsKind) -> ExpertsKind:
    return replace(experts, activation="gelu_tanh", has_expert_scale=True, is_beside_dense=True)


def _head_sizes(config: ModelConfig, values: Values, layer: int, *, is_global: bool) -> tuple[int, int]:
    """(KV heads, dimension of a head) of a layer: from `per_layer_config`, which transformers writes, or from the keys
    for layers without a window in Google's files."""
    by_layer = values.inner("per_layer_config")
    if by_layer is not None:
        own = by_layer.inner(str(layer)) or Values(values.source, {})
        return own.integer("num_key_value_heads", config.num_kv_heads), own.integer("head_dim", config.head_dim)
    if not is_global:
        return config.num_kv_heads, config.head_dim
    num_kv_heads = config.num_kv_heads
    if values.flag("attention_k_eq_v"):
        num_kv_heads = values.integer("num_global_key_value_heads", num_kv_heads)
    return num_kv_heads, values.integer("global_head_dim")


def refine_gguf(config: ModelConfig, values: Values, tensors: Collection[str]) -> ModelConfig:
    """llama.cpp's conversion/gemma.py: lengths of heads have a second key for windows, and numbers that differ between
    layers are lists. Values are keys where a layer has no attn_v."""
    local_head_dim = values.integer("attention.key_length_swa", at_most=MAX_SIZE)
    num_shared = _num_shared(config, values, "attention.shared_kv_layers")
    kv_heads, ffn_sizes = (
        values.integers(key, config.num_layers, at_most=MAX_SIZE)
        for key in ("attention.head_count_kv", "feed_forward_length")
    )
    sizes = [
        LayerSizes(
            num_kv_heads=kv_heads[layer],
            head_dim=config.head_dim if kind.window is None else local_head_dim,
            ffn_size=ffn_sizes[layer],
            has_v_from_k=f"blk.{layer}.attn_v.weight" not in tensors,
        )
        for layer, kind in enumerate(config.layers)
    ]
    return replace(
        config,
        head_dim=local_head_dim,
        num_kv_heads=max(kv_heads),
        ffn_size=min(ffn_sizes),
        layer_sizes=_shared(config, sizes, num_shared),
        per_layer_size=values.optional_integer("embedding_length_per_layer_input", 0, MAX_SIZE) or 0,
        score_scale=1.0,
        experts=_as_gemma_has_them(gguf_experts(values)) if values.get("expert_count") else None,
    )


FILES = FamilyFiles(
    hf_classes=(
        "Gemma4ForCausalLM",
        "Gemma4ForConditionalGeneration",
    ),
    hf_types=("gemma4_text", "gemma4"),
    gguf=("gemma4",),
    activation="gelu_tanh",
    hf_defaults={
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "global_head_dim": 512,
        "vocab_size": 262144,
        "vocab_size_per_layer_input": 262144,
        "hidden_size_per_layer_input": 256,
        "max_position_embeddings": 131072,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
        },
        "rope_theta": 1e6,
        "tie_word_embeddings": True,
        "sliding_window": 512,
        "sliding_window_pattern": 6,
    },
    hf_windows="by layer",
    gguf_window_pattern=6,
    softcaps=("final_logit_softcapping",),
    has_local_rope=True,
    local_rope_theta=10000.0,
    has_partial_rope=True,
    overflows_float16=True,
    hf_renamed={
        "model.language_model.": "model.",
        "language_model.model.": "model.",
        "language_model.lm_head.": "lm_head.",
    },
    hf_unread=tuple(
        f"{prefix}{part}."
        for prefix in ("model.", "")
        for part in ("vision_tower", "vision_embedder", "embed_vision", "audio_tower", "embed_audio")
    ),
    gguf_layer_names={
        "post_attention_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
        "inp_gate": "per_layer_input_gate",
        "proj": "per_layer_projection",
        "pre_ffw_norm_2": "pre_feedforward_layernorm_2",
        "post_ffw_norm_1": "post_feedforward_layernorm_1",
        "post_ffw_norm_2": "post_feedforward_layernorm_2",
        "post_norm": "post_per_layer_input_norm",
        "layer_output_scale.weight": "layer_scalar",
    },
    has_layer_sizes=True,
    has_experts=None,
    hf_refine=refine_hf,
    gguf_refine=refine_gguf,
)

# 12B, whose towers are smaller. Its text model has no per-layer embeddings; its GGUF files are gemma4's
UNIFIED_FILES = replace(
    FILES,
    hf_classes=("Gemma4UnifiedForCausalLM", "Gemma4UnifiedForConditionalGeneration"),
    hf_types=("gemma4_unified_text", "gemma4_unified"),
    gguf=(),
    hf_defaults=dict(FILES.hf_defaults)
    | {"hidden_size_per_layer_input": 0, "max_position_embeddings": 262144, "sliding_window": 1024},
)
