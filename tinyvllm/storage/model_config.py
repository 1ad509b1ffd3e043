"""What a model's own files say of it: config.json and generation_config.json, or a GGUF file's metadata."""

from __future__ import annotations

from dataclasses import replace

from tinyvllm.config import GenerationDefaults, ModelConfig, ModelFiles
from tinyvllm.storage.gguf_config import read_gguf_config
from tinyvllm.storage.gguf_file import GGUFFile
from tinyvllm.storage.hf_config import DTYPE_KEYS, read_hf_config, text_values
from tinyvllm.storage.sentence_transformers import HEAD_NAME, read_pooling, tensor_names
from tinyvllm.storage.stored_dtype import stored_dtype
from tinyvllm.storage.values import Values, read_json


def read_model_config(files: ModelFiles) -> ModelConfig:
    """Raises UnsupportedModelError for what cannot be run, ModelError for values that are missing or make no sense."""
    if files.kind == "gguf":
        return read_gguf_config(GGUFFile(files.path), files.name)
    path = files.path / "config.json"
    values = Values(path, read_json(path))
    config = read_hf_config(values, files.name)
    if all(text_values(values).get(key) is None for key in DTYPE_KEYS):
        config = replace(config, dtype=stored_dtype(files.path) or config.dtype)
    if config.dtype == "bfloat16" and _is_quantized(values) and not config.overflows_float16:
        # as for GGUF files: few dense matrices are left, and the kernels of quantized ones are made for float16
        config = replace(config, dtype="float16")
    pooling = read_pooling(files.path)
    if pooling is not None and not config.tie_embeddings and HEAD_NAME not in tensor_names(files.path):
        config = replace(config, has_head=False, tie_embeddings=True)  # saved with its base model's tensors alone
    return replace(config, pooling=pooling)


def _is_quantized(values: Values) -> bool:
    """Whether config.json says that matrices are quantized, in any format."""
    return any(values.get(key) is not None for key in ("quantization", "quantization_config"))


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
        config = Values(config_path, read_json(config_path))
        eos_ids += config.token_ids("eos_token_id") or text_values(config).token_ids("eos_token_id")
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
