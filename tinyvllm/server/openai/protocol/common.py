"""What several routes share: usage, logprobs of tokens, models, errors."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field

from tinyvllm.errors import RequestError

# What a parser needs of an output's special tokens: nothing, their text, or their text after SPECIAL_MARK
SpecialTokens = Literal["skip", "keep", "mark"]


def params_for(special_tokens: SpecialTokens) -> dict[str, Any]:
    """The fields of SamplingParams that make the engine's text have what the parser needs."""
    if special_tokens == "skip":
        return {}
    return {"skip_special_tokens": False, "mark_special_tokens": special_tokens == "mark"}


def unsupported(param: str, value: object, remedy: str) -> RequestError:
    """The error for a field that is known but not supported."""
    shown = ascii(value)
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    return RequestError(f"{param}={shown} is not supported: {remedy}", param=param)


def optional(default: Any = None) -> Any:
    """A field that is left out of the answer while it is None, as clients expect."""
    return Field(default=default, exclude_if=lambda value: value is None)


class PromptLogprob(BaseModel):
    """vLLM's: the logprob of a token of the prompt, or of another one in its place."""

    logprob: float
    rank: int | None
    decoded_token: str


# One item per token of the prompt: the token's own and the likeliest, by token id. None for the first token.
PromptLogprobs = list[dict[int, PromptLogprob] | None]


class PromptTokensDetails(BaseModel):
    cached_tokens: int


class CompletionTokensDetails(BaseModel):
    reasoning_tokens: int


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails | None = optional()


def effort_arguments(effort: str | None) -> dict[str, Any]:
    """The template's variables for an effort of reasoning. "none" also turns reasoning off in templates that know only
    `enable_thinking`."""
    if effort is None:
        return {}
    return {"reasoning_effort": effort} | ({"enable_thinking": False} if effort == "none" else {})


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "tinyvllm"
    root: str
    parent: str | None = None
    max_model_len: int


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class Version(BaseModel):
    version: str


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """The body of every answer with a status of 400 or above."""

    error: ErrorDetail
