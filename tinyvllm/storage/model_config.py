"""What a model's own files say of it: config.json and generation_config.json, or a GGUF file's metadata."""

from __future__ import annotations

from dataclasses import replace

from tinyvllm.config import MIN_POSITIVE, GenerationDefaults, ModelConfig, ModelFiles
from tinyvllm.storage.gguf_config import read_gguf_config
from tinyvllm.storage.gguf_file import GGUFFile
from tinyvllm.storage.gguf_keys import token_id_below
from tinyvllm.storage.hf_config import DTYPE_KEYS, read_hf_config, text_values
from tinyvllm.storage.sentence_transformers import HEAD_NAME, read_pooling, tensor_names
from tinyvllm.storage.stored_dtype import stored_dtype
from tinyvllm.storage.strict_json import read_json, read_json_if_present
from tinyvllm.storage.values import MAX_SIZE, Values


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
        num_tokens = len(values.texts("tokenizer.ggml.tokens"))
        stated = (
            token_id_below(values, f"tokenizer.ggml.{name}_token_id", num_tokens) for name in ("eos", "eot", "eom")
        )
        return _generation_defaults(
            values,
            "general.sampling.",
            "temp",
            "penalty_repeat",
            tuple(token_id for token_id in stated if token_id is not None),
        )
    config_path, path = files.path / "config.json", files.path / "generation_config.json"
    values = Values(path, read_json_if_present(path))
    config = Values(config_path, read_json_if_present(config_path))
    text = text_values(config)
    vocab_size = text.optional_integer("vocab_size", at_most=MAX_SIZE)
    for place in (values, config, text):
        place.token_ids("bos_token_id", vocab_size)  # unused, since the tokenizer's counts, but checked
    eos_ids = values.token_ids("eos_token_id", vocab_size)
    eos_ids += config.token_ids("eos_token_id", vocab_size) or text.token_ids("eos_token_id", vocab_size)
    return _generation_defaults(values, "", "temperature", "repetition_penalty", eos_ids)


def _generation_defaults(
    values: Values, prefix: str, temperature_key: str, repetition_key: str, eos_ids: tuple[int, ...]
) -> GenerationDefaults:
    """Limits are those of requests (config.py:SamplingParams), which would all be refused for values beyond them."""
    return GenerationDefaults(
        temperature=values.optional_number(prefix + temperature_key, at_most=100),
        top_p=_above_0(values, prefix + "top_p", at_most=1),
        top_k=values.optional_integer(prefix + "top_k", at_least=-1),
        min_p=values.optional_number(prefix + "min_p", at_most=1),
        eos_ids=tuple(dict.fromkeys(eos_ids)),
        repetition_penalty=_above_0(values, prefix + repetition_key, at_most=100),
        typical_p=_above_0(values, prefix + "typical_p", at_most=1),
    )


def _above_0(values: Values, key: str, at_most: float) -> float | None:
    return None if values.get(key) is None else values.positive(key, at_least=MIN_POSITIVE, at_most=at_most)
