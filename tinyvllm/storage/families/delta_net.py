"""What files say of Gated DeltaNet layers, for all families that have them: Qwen3-Next, Qwen3.5 and its kind."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from tinyvllm.config import ModelConfig, StateKind
from tinyvllm.errors import ModelError
from tinyvllm.storage.families.qwen2 import MROPE, VISUAL, VL_NAMES
from tinyvllm.storage.values import Values

RECURRENT, FULL = "linear_attention", "full_attention"  # of layer_types
MAX_CHANNELS = 1 << 20  # of a layer's convolution; Qwen3-Next's have 8192
MIN_TAPS = 2  # of a convolution: kernels keep the inputs of the others
USUAL_INTERVAL = 4  # every fourth layer is one of attention, where a file does not say which are

# transformers' defaults for keys that are missing, whatever the size of the model
HF_DEFAULTS = {
    "max_position_embeddings": 32768,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "partial_rotary_factor": 0.25,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
}
RENAMED, ROPE_ALIASES = VL_NAMES, MROPE
UNREAD = (*VISUAL, *(f"{prefix}mtp." for prefix in ("", "model.", "language_model.")))
GGUF_NAMES = {
    "post_attention_norm": "post_attention_layernorm",
    "attn_qkv": "linear_attn.in_proj_qkv",
    "attn_gate": "linear_attn.in_proj_z",
    "ssm_alpha": "linear_attn.in_proj_a",
    "ssm_beta": "linear_attn.in_proj_b",
    "ssm_in": "linear_attn.in_proj_qkvz",  # in old files of Qwen3-Next
    "ssm_ba": "linear_attn.in_proj_ba",
    "ssm_conv1d": "linear_attn.conv1d",
    "ssm_dt.bias": "linear_attn.dt_bias",
    "ssm_a": "linear_attn.A_log",
    "ssm_norm": "linear_attn.norm",
    "ssm_out": "linear_attn.out_proj",
}


def refine_hf(config: ModelConfig, values: Values) -> ModelConfig:
    """transformers' Qwen3NextConfig and Qwen3_5TextConfig."""
    if not values.flag("attn_output_gate", default=True):
        values.unsupported("attn_output_gate", "true")
    kinds = values.get("layer_types")
    interval = values.integer("full_attention_interval", USUAL_INTERVAL)
    recurrent = _every(interval, config.num_layers) if kinds is None else tuple(kind == RECURRENT for kind in kinds)
    state = StateKind(
        num_heads=values.integer("linear_num_value_heads"),
        num_key_heads=values.integer("linear_num_key_heads"),
        key_dim=values.integer("linear_key_head_dim"),
        value_dim=values.integer("linear_value_head_dim"),
        conv_width=values.integer("linear_conv_kernel_dim", at_least=MIN_TAPS),
        norm_eps=config.norm_eps,
    )
    _require_few_channels(state, values)
    if state.num_heads % state.num_key_heads:
        values.refuse("linear_num_value_heads", f"a multiple of linear_num_key_heads ({state.num_key_heads})")
    if all(recurrent) and kinds is not None:
        values.unsupported("layer_types", f"a list with {FULL} in one layer at least")
    _require_attention(recurrent, values)
    return replace(config, state=state, recurrent=recurrent, has_output_gate=True)


def refine_gguf(config: ModelConfig, values: Values, tensors: Collection[str]) -> ModelConfig:
    """llama.cpp's src/models/qwen3next.cpp and qwen35.cpp: a layer's values have ssm.inner_size columns."""
    num_heads, size = values.integer("ssm.time_step_rank"), values.integer("ssm.inner_size")
    if size % num_heads:
        values.refuse("ssm.inner_size", f"a multiple of ssm.time_step_rank ({num_heads})")
    state = StateKind(
        num_heads=num_heads,
        num_key_heads=values.integer("ssm.group_count"),
        key_dim=values.integer("ssm.state_size"),
        value_dim=size // num_heads,
        conv_width=values.integer("ssm.conv_kernel", at_least=MIN_TAPS),
        norm_eps=config.norm_eps,
    )
    _require_few_channels(state, values)
    if num_heads % state.num_key_heads:
        values.refuse("ssm.time_step_rank", f"a multiple of ssm.group_count ({state.num_key_heads})")
    return replace(config, state=state, recurrent=_gguf_recurrent(config, values), has_output_gate=True)


def _require_few_channels(state: StateKind, values: Values) -> None:
    """Weights are found by lists of their rows."""
    if state.conv_size > MAX_CHANNELS:
        raise ModelError(
            f"{values.source}: recurrent layers would have {state.conv_size} channels ({state.num_key_heads} heads of "
            f"queries and keys of {state.key_dim}, {state.num_heads} of values of {state.value_dim}): they must have "
            f"at most {MAX_CHANNELS}"
        )


def _gguf_recurrent(config: ModelConfig, values: Values) -> tuple[bool, ...]:
    """A flag for each layer, also for those that draft; or a period."""
    key = "attention.recurrent_layers"
    if values.get(key) is None:
        recurrent = _every(values.integer("full_attention_interval", USUAL_INTERVAL), config.num_layers)
        _require_attention(recurrent, values)
        return recurrent
    counts = (config.num_layers, values.integer("block_count"))
    flags = values.flags(key, counts, f"a list with a flag for each of {config.num_layers} layers")
    recurrent = flags[: config.num_layers]
    if all(recurrent):
        values.unsupported(key, "a list with false in one layer at least")
    return recurrent


def _require_attention(recurrent: tuple[bool, ...], values: Values) -> None:
    if all(recurrent):
        values.unsupported("full_attention_interval", f"up to {len(recurrent)}, the number of layers")


def _every(interval: int, num_layers: int) -> tuple[bool, ...]:
    """Whether each layer is recurrent, if every `interval`-th is not."""
    return tuple((layer + 1) % interval != 0 for layer in range(num_layers))
