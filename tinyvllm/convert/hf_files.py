"""config.json and the tokenizer's files of a directory, copied from a Hugging Face directory or made of a GGUF file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, processors

from tinyvllm.config import ModelConfig, ModelFiles, Rope, RopeScaling
from tinyvllm.errors import UnsupportedModelError
from tinyvllm.model.rope import inverse_frequencies
from tinyvllm.storage import families
from tinyvllm.storage.gguf_file import GGUFFile
from tinyvllm.storage.hub import is_wanted
from tinyvllm.storage.model_config import read_generation_defaults
from tinyvllm.storage.values import read_json
from tinyvllm.text.chat import read_gguf_templates
from tinyvllm.text.gguf_tokenizer import read_gguf_tokenizer, read_special_texts
from tinyvllm.text.tokenizer_spec import SPACE_MARK, TokenizerSpec, byte_level_bytes

# Families whose settings can be told from a GGUF file, by the registry's key
FAMILIES = ("llama", "qwen2", "qwen3", "gemma3")
# What a directory may have besides WANTED that belongs to its tokenizer or its license
ALSO_COPIED = ("tokenizer.model", "vocab.json", "merges.txt", "LICENSE", "LICENSE.txt", "USE_POLICY.md")
LLAMA3_FACTORS = (2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
FULL, WINDOWED = "full_attention", "sliding_attention"


def copy_directory(source: Path, target: Path, edit: Callable[[dict[str, Any]], Mapping[str, Any]]) -> None:
    """The source's own files without weights. `edit` gives the values of config.json from the source's, without those
    of an earlier quantization."""
    for path in sorted(source.iterdir()):
        is_text = is_wanted(path.name) and not path.name.endswith((".safetensors", ".safetensors.index.json"))
        if (is_text or path.name in ALSO_COPIED) and path.name != "config.json":
            shutil.copyfile(path, target / path.name)
    config = read_json(source / "config.json")
    dropped = ("quantization", "quantization_config")
    write_json(target / "config.json", edit({key: value for key, value in config.items() if key not in dropped}))


def make_directory(source: ModelFiles, config: ModelConfig, target: Path, added: Mapping[str, Any]) -> None:
    """A directory's files besides weights, from a GGUF file. Raises UnsupportedModelError for an unknown family."""
    metadata = GGUFFile(source.path).metadata
    spec = read_gguf_tokenizer(metadata, source.path)
    eos_ids = read_generation_defaults(source).eos_ids or tuple(sorted(spec.eos_ids))
    stated = {"bos_token_id": spec.bos_id, "eos_token_id": list(eos_ids) if len(eos_ids) > 1 else spec.eos_id}
    settings = config_json(config) | {key: value for key, value in stated.items() if value is not None}
    write_json(target / "config.json", settings | dict(added))
    backend = _with_ends(spec)
    backend.save(str(target / "tokenizer.json"))
    tokenizer: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    tokenizer |= read_special_texts(metadata, source.path)
    templates = read_gguf_templates(metadata, source.path)
    if templates:
        named = [{"name": name, "template": text} for name, text in templates.items()]
        tokenizer["chat_template"] = templates["default"] if list(templates) == ["default"] else named
    write_json(target / "tokenizer_config.json", tokenizer)


def _with_ends(spec: TokenizerSpec) -> Backend:
    """The tokenizer with what a tokenizer.json has besides: the tokens at a text's ends, and how to decode."""
    backend = Backend.from_str(spec.backend.to_str())
    if spec.to_bytes is byte_level_bytes:
        backend.decoder = decoders.ByteLevel()
    else:
        strip = [decoders.Strip(" ", 1, 0)] if spec.strips_leading_space else []
        backend.decoder = decoders.Sequence(
            [decoders.Replace(SPACE_MARK, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
        )
    ends = {token_id: backend.id_to_token(token_id) for token_id in (*spec.prefix_ids, *spec.suffix_ids)}
    if ends:
        before, after = ([ends[token_id] for token_id in ids] for ids in (spec.prefix_ids, spec.suffix_ids))
        backend.post_processor = processors.TemplateProcessing(
            single=[*before, "$A", *after],
            pair=[*before, "$A", *after, *before, "$B:1", *after],
            special_tokens=[(text, token_id) for token_id, text in ends.items()],
        )
    return backend


def config_json(config: ModelConfig) -> dict[str, Any]:
    """A config.json that storage/hf_config.py, transformers and mlx-lm read as `config`."""
    if config.architecture not in FAMILIES:
        raise UnsupportedModelError(
            f"{config.architecture} models cannot be converted from GGUF to a directory; known: {', '.join(FAMILIES)}. "
            "Convert from the model's Hugging Face directory"
        )
    # in GGUF, Mistral is a llama with a window
    is_mistral = config.architecture == "llama" and config.window is not None
    family = families.KNOWN_ARCHITECTURES["mistral" if is_mistral else config.architecture]
    found: dict[str, Any] = {
        "architectures": [family.hf_classes[0]],
        "model_type": family.hf_types[0],
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_size,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope.theta,
        "rope_scaling": _rope_scaling(config),
        "tie_word_embeddings": config.tie_embeddings,
        "torch_dtype": config.dtype,
    }
    if config.architecture == "gemma3":
        return found | _gemma_keys(config)
    return found | {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False} | _window_keys(config)


def _window_keys(config: ModelConfig) -> dict[str, Any]:
    if config.window is None:
        return {}
    return {"sliding_window": config.window}


def _gemma_keys(config: ModelConfig) -> dict[str, Any]:
    found: dict[str, Any] = {
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "sliding_window": config.window or config.max_position,
        "layer_types": _layer_types(config),
        "query_pre_attn_scalar": (
            config.head_dim if config.score_scale is None else round(1 / config.score_scale / config.score_scale)
        ),
        "attn_logit_softcapping": config.score_softcap,
        "final_logit_softcapping": config.logit_softcap,
    }
    if config.local_rope is not None:
        found["rope_local_base_freq"] = config.local_rope.theta
    windowed = [kind == WINDOWED for kind in found["layer_types"]]
    if False in windowed:  # mlx-lm reads the period
        found["sliding_window_pattern"] = windowed.index(False) + 1
    return found


def _layer_types(config: ModelConfig) -> list[str]:
    return [FULL if kind.window is None else WINDOWED for kind in config.layers]


def _rope_scaling(config: ModelConfig) -> dict[str, Any] | None:
    scaling = _llama3_scaling(config) if config.rope.divisors is not None else config.rope.scaling
    if scaling is None:
        return None
    found: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "llama3":
        found |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
    if scaling.kind == "yarn":
        found |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
        found["attention_factor"] = config.rope.attention_factor
    if scaling.kind != "linear":
        found["original_max_position_embeddings"] = scaling.original_max_position
    return found


def _llama3_scaling(config: ModelConfig) -> RopeScaling:
    """The settings that give the divisors of a GGUF file, which has nothing else of them."""
    wanted = inverse_frequencies(config.rope, config.head_dim)
    for factor in LLAMA3_FACTORS:
        scaling = RopeScaling("llama3", factor, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=8192)
        found = inverse_frequencies(Rope(config.rope.theta, scaling), config.head_dim)
        if np.allclose(found, wanted, rtol=1e-5, atol=0):
            return scaling
    raise UnsupportedModelError(
        f"{config.name}: its rope_freqs.weight is not Llama 3's scaling with a known factor: convert from the model's "
        "Hugging Face directory"
    )


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
