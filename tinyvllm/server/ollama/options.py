"""`options`: how a request samples, under Ollama's names. Null means the default.

The defaults are the model's own recommendations (generation_config.json, or general.sampling.* of a GGUF file), else
Ollama's. Options that only matter when a model is started cannot be set by a request here. They are ignored and, like
unknown ones, logged once for each name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from tinyvllm.config import MIN_POSITIVE, GenerationDefaults
from tinyvllm.errors import RequestError
from tinyvllm.server.notices import warn_once

# https://github.com/ollama/ollama/blob/v0.32.15/api/types.go, DefaultOptions
DEFAULTS = {"temperature": 0.8, "top_k": 40, "top_p": 0.9}
DEFAULT_NUM_KEEP = 4
MIN_NUM_CTX = 4

# Settings of the process that runs a model. Here they are flags of the server, or do not exist.
# fmt: off
_OF_THE_SERVER = frozenset((
    "num_batch", "num_gpu", "main_gpu", "num_thread", "use_mmap", "use_mlock", "numa", "low_vram", "f16_kv",
    "vocab_only", "logits_all", "draft_num_predict", "num_gqa", "embedding_only", "rope_frequency_base",
    "rope_frequency_scale",
))
# fmt: on


@dataclasses.dataclass(frozen=True)
class Options:
    """Checked options."""

    sampling: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # the given fields of SamplingParams
    num_predict: int | None = None  # maximum tokens of the answer; None: as many as fit
    num_ctx: int | None = None  # tokens of prompt and answer together; None: the server's context
    num_keep: int = DEFAULT_NUM_KEEP  # first tokens of a prompt that is cut; negative: all that fit


def with_defaults(recommended: GenerationDefaults) -> GenerationDefaults:
    """What the model's files recommend, completed by Ollama's defaults."""
    missing: dict[str, Any] = {name: value for name, value in DEFAULTS.items() if getattr(recommended, name) is None}
    return dataclasses.replace(recommended, **missing)


def read_options(given: Mapping[str, Any] | None) -> Options:
    """Raises RequestError for a value of the wrong type, naming the option."""
    found: dict[str, Any] = {}
    for name, value in (given or {}).items():
        if value is None:
            continue
        if name in _READERS:
            found[name] = _READERS[name](name, value)
        elif name not in _OF_THE_SERVER:
            warn_once("option %s is not supported here: ignored", name)
    sampling = {field: found[name] for name, field in _SAMPLING.items() if name in found}
    if found.get("repeat_last_n") == 0:  # penalties apply to no token
        for field in ("repetition_penalty", "presence_penalty", "frequency_penalty"):
            sampling[field] = 1.0 if field == "repetition_penalty" else 0.0
    elif "repeat_last_n" in found:
        warn_once("option %s is ignored: penalties apply to all tokens", "repeat_last_n")
    if sampling.get("seed", 0) < 0:  # in Ollama, a random one
        del sampling["seed"]
    if sampling.get("top_p") == 0.0:  # llama.cpp keeps the likeliest token
        sampling["top_p"], sampling["top_k"] = 1.0, 1
    num_predict, num_ctx = found.get("num_predict", -1), found.get("num_ctx", 0)
    return Options(
        sampling=sampling,
        num_predict=num_predict if num_predict > 0 else None,
        num_ctx=max(num_ctx, MIN_NUM_CTX) if num_ctx > 0 else None,
        num_keep=found.get("num_keep", DEFAULT_NUM_KEEP),
    )


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _wrong_type(name, "a number")
    try:
        return float(value)
    except OverflowError:
        raise _wrong_type(name, "a number") from None


def _integer(name: str, value: object) -> int:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not -(2**63) <= value < 2**63:
        raise _wrong_type(name, "an integer")
    return value


def _strings(name: str, value: object) -> list[str]:
    """A list of strings, or one string, which some clients send."""
    given = [value] if isinstance(value, str) else value
    if not isinstance(given, list) or not all(isinstance(text, str) for text in given):
        raise _wrong_type(name, "a list of strings")
    return [text for text in given if text]


def _share(name: str, value: object) -> float:
    """A probability; values above 1 mean 1."""
    return min(_number(name, value), 1.0)


def _penalty(name: str, value: object) -> float:
    """Checked here, because SamplingParams has another name for it."""
    number = _number(name, value)
    if not MIN_POSITIVE <= number <= 100.0:
        raise RequestError(
            f"option {name!r} is {number:g}: it must be at least {MIN_POSITIVE:g} and at most 100",
            param=f"options.{name}",
        )
    return number


def _wrong_type(name: str, kind: str) -> RequestError:
    return RequestError(f"option {name!r} must be {kind}", param=f"options.{name}")


_READERS: dict[str, Callable[[str, object], Any]] = {
    "temperature": _number,
    "top_k": _integer,
    "top_p": _share,
    "min_p": _number,
    "typical_p": _share,
    "seed": _integer,
    "stop": _strings,
    "repeat_penalty": _penalty,
    "presence_penalty": _number,
    "frequency_penalty": _number,
    "repeat_last_n": _integer,
    "num_predict": _integer,
    "num_ctx": _integer,
    "num_keep": _integer,
}
# Ollama's name -> SamplingParams'
_SAMPLING = {name: name for name in ("temperature", "top_k", "top_p", "min_p", "typical_p", "seed", "stop")}
_SAMPLING |= {"presence_penalty": "presence_penalty", "frequency_penalty": "frequency_penalty"}
_SAMPLING["repeat_penalty"] = "repetition_penalty"
