"""Rotary embeddings from a GGUF file's metadata and tensors, with the meaning that llama.cpp gives them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from tinyvllm.config import Rope, RopeScaling
from tinyvllm.errors import ModelError
from tinyvllm.storage.gguf_file import GGUFTensor
from tinyvllm.storage.hf_rope import DEFAULT_THETA, MAX_FACTOR, MAX_THETA, MIN_FACTOR, MIN_THETA, yarn_magnitude
from tinyvllm.storage.values import Values

KINDS = ("none", "linear", "yarn", "longrope")  # rope.scaling.type
DIVISORS = "rope_freqs.weight"  # llama3's scaling
SHORT, LONG = "rope_factors_short.weight", "rope_factors_long.weight"  # longrope's
ROPE_TENSORS = (DIVISORS, SHORT, LONG)


def read_gguf_rope(
    values: Values, tensors: Mapping[str, GGUFTensor], head_dim: int, *, is_partial: bool, is_interleaved: bool
) -> Rope:
    """The rope of layers without a window. `values`: the keys under {arch}. `is_partial`: whether the family can rotate
    a part of a head; `is_interleaved`: as in Rope."""
    num_dims = values.integer("rope.dimension_count", head_dim)
    if num_dims != head_dim and not is_partial:
        values.unsupported("rope.dimension_count", f"{head_dim} (the length of a head's key)")
    if num_dims % 2 or num_dims > head_dim:
        values.refuse("rope.dimension_count", f"an even number up to {head_dim} (the length of a head's key)")
    scaling, attention_factor = _scaling(values)
    if SHORT in tensors or LONG in tensors:
        short, long = (_numbers(values, tensors, name, num_dims // 2) for name in (SHORT, LONG))
        scaling = RopeScaling(
            "longrope", original_max_position=_original(values), short_factors=short or (), long_factors=long or ()
        )
    return Rope(
        theta=values.positive("rope.freq_base", DEFAULT_THETA, MIN_THETA, MAX_THETA),
        scaling=scaling,
        divisors=_numbers(values, tensors, DIVISORS, num_dims // 2) if DIVISORS in tensors else None,
        num_dims=None if num_dims == head_dim else num_dims,
        is_interleaved=is_interleaved,
        attention_factor=attention_factor * values.positive("rope.scaling.attn_factor", 1.0, MIN_FACTOR, MAX_FACTOR),
    )


def _original(values: Values) -> int:
    """At least 2, because longrope divides by its logarithm."""
    key = "rope.scaling.original_context_length"
    return values.integer(key, values.integer("context_length", at_least=2), at_least=2)


def _scaling(values: Values) -> tuple[RopeScaling | None, float]:
    """(how frequencies are stretched, the factor of cosines and sines). A factor without a type is linear."""
    kind = values.get("rope.scaling.type") or "linear"
    if kind not in KINDS:
        values.unsupported("rope.scaling.type", ", ".join(KINDS))
    factor = _factor(values, "rope.scaling.factor") or _factor(values, "rope.scale_linear") or 1.0
    if kind == "yarn":
        return _yarn(values, factor)
    if kind == "none" or factor == 1.0:
        return None, 1.0
    return RopeScaling("linear", factor), 1.0  # longrope's tensors take its place


def _yarn(values: Values, factor: float) -> tuple[RopeScaling, float]:
    if values.get("rope.scaling.yarn_ext_factor") not in (None, 1, -1):  # -1: not set
        values.unsupported("rope.scaling.yarn_ext_factor", "1")
    scaling = RopeScaling(
        "yarn",
        factor,
        original_max_position=_original(values),
        beta_fast=values.positive("rope.scaling.yarn_beta_fast", 32.0, MIN_FACTOR, MAX_FACTOR),
        beta_slow=values.positive("rope.scaling.yarn_beta_slow", 1.0, MIN_FACTOR, MAX_FACTOR),
    )
    slope = values.optional_number("rope.scaling.yarn_log_multiplier", MAX_FACTOR)
    usual = yarn_magnitude(factor) / (yarn_magnitude(factor, slope) if slope else 1.0)
    # The converter writes config.json's attention_factor and betas for every architecture, and they are applied for
    # every one, as in transformers; llama.cpp reads the betas and the multiplier for mistral3 alone
    return scaling, values.positive("rope.scaling.yarn_attn_factor", usual, MIN_FACTOR, MAX_FACTOR)


def _factor(values: Values, key: str) -> float | None:
    """0 means none."""
    return values.positive(key, at_least=MIN_FACTOR, at_most=MAX_FACTOR) if values.optional_number(key) else None


def _numbers(values: Values, tensors: Mapping[str, GGUFTensor], name: str, count: int) -> tuple[float, ...]:
    """The values of a vector of `count` float32, which frequencies are divided by."""
    tensor = tensors.get(name)
    if tensor is None:
        raise ModelError(f"{values.source} has no tensor {name}, which it needs")
    if tensor.ggml_type != "F32" or tensor.shape != (count,):
        raise ModelError(
            f"{values.source}: {name} is {tensor.ggml_type} of shape {tensor.shape}, not F32 of ({count},)"
        )
    divisors = tensor.data.view(np.float32)
    if not np.all((divisors >= MIN_FACTOR) & np.isfinite(divisors)):  # 1e30 where nothing rotates
        raise ModelError(f"{values.source}: {name} must hold finite numbers of at least {MIN_FACTOR:g}")
    return tuple(divisors.tolist())
