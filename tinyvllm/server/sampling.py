"""Makes SamplingParams from a request's settings, for every API."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from tinyvllm.config import GenerationDefaults, SamplingParams

# What a parser needs of an output's special tokens: nothing, their text, or their text after SPECIAL_MARK
SpecialTokens = Literal["skip", "keep", "mark"]

# Settings for which the model's own files may recommend a value.
_RECOMMENDED = ("temperature", "top_p", "top_k", "min_p", "typical_p", "repetition_penalty")


def sampling_params(
    given: Mapping[str, Any],
    defaults: GenerationDefaults,
    *,
    max_tokens: int | None,
    special_tokens: SpecialTokens = "skip",
) -> SamplingParams:
    """The request's settings, else the model's, else vLLM's. Raises RequestError, naming the field.

    given: other fields of SamplingParams; None: not in the request. max_tokens: None for as many as fit.
    special_tokens: how the output's parser needs them. "skip": it needs none, so the request decides.
    """
    recommended = {name: getattr(defaults, name) for name in _RECOMMENDED}
    settings: dict[str, Any] = {"max_tokens": max_tokens}
    for name, value in [*recommended.items(), *given.items()]:
        if value is not None:
            settings[name] = tuple(value) if isinstance(value, list) else value
    return SamplingParams(**settings | params_for(special_tokens))


def params_for(special_tokens: SpecialTokens) -> dict[str, Any]:
    """The fields of SamplingParams that keep the special tokens that the parser needs in the text."""
    if special_tokens == "skip":
        return {}
    return {"skip_special_tokens": False, "mark_special_tokens": special_tokens == "mark"}
