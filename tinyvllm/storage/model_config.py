"""What a model's own files say of it: config.json and generation_config.json, or a GGUF file's metadata."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from tinyvllm.config import DTYPES, GenerationDefaults, ModelConfig, ModelFiles, RopeScaling
from tinyvllm.errors import ModelError, UnsupportedModelError
from tinyvllm.storage.gguf_file import GGUFFile


@dataclass(frozen=True)
class FamilyNames:
    """What the formats call the models of one family."""

    hf_classes: tuple[str, ...]  # config.json's `architectures`
    hf_types: tuple[str, ...]  # config.json's `model_type`, asked where there is no class
    gguf: tuple[str, ...]  # general.architecture


# By the registry's key; a further family is a line here. Mistral without a sliding window is llama's computation.
KNOWN_ARCHITECTURES: dict[str, FamilyNames] = {
    "llama": FamilyNames(("LlamaForCausalLM", "MistralForCausalLM"), ("llama", "mistral"), ("llama",)),
    "qwen3": FamilyNames(("Qwen3ForCausalLM",), ("qwen3",), ("qwen3",)),
}
ROPE_KINDS = ("default", "linear", "llama3")  # config.json's rope types
GGUF_ROPE_KINDS = ("none", "linear")  # {arch}.rope.scaling.type; llama3's scaling comes as the tensor rope_freqs.weight
ROPE_FREQS = "rope_freqs.weight"


def read_model_config(files: ModelFiles) -> ModelConfig:
    """Raises UnsupportedModelError for what cannot be run, ModelError for values that are missing or make no sense."""
    if files.kind == "gguf":
        return _from_gguf(GGUFFile(files.path), files.name)
    path = files.path / "config.json"
    return _from_hf(Values(path, read_json(path)), files.name)


def read_generation_defaults(files: ModelFiles) -> GenerationDefaults:
    """Sampling values that the model's authors recommend, and every id that ends an answer, the format's own first."""
    if files.kind == "gguf":
        values = Values(files.path, GGUFFile(files.path).metadata)
        eos_keys = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")
        return _generation_defaults(
            values,
            "general.sampling.",
            "temp",
            "penalty_repeat",
            tuple(i for key in eos_keys for i in values.token_ids(key)),
        )
    config_path, path = files.path / "config.json", files.path / "generation_config.json"
    values = Values(path, read_json(path) if path.is_file() else {})
    eos_ids = values.token_ids("eos_token_id")
    if config_path.is_file():
        eos_ids += Values(config_path, read_json(config_path)).token_ids("eos_token_id")
    return _generation_defaults(values, "", "temperature", "repetition_penalty", eos_ids)


def _generation_defaults(
    values: Values, prefix: str, temperature_key: str, repetition_key: str, eos_ids: tuple[int, ...]
) -> GenerationDefaults:
    return GenerationDefaults(
        temperature=values.optional_number(prefix + temperature_key),
        top_p=values.optional_number(prefix + "top_p"),
        top_k=values.optional_integer(prefix + "top_k", at_least=-1),
        min_p=values.optional_number(prefix + "min_p"),
        eos_ids=tuple(dict.fromkeys(eos_ids)),
        repetition_penalty=values.optional_number(prefix + repetition_key),
        typical_p=values.optional_number(prefix + "typical_p"),
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object. Raises ModelError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read {path}: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds a {type(value).__name__}, not a JSON object")
    return value


class Values:
    """Named values of one file, checked as they are asked for: an error names the file, the key and the value.

    A key with the value null counts as absent.
    """

    def __init__(self, source: Path, values: Mapping[str, Any]) -> None:
        self.source = source
        self.values = values

    def get(self, key: str) -> Any:
        return self.values.get(key)

    def refuse(self, key: str, limit: str) -> NoReturn:
        if self.get(key) is None:
            raise ModelError(f"{self.source} has no {key}: it must be {limit}")
        raise ModelError(f"{self.source}: {key} is {self.get(key)!r}: it must be {limit}")

    def unsupported(self, key: str, known: str) -> NoReturn:
        raise UnsupportedModelError(
            f"{self.source}: {key} is {self.get(key)!r}, which is not supported; known: {known}"
        )

    def optional_integer(self, key: str, at_least: int = 1) -> int | None:
        value = self.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
            self.refuse(key, f"a whole number of at least {at_least}")
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.optional_integer(key)
        if value is None:
            value = default
        if value is None:
            self.refuse(key, "a whole number of at least 1")
        return value

    def optional_number(self, key: str) -> float | None:
        value = self.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
            self.refuse(key, "a number that is not negative")
        return float(value)

    def positive(self, key: str, default: float | None = None) -> float:
        value = self.optional_number(key)
        if value is None:
            value = default
        if not value:
            self.refuse(key, "a number above 0")
        return value

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            self.refuse(key, "true or false")
        return value

    def token_ids(self, key: str) -> tuple[int, ...]:
        """An id, a list of ids or nothing."""
        value = self.get(key)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if any(isinstance(item, bool) or not isinstance(item, int) or item < 0 for item in ids):
            self.refuse(key, "a token id or a list of them")
        return tuple(ids)

    def inner(self, key: str) -> Values | None:
        """An object inside this one."""
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            self.refuse(key, "an object")
        return Values(self.source, value)


# --- Hugging Face ------------------------------------------------------------------------------------------------


def _from_hf(values: Values, name: str) -> ModelConfig:
    architecture = _hf_architecture(values)
    _refuse_hf_variants(values)
    hidden_size = values.integer("hidden_size")
    num_heads = values.integer("num_attention_heads")
    if values.get("head_dim") is None and hidden_size % num_heads != 0:
        values.refuse("hidden_size", f"a multiple of num_attention_heads ({num_heads}) where head_dim is not given")
    head_dim = values.integer("head_dim", hidden_size // num_heads)
    if head_dim % 2 != 0:
        raise ModelError(f"{values.source}: head_dim is {head_dim}: rotary embeddings need an even number")
    num_kv_heads = values.integer("num_key_value_heads", num_heads)
    if num_heads % num_kv_heads != 0:
        values.refuse("num_key_value_heads", f"a divisor of num_attention_heads ({num_heads})")
    rope_theta, rope_scaling = _hf_rope(values)
    return ModelConfig(
        architecture=architecture,
        num_layers=values.integer("num_hidden_layers"),
        hidden_size=hidden_size,
        ffn_size=values.integer("intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        vocab_size=values.integer("vocab_size"),
        max_position=values.integer("max_position_embeddings"),
        rope_theta=rope_theta,
        norm_eps=values.positive("rms_norm_eps", 1e-6),
        tie_embeddings=values.flag("tie_word_embeddings"),
        rope_scaling=rope_scaling,
        dtype=_hf_dtype(values),
        name=name,
    )


def _hf_architecture(values: Values) -> str:
    classes, model_type = values.get("architectures") or [], values.get("model_type")
    for key, names in KNOWN_ARCHITECTURES.items():
        if any(name in names.hf_classes for name in classes) or (not classes and model_type in names.hf_types):
            return key
    known = ", ".join(name for names in KNOWN_ARCHITECTURES.values() for name in names.hf_classes)
    values.unsupported("architectures" if classes else "model_type", known)


def _refuse_hf_variants(values: Values) -> None:
    """Refuse settings that would change the computation, where running on would give wrong tokens."""
    if values.get("hidden_act") not in (None, "silu"):
        values.unsupported("hidden_act", "silu")
    for key in ("attention_bias", "mlp_bias"):
        if values.flag(key):
            values.unsupported(key, "false (no biases)")
    if values.get("partial_rotary_factor") not in (None, 1, 1.0):
        values.unsupported("partial_rotary_factor", "1.0")
    _refuse_hf_windows(values)
    if values.get("quantization_config") is not None:
        values.unsupported(
            "quantization_config", "none (float32, float16 or bfloat16 weights), or a GGUF file of the model"
        )


def _refuse_hf_windows(values: Values) -> None:
    """Refuse layers that attend to a window. Qwen states one that `use_sliding_window` switches off; `layer_types`
    (transformers 5) says it of each layer."""
    kinds = values.get("layer_types")
    if kinds is not None and (not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds)):
        values.unsupported("layer_types", "full_attention in every layer")
    window = values.optional_integer("sliding_window") or math.inf
    if values.flag("use_sliding_window", default=True) and window < values.integer("max_position_embeddings"):
        values.unsupported("sliding_window", "null (full attention)")


def _hf_rope(values: Values) -> tuple[float, RopeScaling | None]:
    """Theta and scaling, from `rope_parameters` (transformers 5) or from `rope_theta` and `rope_scaling`."""
    rope = values.inner("rope_parameters") or values.inner("rope_scaling") or Values(values.source, {})
    theta = rope.positive("rope_theta", values.positive("rope_theta", 10000.0))
    key = "rope_type" if rope.get("rope_type") is not None else "type"
    kind = rope.get(key) or "default"
    if kind not in ROPE_KINDS:
        rope.unsupported(key, ", ".join(ROPE_KINDS))
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, RopeScaling("linear", rope.positive("factor"))
    low, high = rope.positive("low_freq_factor"), rope.positive("high_freq_factor")
    if low >= high:
        rope.refuse("low_freq_factor", f"below high_freq_factor ({high})")
    original = rope.integer("original_max_position_embeddings")
    return theta, RopeScaling("llama3", rope.positive("factor"), low, high, original)


def _hf_dtype(values: Values) -> str:
    key = "dtype" if values.get("dtype") is not None else "torch_dtype"
    dtype = values.get(key) or "float32"
    if dtype not in DTYPES:
        values.unsupported(key, ", ".join(DTYPES))
    return str(dtype)


# --- GGUF --------------------------------------------------------------------------------------------------------


def _from_gguf(file: GGUFFile, name: str) -> ModelConfig:
    values = Values(file.path, file.metadata)
    architecture = _gguf_architecture(values)
    prefix = f"{values.get('general.architecture')}."
    _refuse_gguf_variants(values, prefix)
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ModelError(f"{file.path} has no matrix token_embd.weight: it holds no complete language model")
    num_heads = values.integer(prefix + "attention.head_count")
    num_kv_heads = values.integer(prefix + "attention.head_count_kv", num_heads)
    if num_heads % num_kv_heads != 0:
        values.refuse(prefix + "attention.head_count_kv", f"a divisor of attention.head_count ({num_heads})")
    head_dim = _gguf_head_dim(values, prefix, num_heads)
    return ModelConfig(
        architecture=architecture,
        num_layers=values.integer(prefix + "block_count"),
        hidden_size=values.integer(prefix + "embedding_length"),
        ffn_size=values.integer(prefix + "feed_forward_length"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        vocab_size=embedding.shape[0],
        max_position=values.integer(prefix + "context_length"),
        rope_theta=values.positive(prefix + "rope.freq_base", 10000.0),
        norm_eps=values.positive(prefix + "attention.layer_norm_rms_epsilon"),
        tie_embeddings="output.weight" not in file.tensors,
        rope_scaling=_gguf_rope_scaling(values, prefix),
        rope_divisors=_gguf_rope_divisors(file, head_dim),
        dtype=_gguf_dtype(file),
        name=name,
    )


def _gguf_architecture(values: Values) -> str:
    for key, names in KNOWN_ARCHITECTURES.items():
        if values.get("general.architecture") in names.gguf:
            return key
    known = ", ".join(name for names in KNOWN_ARCHITECTURES.values() for name in names.gguf)
    values.unsupported("general.architecture", known)


def _refuse_gguf_variants(values: Values, prefix: str) -> None:
    """Refuse settings that would change the computation, where running on would give wrong tokens."""
    if values.optional_integer(prefix + "expert_count", at_least=0):
        values.unsupported(prefix + "expert_count", "0 (no experts)")
    window = values.optional_integer(prefix + "attention.sliding_window", at_least=0)
    if window and window < values.integer(prefix + "context_length"):
        values.unsupported(prefix + "attention.sliding_window", "0 (full attention)")


def _gguf_head_dim(values: Values, prefix: str, num_heads: int) -> int:
    hidden_size = values.integer(prefix + "embedding_length")
    key = prefix + "attention.key_length"
    if values.get(key) is None and hidden_size % num_heads != 0:
        values.refuse(prefix + "embedding_length", f"a multiple of attention.head_count ({num_heads})")
    head_dim = values.integer(key, hidden_size // num_heads)
    if head_dim % 2 != 0:
        raise ModelError(f"{values.source}: heads have {head_dim} values: rotary embeddings need an even number")
    for other in ("attention.value_length", "rope.dimension_count"):
        if values.integer(prefix + other, head_dim) != head_dim:
            values.unsupported(prefix + other, f"{head_dim} (the length of a head's key)")
    return head_dim


def _gguf_rope_scaling(values: Values, prefix: str) -> RopeScaling | None:
    kind = values.get(prefix + "rope.scaling.type") or "none"
    if kind not in GGUF_ROPE_KINDS:
        values.unsupported(prefix + "rope.scaling.type", ", ".join(GGUF_ROPE_KINDS))
    return RopeScaling("linear", values.positive(prefix + "rope.scaling.factor")) if kind == "linear" else None


def _gguf_rope_divisors(file: GGUFFile, head_dim: int) -> tuple[float, ...] | None:
    tensor = file.tensors.get(ROPE_FREQS)
    if tensor is None:
        return None
    if tensor.ggml_type != "F32" or tensor.shape != (head_dim // 2,):
        raise ModelError(
            f"{file.path}: {ROPE_FREQS} is {tensor.ggml_type} of shape {tensor.shape}, not F32 of ({head_dim // 2},)"
        )
    return tuple(tensor.data.view(np.float32).tolist())


def _gguf_dtype(file: GGUFFile) -> str:
    """The type of the unquantised matrices; float16 where all are quantised, which is that of the blocks' scales."""
    kinds = {tensor.ggml_type for tensor in file.tensors.values() if len(tensor.shape) == 2}
    if "BF16" in kinds:
        return "bfloat16"
    return "float32" if kinds == {"F32"} else "float16"
