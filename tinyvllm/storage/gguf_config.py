"""ModelConfig from a GGUF file's metadata, with the meaning that llama.cpp gives it."""

from __future__ import annotations

import numpy as np

from tinyvllm.config import ModelConfig, Rope, RopeScaling
from tinyvllm.errors import ModelError
from tinyvllm.storage import families
from tinyvllm.storage.families import SOFTCAPS, FamilyFiles
from tinyvllm.storage.gguf_file import GGUFFile
from tinyvllm.storage.hf_config import shortest_period
from tinyvllm.storage.values import Values

GGUF_ROPE_KINDS = ("none", "linear")  # {arch}.rope.scaling.type; llama3's scaling comes as the tensor rope_freqs.weight
ROPE_FREQS = "rope_freqs.weight"


def read_gguf_config(file: GGUFFile, name: str) -> ModelConfig:
    """Raises UnsupportedModelError for what cannot be run, ModelError for values that are missing or make no sense."""
    architecture = _architecture(Values(file.path, file.metadata))
    family = families.KNOWN_ARCHITECTURES[architecture]
    prefix = f"{file.metadata['general.architecture']}."
    defaults = {prefix + key: value for key, value in family.gguf_defaults.items()}
    values = Values(file.path, defaults | dict(file.metadata), prefix)
    _refuse_variants(values, family)
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ModelError(f"{file.path} has no matrix token_embd.weight: it holds no complete language model")
    num_heads = values.integer("attention.head_count")
    num_kv_heads = values.integer("attention.head_count_kv", num_heads)
    if num_heads % num_kv_heads != 0:
        values.refuse("attention.head_count_kv", f"a divisor of attention.head_count ({num_heads})")
    head_dim = _head_dim(values, num_heads)
    num_layers, hidden_size = values.integer("block_count"), values.integer("embedding_length")
    window, windowed = _windows(values, family, num_layers)
    config = ModelConfig(
        architecture=architecture,
        num_layers=num_layers,
        hidden_size=hidden_size,
        ffn_size=values.integer("feed_forward_length"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        vocab_size=embedding.shape[0],
        max_position=values.integer("context_length"),
        rope_theta=values.positive("rope.freq_base", 10000.0),
        norm_eps=values.positive("attention.layer_norm_rms_epsilon"),
        tie_embeddings="output.weight" not in file.tensors,
        rope_scaling=_rope_scaling(values),
        rope_divisors=_rope_divisors(file, head_dim),
        dtype=_dtype(file),
        name=name,
        activation=family.activation,
        window=window,
        windowed=windowed,
        local_rope=_local_rope(values, family) if window is not None else None,
        score_scale=(hidden_size // num_heads) ** -0.5 if num_layers in family.gguf_wide_scale_layers else None,
        score_softcap=values.optional_number("attn_logit_softcapping") or None,
        logit_softcap=values.optional_number("final_logit_softcapping") or None,
        overflows_float16=family.overflows_float16,
    )
    return family.gguf_refine(config, values)


def _architecture(values: Values) -> str:
    for key, names in families.KNOWN_ARCHITECTURES.items():
        if values.get("general.architecture") in names.gguf:
            return key
    known = ", ".join(name for names in families.KNOWN_ARCHITECTURES.values() for name in names.gguf)
    values.unsupported("general.architecture", known)


def _refuse_variants(values: Values, family: FamilyFiles) -> None:
    """Refuse settings that would change the computation, where running on would give wrong tokens."""
    if values.optional_integer("expert_count", at_least=0):
        values.unsupported("expert_count", "0 (no experts)")
    for key in SOFTCAPS:
        if key not in family.softcaps and values.optional_number(key):
            values.unsupported(key, "0 (none)")


def _windows(values: Values, family: FamilyFiles, num_layers: int) -> tuple[int | None, tuple[bool, ...]]:
    """ModelConfig's `window` and `windowed`. A window that holds every position counts as none, unless windowed layers
    differ in their rope too."""
    key = "attention.sliding_window"
    window = values.optional_integer(key, at_least=0)
    is_narrow = window is not None and 0 < window < values.integer("context_length")
    if is_narrow and family.gguf_window_pattern is None:
        values.unsupported(key, "0 (full attention)")
    if not window or not (is_narrow or family.local_rope_theta is not None):
        return None, ()
    windowed = _windowed_layers(values, family.gguf_window_pattern or 0, num_layers)
    return (window, shortest_period(windowed)) if any(windowed) else (None, ())


def _windowed_layers(values: Values, pattern: int, num_layers: int) -> tuple[bool, ...]:
    """Of each layer, from a flag for each or a period (llama.cpp's set_swa_pattern)."""
    key = "attention.sliding_window_pattern"
    if isinstance(flags := values.get(key), list):
        if len(flags) != num_layers:
            values.refuse(key, f"a number, or one flag for each of {num_layers} layers")
        return tuple(bool(flag) for flag in flags)
    stated = values.optional_integer(key, at_least=0)
    period = pattern if stated is None else stated
    return tuple(period == 0 or layer % period < period - 1 for layer in range(num_layers))


def _local_rope(values: Values, family: FamilyFiles) -> Rope | None:
    if family.local_rope_theta is None:
        return None
    return Rope(values.positive("rope.freq_base_swa", family.local_rope_theta))


def _head_dim(values: Values, num_heads: int) -> int:
    hidden_size = values.integer("embedding_length")
    key = "attention.key_length"
    if values.get(key) is None and hidden_size % num_heads != 0:
        values.refuse("embedding_length", f"a multiple of attention.head_count ({num_heads})")
    head_dim = values.integer(key, hidden_size // num_heads)
    if head_dim % 2 != 0:
        raise ModelError(f"{values.source}: heads have {head_dim} values: rotary embeddings need an even number")
    for other in ("attention.value_length", "rope.dimension_count"):
        if values.integer(other, head_dim) != head_dim:
            values.unsupported(other, f"{head_dim} (the length of a head's key)")
    return head_dim


def _rope_scaling(values: Values) -> RopeScaling | None:
    kind = values.get("rope.scaling.type") or "none"
    if kind not in GGUF_ROPE_KINDS:
        values.unsupported("rope.scaling.type", ", ".join(GGUF_ROPE_KINDS))
    return RopeScaling("linear", values.positive("rope.scaling.factor")) if kind == "linear" else None


def _rope_divisors(file: GGUFFile, head_dim: int) -> tuple[float, ...] | None:
    tensor = file.tensors.get(ROPE_FREQS)
    if tensor is None:
        return None
    if tensor.ggml_type != "F32" or tensor.shape != (head_dim // 2,):
        raise ModelError(
            f"{file.path}: {ROPE_FREQS} is {tensor.ggml_type} of shape {tensor.shape}, not F32 of ({head_dim // 2},)"
        )
    return tuple(tensor.data.view(np.float32).tolist())


def _dtype(file: GGUFFile) -> str:
    """The type of the unquantized matrices; float16 where all are quantized, which is that of the blocks' scales."""
    kinds = {tensor.ggml_type for tensor in file.tensors.values() if len(tensor.shape) == 2}
    if "BF16" in kinds:
        return "bfloat16"
    return "float32" if kinds == {"F32"} else "float16"
