"""ModelConfig from Hugging Face's config.json, with the meaning that transformers' classes give it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tinyvllm.config import DTYPES, ModelConfig, Rope, RopeScaling
from tinyvllm.errors import ModelError
from tinyvllm.storage import families
from tinyvllm.storage.families import SOFTCAPS, FamilyFiles
from tinyvllm.storage.values import Values

ROPE_KINDS = ("default", "linear", "llama3")
ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}  # ours by transformers' name
FULL, WINDOWED = "full_attention", "sliding_attention"  # of layer_types and of rope_parameters by kind of layer
# What a model of several parts states once, outside its text_config
SHARED_KEYS = ("dtype", "torch_dtype", "tie_word_embeddings")


def read_hf_config(config: Values, name: str) -> ModelConfig:
    """Raises UnsupportedModelError for what cannot be run, ModelError for values that are missing or make no sense."""
    architecture = _architecture(config)
    family = families.KNOWN_ARCHITECTURES[architecture]
    values = _with_defaults(config, family)
    _refuse_variants(values, family)
    hidden_size = values.integer("hidden_size")
    num_heads = values.integer("num_attention_heads")
    num_layers = values.integer("num_hidden_layers")
    head_dim = _head_dim(values, hidden_size, num_heads)
    num_kv_heads = values.integer("num_key_value_heads", num_heads)
    if num_heads % num_kv_heads != 0:
        values.refuse("num_key_value_heads", f"a divisor of num_attention_heads ({num_heads})")
    window, windowed = _windows(values, family, num_layers)
    rope = _rope(values, family, FULL)
    has_local_rope = window is not None and family.local_rope_theta is not None
    read = ModelConfig(
        architecture=architecture,
        num_layers=num_layers,
        hidden_size=hidden_size,
        ffn_size=values.integer("intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        vocab_size=values.integer("vocab_size"),
        max_position=values.integer("max_position_embeddings"),
        rope_theta=rope.theta,
        norm_eps=values.positive("rms_norm_eps", 1e-6),
        tie_embeddings=values.flag("tie_word_embeddings"),
        rope_scaling=rope.scaling,
        dtype=_dtype(values),
        name=name,
        activation=family.activation,
        window=window,
        windowed=windowed,
        local_rope=_rope(values, family, WINDOWED) if has_local_rope else None,
        score_scale=_score_scale(values, family, head_dim),
        score_softcap=values.optional_number("attn_logit_softcapping") or None,
        logit_softcap=values.optional_number("final_logit_softcapping") or None,
        norm_offset=family.norm_offset,
        overflows_float16=family.overflows_float16,
    )
    return family.hf_refine(read, values)


def text_values(config: Values) -> Values:
    """What config.json says of the language model: all of it, or its text_config if the model has other parts."""
    text = config.inner("text_config")
    if text is None:
        return config
    shared = {key: config.get(key) for key in SHARED_KEYS if config.get(key) is not None}
    return Values(config.source, shared | dict(text.values))


def _architecture(config: Values) -> str:
    classes, model_type = config.get("architectures") or [], config.get("model_type")
    for key, names in families.KNOWN_ARCHITECTURES.items():
        if any(name in names.hf_classes for name in classes) or (not classes and model_type in names.hf_types):
            return key
    known = families.KNOWN_ARCHITECTURES.values()
    if classes:
        config.unsupported("architectures", ", ".join(name for family in known for name in family.hf_classes))
    config.unsupported("model_type", ", ".join(name for family in known for name in family.hf_types))


def _with_defaults(config: Values, family: FamilyFiles) -> Values:
    """The text model's values, with the family's defaults for missing keys. A null stays a null."""
    return Values(config.source, dict(family.hf_defaults) | dict(text_values(config).values))


def _head_dim(values: Values, hidden_size: int, num_heads: int) -> int:
    if values.get("head_dim") is None and hidden_size % num_heads != 0:
        values.refuse("hidden_size", f"a multiple of num_attention_heads ({num_heads}) where head_dim is not given")
    head_dim = values.integer("head_dim", hidden_size // num_heads)
    if head_dim % 2 != 0:
        raise ModelError(f"{values.source}: head_dim is {head_dim}: rotary embeddings need an even number")
    return head_dim


def _score_scale(values: Values, family: FamilyFiles, head_dim: int) -> float | None:
    """None if it is the usual head_dim ** -0.5."""
    if "query_pre_attn_scalar" not in family.hf_defaults:  # the class has no such setting
        return None
    scalar = values.positive("query_pre_attn_scalar")
    return None if scalar == head_dim else scalar**-0.5


def _refuse_variants(values: Values, family: FamilyFiles) -> None:
    """Refuse settings that would change the computation, where running on would give wrong tokens."""
    for key in ("hidden_act", "hidden_activation"):
        if values.get(key) is not None and ACTIVATIONS.get(values.get(key)) != family.activation:
            values.unsupported(key, ", ".join(name for name, ours in ACTIVATIONS.items() if ours == family.activation))
    for key in ("attention_bias", "mlp_bias"):
        if values.flag(key):
            values.unsupported(key, "false (no biases)")
    if values.flag("use_bidirectional_attention"):
        values.unsupported("use_bidirectional_attention", "false (causal attention)")
    if values.get("partial_rotary_factor") not in (None, 1, 1.0):
        values.unsupported("partial_rotary_factor", "1.0")
    for key in SOFTCAPS:
        if key not in family.softcaps and values.get(key) is not None:
            values.unsupported(key, "null")


# --- Windows -----------------------------------------------------------------------------------------------------


def _windows(values: Values, family: FamilyFiles, num_layers: int) -> tuple[int | None, tuple[bool, ...]]:
    """ModelConfig's `window` and `windowed`. A window that holds every position counts as none, unless windowed layers
    differ in their rope too."""
    if not values.flag("use_sliding_window", default=True):
        return None, ()
    kinds = _layer_types(values, num_layers)
    if kinds is not None and WINDOWED in kinds and family.hf_windows != "by layer":
        values.unsupported("layer_types", f"{FULL} in every layer")
    window = values.optional_integer("sliding_window")
    is_narrow = window is not None and window < values.integer("max_position_embeddings")
    if is_narrow and family.hf_windows is None:
        values.unsupported("sliding_window", "null (full attention)")
    if not is_narrow and family.local_rope_theta is None:
        return None, ()
    windowed = _windowed_layers(values, family, kinds, num_layers)
    return (values.integer("sliding_window"), shortest_period(windowed)) if any(windowed) else (None, ())


def _layer_types(values: Values, num_layers: int) -> list[str] | None:
    kinds = values.get("layer_types")
    if kinds is None:
        return None
    if not isinstance(kinds, list) or any(kind not in (FULL, WINDOWED) for kind in kinds):
        values.unsupported("layer_types", f"a list of {FULL} and {WINDOWED}")
    if len(kinds) != num_layers:
        values.refuse("layer_types", f"a list of num_hidden_layers ({num_layers}) entries")
    return kinds


def _windowed_layers(
    values: Values, family: FamilyFiles, kinds: Sequence[str] | None, num_layers: int
) -> tuple[bool, ...]:
    layers = range(num_layers)
    if family.hf_windows == "all":
        return tuple(True for _ in layers)
    if kinds is not None:
        return tuple(kind == WINDOWED for kind in kinds)
    first = values.optional_integer("max_window_layers", at_least=0)
    if first is not None:
        return tuple(layer >= first for layer in layers)
    period = values.integer("sliding_window_pattern")
    return tuple((layer + 1) % period != 0 for layer in layers)


def shortest_period(windowed: Sequence[bool]) -> tuple[bool, ...]:
    """The shortest beginning that gives all of `windowed` when it is repeated; () where all layers are windowed."""
    if all(windowed):
        return ()
    lengths = range(1, len(windowed) + 1)
    length = next(n for n in lengths if all(flag == windowed[i % n] for i, flag in enumerate(windowed)))
    return tuple(windowed[:length])


# --- Rotary embeddings -------------------------------------------------------------------------------------------


def _rope(values: Values, family: FamilyFiles, layer_type: str) -> Rope:
    """Theta and scaling of a kind of layer, from `rope_parameters` (transformers 5) or from `rope_theta` and
    `rope_scaling`. Where both are there, the latter wins, as in transformers' convert_rope_params_to_dict."""
    if family.local_rope_theta is not None:
        return _rope_by_layer(values, family, layer_type)
    if values.inner("rope_scaling") is None:
        _refuse_nested(values)
    rope = values.inner("rope_scaling") or values.inner("rope_parameters") or Values(values.source, {})
    return _read_rope(values, rope, values.positive("rope_theta", 10000.0))


def _refuse_nested(values: Values) -> None:
    rope = values.inner("rope_parameters")
    if rope is not None and any(isinstance(value, dict) for value in rope.values.values()):
        values.unsupported("rope_parameters", "the same for every layer")


def _rope_by_layer(values: Values, family: FamilyFiles, layer_type: str) -> Rope:
    """Gemma 3's: `rope_parameters` has an object for each kind of layer, and `rope_scaling` is for layers without a
    window only."""
    nested = values.inner("rope_parameters") or Values(values.source, {})
    rope: dict[str, Any] = dict((nested.inner(layer_type) or Values(values.source, {})).values)
    if layer_type == WINDOWED:
        theta = values.positive("rope_local_base_freq", family.local_rope_theta)
    else:
        scaling = values.inner("rope_scaling")
        rope |= {} if scaling is None else dict(scaling.values)
        theta = values.positive("rope_theta")
    return _read_rope(values, Values(values.source, rope), theta)


def _read_rope(values: Values, rope: Values, theta: float) -> Rope:
    theta = rope.positive("rope_theta", theta)
    if rope.get("partial_rotary_factor") not in (None, 1, 1.0):
        rope.unsupported("partial_rotary_factor", "1.0")
    key = "rope_type" if rope.get("rope_type") is not None else "type"
    kind = rope.get(key) or "default"
    if kind not in ROPE_KINDS:
        rope.unsupported(key, ", ".join(ROPE_KINDS))
    if kind == "default":
        return Rope(theta)
    if kind == "linear":
        return Rope(theta, RopeScaling("linear", rope.positive("factor")))
    low, high = rope.positive("low_freq_factor"), rope.positive("high_freq_factor")
    if low >= high:
        rope.refuse("low_freq_factor", f"below high_freq_factor ({high})")
    original = rope.integer("original_max_position_embeddings", values.optional_integer("max_position_embeddings"))
    return Rope(theta, RopeScaling("llama3", rope.positive("factor"), low, high, original))


def _dtype(values: Values) -> str:
    key = "dtype" if values.get("dtype") is not None else "torch_dtype"
    dtype = values.get(key) or "float32"
    if dtype not in DTYPES:
        values.unsupported(key, ", ".join(DTYPES))
    return str(dtype)
