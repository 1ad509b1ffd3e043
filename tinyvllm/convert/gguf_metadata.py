"""A model's settings as GGUF metadata, under llama.cpp's keys: what storage/gguf_config.py reads."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from tinyvllm.config import ModelConfig, Rope
from tinyvllm.errors import UnsupportedModelError
from tinyvllm.model.rope import inverse_frequencies
from tinyvllm.storage.gguf_keys import size_keys
from tinyvllm.storage.gguf_rope import DIVISORS, LONG, SHORT

# general.architecture by the registry's key, of the families whose files llama.cpp was seen to read (tests/convert)
ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma2": "gemma2",
    "gemma3": "gemma3",
    "smollm3": "smollm3",
    "granite": "granite",
    "glm4": "glm4",
}
QUANTIZATION_VERSION = 2
# Fields that say how a file stores a model rather than what it computes, or that GGUF states in another way
OWN_FIELDS = ("architecture", "name", "dtype", "norm_offset", "overflows_float16", "biases")
LONG_CONTEXT = 1 << 30  # tokens: longer than any that ropes distinguish


def architecture_of(config: ModelConfig) -> str:
    """Raises UnsupportedModelError for a family without an entry in ARCHITECTURES."""
    if config.architecture not in ARCHITECTURES:
        other = "" if config.experts else ", or --to mlx-4"
        raise UnsupportedModelError(
            f"{config.architecture} models cannot be written as GGUF here; known: {', '.join(ARCHITECTURES)}. Use "
            f"llama.cpp's converter, whose file can then be quantized{other}"
        )
    return ARCHITECTURES[config.architecture]


def settings_metadata(config: ModelConfig) -> dict[str, Any]:
    """general.* and {arch}.* keys, without the file type."""
    architecture = architecture_of(config)
    sizes = size_keys(config) | {"rope.dimension_count": config.rope.num_dims or config.head_dim}
    general = {"general.architecture": architecture, "general.type": "model", "general.name": config.name}
    chosen = general | {f"{architecture}.{key}": value for key, value in (sizes | _optional(config)).items()}
    return chosen | {"general.quantization_version": QUANTIZATION_VERSION}


def _optional(config: ModelConfig) -> dict[str, Any]:
    """Settings that most models lack."""
    found: dict[str, Any] = {}
    if config.window is not None:
        found["attention.sliding_window"] = config.window
    if config.local_rope is not None:
        found["rope.freq_base_swa"] = config.local_rope.theta
    if config.score_softcap is not None:
        found["attn_logit_softcapping"] = config.score_softcap
    if config.logit_softcap is not None:
        found["final_logit_softcapping"] = config.logit_softcap
    if config.architecture == "granite":
        found |= {
            "attention.scale": config.layers[0].scale,
            "embedding_scale": config.embedding_scale,
            "residual_scale": config.residual_scale,
            "logit_scale": 1 / config.logit_scale,
        }
    return found | _rope_scaling(config.rope)


def _rope_scaling(rope: Rope) -> dict[str, Any]:
    """Kinds that have keys; llama3's and longrope's are tensors."""
    scaling = rope.scaling
    if scaling is not None and scaling.kind == "longrope":
        return {
            "rope.scaling.original_context_length": scaling.original_max_position,
            "rope.scaling.attn_factor": rope.attention_factor,
        }
    if scaling is None or scaling.kind not in ("linear", "yarn"):
        return {} if rope.attention_factor == 1.0 else {"rope.scaling.attn_factor": rope.attention_factor}
    found: dict[str, Any] = {"rope.scaling.type": scaling.kind, "rope.scaling.factor": scaling.factor}
    if scaling.kind == "yarn":
        found |= {
            "rope.scaling.original_context_length": scaling.original_max_position,
            "rope.scaling.yarn_beta_fast": scaling.beta_fast,
            "rope.scaling.yarn_beta_slow": scaling.beta_slow,
            "rope.scaling.yarn_attn_factor": rope.attention_factor,
        }
    return found


def rope_tensors(config: ModelConfig) -> dict[str, np.ndarray]:
    """Tensors that say how a rope is stretched: what each frequency is divided by, (num_dims / 2,) float32."""
    rope, scaling = config.rope, config.rope.scaling
    if scaling is not None and scaling.kind == "longrope":
        return {SHORT: np.array(scaling.short_factors, np.float32), LONG: np.array(scaling.long_factors, np.float32)}
    if rope.divisors is None and (scaling is None or scaling.kind != "llama3"):
        return {}
    plain = dataclasses.replace(rope, scaling=None, divisors=None)
    divisors = inverse_frequencies(plain, config.head_dim) / inverse_frequencies(rope, config.head_dim)
    return {DIVISORS: divisors.astype(np.float32)}


def check_same_model(source: ModelConfig, written: ModelConfig, target: str) -> None:
    """Raise UnsupportedModelError if the written file says another model than the source's, naming the setting: some
    settings of one format have no place in another, and without them the tokens would be wrong."""
    for field in dataclasses.fields(ModelConfig):
        ours, theirs = getattr(source, field.name), getattr(written, field.name)
        if field.name in ("rope", "local_rope"):
            is_same = _same_rope(ours, theirs, source.head_dim)
        else:
            is_same = field.name in OWN_FIELDS or _same(ours, theirs)
        if not is_same:
            raise UnsupportedModelError(
                f"{field.name} is {ours!r}, which {target} cannot say: a reader would take it for {theirs!r}. Choose a "
                "target in the source's own format"
            )


def _same(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, float) and isinstance(theirs, float):  # GGUF has them in float32
        return math.isclose(ours, theirs, rel_tol=1e-6)
    return bool(ours == theirs)


def _same_rope(ours: Rope | None, theirs: Rope | None, head_dim: int) -> bool:
    """Whether two ropes rotate alike, in short contexts and in long ones, however their files say it."""
    if ours is None or theirs is None:
        return ours is theirs
    divisors = ours.divisors or theirs.divisors
    if divisors is not None:  # of heads that may be larger than those in layers with a window (Gemma 4)
        head_dim = 2 * len(divisors)
    kinds = [(rope.num_dims or head_dim, rope.is_interleaved) for rope in (ours, theirs)]
    if kinds[0] != kinds[1] or not _same(ours.attention_factor, theirs.attention_factor):
        return False
    for length in (0, LONG_CONTEXT):
        mine, other = (inverse_frequencies(rope, head_dim, length) for rope in (ours, theirs))
        if not np.allclose(mine, other, rtol=1e-5, atol=0):
            return False
    return True
