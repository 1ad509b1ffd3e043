"""ModelConfig from Hugging Face's config.json, with the meaning that transformers' classes give it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tinyvllm.config import DTYPES, ModelConfig, Rope
from tinyvllm.errors import ModelError
from tinyvllm.storage import families
from tinyvllm.storage.families import SOFTCAPS, FamilyFiles
from tinyvllm.storage.hf_rope import FULL, WINDOWED, read_rope, read_rope_by_layer
from tinyvllm.storage.values import MAX_LAYERS, MAX_SIZE, Values

ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}  # ours by transformers' name
# What a model of several parts states once, outside its text_config
CAUSAL, CLASSIFIER = "ForCausalLM", "ForSequenceClassification"  # ends of classes' names
HEADLESS = (CLASSIFIER, "Model")  # of classes whose layers are a causal model's, without its head
DTYPE_KEYS = ("dtype", "torch_dtype")
SHARED_KEYS = (*DTYPE_KEYS, "tie_word_embeddings")


def read_hf_config(config: Values, name: str) -> ModelConfig:
    """Raises UnsupportedModelError for what cannot be run, ModelError for values that are missing or make no sense."""
    architecture, has_head = _architecture(config)
    family = families.KNOWN_ARCHITECTURES[architecture]
    values = _with_defaults(config, family)
    _refuse_variants(values, family)
    hidden_size = values.integer("hidden_size", at_most=MAX_SIZE)
    num_heads = values.integer("num_attention_heads", at_most=MAX_SIZE)
    num_layers = values.integer("num_hidden_layers", at_most=MAX_LAYERS)
    head_dim = _head_dim(values, "qk_rope_head_dim" if family.has_latents else "head_dim", hidden_size, num_heads)
    num_kv_heads = values.integer("num_key_value_heads", num_heads)
    if num_heads % num_kv_heads != 0:
        values.refuse("num_key_value_heads", f"a divisor of num_attention_heads ({num_heads})")
    window, windowed = _windows(values, family, num_layers)
    rope, local_rope = _ropes(values, family, head_dim)
    read = ModelConfig(
        architecture=architecture,
        num_layers=num_layers,
        hidden_size=hidden_size,
        ffn_size=values.integer("intermediate_size", at_most=MAX_SIZE),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        vocab_size=values.integer("vocab_size", at_most=MAX_SIZE),
        max_position=values.integer("max_position_embeddings"),
        rope=rope,
        norm_eps=values.positive("rms_norm_eps", 1e-6),
        tie_embeddings=values.flag("tie_word_embeddings") or not has_head,
        has_head=has_head,
        num_labels=_num_labels(config),
        dtype=_dtype(values),
        name=name,
        activation=family.activation,
        window=window,
        windowed=windowed,
        local_rope=local_rope if window is not None else None,
        score_scale=_score_scale(values, family, head_dim),
        score_softcap=values.optional_number("attn_logit_softcapping") or None,
        logit_softcap=values.optional_number("final_logit_softcapping") or None,
        norm_offset=family.norm_offset,
        biases=tuple(part for key, parts in family.hf_biases.items() if values.flag(key) for part in parts),
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


def _architecture(config: Values) -> tuple[str, bool]:
    """(the registry's key, whether the class has a language model's head)."""
    classes, model_type = config.texts("architectures"), config.optional_text("model_type")
    text_type = text_values(config).optional_text("model_type")
    for key, names in families.KNOWN_ARCHITECTURES.items():
        is_wrapped = any(name in names.hf_wrappers for name in classes) and text_type in (None, *names.hf_types)
        if is_wrapped or any(name in names.hf_classes for name in classes):
            return key, True
        if not classes and model_type in names.hf_types:
            return key, True
        if any(name.removesuffix(end) + CAUSAL in names.hf_classes for name in classes for end in HEADLESS):
            return key, False
    known = families.KNOWN_ARCHITECTURES.values()
    if classes:
        classes = [name for family in known for name in (*family.hf_classes, *family.hf_wrappers)]
        config.unsupported("architectures", ", ".join(dict.fromkeys(classes)))
    config.unsupported("model_type", ", ".join(name for family in known for name in family.hf_types))


def _num_labels(config: Values) -> int:
    """Of a classifier: transformers' default is 2."""
    if not any(name.endswith(CLASSIFIER) for name in config.texts("architectures")):
        return 0
    labels = config.inner("id2label")
    return config.integer("num_labels", 2 if labels is None else len(labels.values), at_most=MAX_SIZE)


def _with_defaults(config: Values, family: FamilyFiles) -> Values:
    """The text model's values, with the family's defaults for missing keys. A null stays a null."""
    return Values(config.source, dict(family.hf_defaults) | dict(text_values(config).values))


def _head_dim(values: Values, key: str, hidden_size: int, num_heads: int) -> int:
    if values.get(key) is None and hidden_size % num_heads != 0:
        values.refuse("hidden_size", f"a multiple of num_attention_heads ({num_heads}) where {key} is not given")
    head_dim = values.integer(key, hidden_size // num_heads, at_most=MAX_SIZE)
    if head_dim % 2 != 0:
        raise ModelError(f"{values.source}: {key} is {head_dim}: rotary embeddings need an even number")
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
        name = values.optional_text(key)
        if name is not None and ACTIVATIONS.get(name) != family.activation:
            values.unsupported(key, ", ".join(one for one, ours in ACTIVATIONS.items() if ours == family.activation))
    for key in ("attention_bias", "mlp_bias"):
        if key not in family.hf_biases and values.flag(key):
            values.unsupported(key, "false (no biases)")
    if not values.flag("is_causal", default=True):
        values.unsupported("is_causal", "true (causal attention)")
    if values.get("use_bidirectional_attention") not in (None, False, "vision"):  # text is causal with "vision", too
        values.unsupported("use_bidirectional_attention", "false (causal attention)")
    _refuse_partial_rope(values, family)
    for key in SOFTCAPS:
        if key not in family.softcaps and values.get(key) is not None:
            values.unsupported(key, "null")


# --- Windows -----------------------------------------------------------------------------------------------------


def _windows(values: Values, family: FamilyFiles, num_layers: int) -> tuple[int | None, tuple[bool, ...]]:
    """ModelConfig's `window` and `windowed`. A window that holds every position counts as none, unless windowed layers
    differ in their rope too."""
    kinds = _layer_types(values, family, num_layers)
    if not values.flag("use_sliding_window", default=True):
        return None, ()
    if kinds is not None and WINDOWED in kinds and family.hf_windows != "by layer":
        values.unsupported("layer_types", f"{FULL} in every layer")
    window = values.optional_integer("sliding_window")
    is_narrow = window is not None and window < values.integer("max_position_embeddings")
    if is_narrow and family.hf_windows is None:
        values.unsupported("sliding_window", "null (full attention)")
    if not is_narrow and not family.has_local_rope:
        return None, ()
    windowed = _windowed_layers(values, family, kinds, num_layers)
    return (values.integer("sliding_window"), shortest_period(windowed)) if any(windowed) else (None, ())


def _layer_types(values: Values, family: FamilyFiles, num_layers: int) -> list[str] | None:
    kinds = values.get("layer_types")
    if kinds is None:
        return None
    known = (FULL, family.hf_recurrent or WINDOWED)
    if not isinstance(kinds, list) or any(kind not in known for kind in kinds):
        values.unsupported("layer_types", f"a list of {' and '.join(known)}")
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


def _ropes(values: Values, family: FamilyFiles, head_dim: int) -> tuple[Rope, Rope | None]:
    """The rope of layers, and that of windowed layers if theirs differs."""
    if not family.has_local_rope:
        rope = read_rope(values, head_dim, family.rope_aliases)
        return replace(rope, is_interleaved=family.interleaves_rope), None
    full, local = (read_rope_by_layer(values, head_dim, kind, family.local_rope_theta) for kind in (FULL, WINDOWED))
    return full, local


def _refuse_partial_rope(values: Values, family: FamilyFiles) -> None:
    """The classes of other families rotate whole heads whatever the file says."""
    places = (values, *(values.inner(key) or values for key in ("rope_scaling", "rope_parameters")))
    for place in places:
        nested = [place.inner(key) for key, value in place.values.items() if isinstance(value, dict)]
        for rope in (place, *(inner for inner in nested if inner is not None)):
            if not family.has_partial_rope and rope.get("partial_rotary_factor") not in (None, 1, 1.0):
                rope.unsupported("partial_rotary_factor", "1.0")


def _dtype(values: Values) -> str:
    key = "dtype" if values.get("dtype") is not None else "torch_dtype"
    dtype = (values.optional_text(key) or "float32").removeprefix("torch.")
    if dtype not in DTYPES:
        values.unsupported(key, ", ".join(DTYPES))
    return dtype
