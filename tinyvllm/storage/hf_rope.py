"""Rotary embeddings from config.json: `rope_scaling` and `rope_theta`, or `rope_parameters` (transformers 5).

Keys have the meaning that transformers' modeling_rope_utils.py gives them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from tinyvllm.config import Rope, RopeScaling
from tinyvllm.storage.values import Values

ROPE_KINDS = ("default", "linear", "llama3", "yarn", "longrope", "proportional")
FULL, WINDOWED = "full_attention", "sliding_attention"  # of layer_types and of rope_parameters by kind of layer
DEFAULT_THETA = 10000.0
MIN_THETA, MAX_THETA = 2.0, 1e18  # known are 1e4 to 1e10
MIN_FACTOR, MAX_FACTOR = 1e-6, 1e6  # of a stretched context; known are up to 128


def rope_values(values: Values) -> Values:
    """What says how positions are rotated: `rope_scaling` if it is there, else `rope_parameters`, as in transformers'
    convert_rope_params_to_dict. An unknown kind is refused in either."""
    places = [place for key in ("rope_scaling", "rope_parameters") if (place := values.inner(key)) and place.values]
    for place in places:
        if any(isinstance(value, dict) for value in place.values.values()):
            values.unsupported("rope_parameters", "the same for every layer")
    return places[0] if places else Values(values.source, {})


def read_rope(values: Values, head_dim: int, aliases: Mapping[str, str]) -> Rope:
    """The rope of every layer. `aliases`: other names of kinds in this family's files."""
    for key in ("rope_scaling", "rope_parameters"):
        if (place := values.inner(key)) is not None:
            _kind(place, aliases)
    return _read(values, rope_values(values), head_dim, aliases)


def read_rope_by_layer(values: Values, head_dim: int, layer_type: str, local_theta: float | None) -> Rope:
    """The rope of layers of one type: `rope_parameters` has an object for each, and `rope_scaling` is for layers
    without a window only (Gemma 3, OLMo 3). `local_theta`: of windowed layers, if the file says nothing; None: as in
    others."""
    nested = values.inner("rope_parameters") or Values(values.source, {})
    rope: dict[str, Any] = dict((nested.inner(layer_type) or Values(values.source, {})).values)
    if layer_type == WINDOWED:
        if local_theta is not None or values.get("rope_local_base_freq") is not None:
            rope.setdefault("rope_theta", values.positive("rope_local_base_freq", local_theta, MIN_THETA, MAX_THETA))
    elif (scaling := values.inner("rope_scaling")) is not None:
        rope |= dict(scaling.values)
    return _read(values, Values(values.source, rope), head_dim, {})


def _kind(rope: Values, aliases: Mapping[str, str]) -> str:
    key = "rope_type" if rope.get("rope_type") is not None else "type"
    stated = rope.get(key) or "default"
    kind = aliases.get(stated, stated) if isinstance(stated, str) else stated
    if kind not in ROPE_KINDS:
        rope.unsupported(key, ", ".join(ROPE_KINDS))
    return str(kind)


def _read(values: Values, rope: Values, head_dim: int, aliases: Mapping[str, str]) -> Rope:
    kind = _kind(rope, aliases)
    outside = values.positive("rope_theta", DEFAULT_THETA, MIN_THETA, MAX_THETA)
    theta = rope.positive("rope_theta", outside, MIN_THETA, MAX_THETA)
    share = rope.positive("partial_rotary_factor", values.positive("partial_rotary_factor", 1.0))
    if kind == "proportional":  # its share is of the pairs that rotate, in a rope of all dimensions
        return Rope(
            theta, RopeScaling("proportional", rope.positive("factor", 1.0, MIN_FACTOR, MAX_FACTOR), proportion=share)
        )
    num_dims = int(head_dim * share)
    if num_dims % 2 or not 0 < num_dims <= head_dim:
        source = rope if rope.get("partial_rotary_factor") is not None else values
        source.refuse("partial_rotary_factor", f"a share of head_dim ({head_dim}) that is an even number of dimensions")
    scaling, attention_factor = _scaling(values, rope, kind, num_dims)
    partial = None if num_dims == head_dim else num_dims
    return Rope(theta, scaling, num_dims=partial, attention_factor=attention_factor)


def _scaling(values: Values, rope: Values, kind: str, num_dims: int) -> tuple[RopeScaling | None, float]:
    """(how frequencies are stretched, the factor of cosines and sines)."""
    if kind == "default":
        return None, 1.0
    if kind == "linear":
        return RopeScaling("linear", _factor(rope)), 1.0
    original = _original_max_position(values, rope)
    if kind == "llama3":
        low, high = rope.positive("low_freq_factor"), rope.positive("high_freq_factor")
        if low >= high:
            rope.refuse("low_freq_factor", f"below high_freq_factor ({high})")
        return RopeScaling("llama3", _factor(rope), low, high, original), 1.0
    factor = _factor(rope, values.integer("max_position_embeddings") / original)
    stretch = _longrope if kind == "longrope" else _yarn
    return stretch(rope, factor, original, num_dims)


def _longrope(rope: Values, factor: float, original: int, num_dims: int) -> tuple[RopeScaling, float]:
    short, long = (rope.numbers(key, num_dims // 2) for key in ("short_factor", "long_factor"))
    scaling = RopeScaling("longrope", original_max_position=original, short_factors=short, long_factors=long)
    usual = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return scaling, rope.positive("attention_factor", usual)


def _yarn(rope: Values, factor: float, original: int, num_dims: int) -> tuple[RopeScaling, float]:
    scaling = RopeScaling(
        "yarn",
        factor,
        original_max_position=original,
        beta_fast=rope.optional_number("beta_fast", MAX_FACTOR) or 32.0,
        beta_slow=rope.optional_number("beta_slow", MAX_FACTOR) or 1.0,
        truncate=rope.flag("truncate", default=True),
    )
    slope, all_dims = (rope.optional_number(key, MAX_FACTOR) for key in ("mscale", "mscale_all_dim"))
    usual = yarn_magnitude(factor)
    if slope and all_dims:
        usual = yarn_magnitude(factor, slope) / yarn_magnitude(factor, all_dims)
    return scaling, rope.positive("attention_factor", usual)


def _original_max_position(values: Values, rope: Values) -> int:
    """Tokens of the context before it was stretched. A class that has the key outside (Phi-3) reads it there."""
    key = "original_max_position_embeddings"
    outside = values.optional_integer(key, at_least=2)  # longrope divides by its logarithm
    return outside or rope.integer(key, values.optional_integer("max_position_embeddings"), at_least=2)


def _factor(rope: Values, default: float | None = None) -> float:
    return rope.positive("factor", default, MIN_FACTOR, MAX_FACTOR)


def yarn_magnitude(factor: float, slope: float = 1.0) -> float:
    """By how much YaRN scales cosines and sines (Peng et al. 2023, eq. 22), for DeepSeek's slopes too."""
    return 0.1 * slope * math.log(factor) + 1.0 if factor > 1 else 1.0
