"""What several routes share: usage, logprobs of tokens, models, errors."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field

from tinyvllm.errors import RequestError


def refuse(param: str, value: object, remedy: str) -> RequestError:
    """The error of a field that is understood and not supported."""
    shown = ascii(value)
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    return RequestError(f"{param}={shown} is not supported: {remedy}", param=param)


def optional(default: Any = None) -> Any:
    """A field that is left out of the answer while it is None, as clients expect of it."""
    return Field(default=default, exclude_if=lambda value: value is None)


class PromptLogprob(BaseModel):
    """vLLM's: how likely a token of the prompt was, or another in its place."""

    logprob: float
    rank: int | None
    decoded_token: str


# One a token of the prompt, None for the first: the token's own and the likeliest, by their ids.
PromptLogprobs = list[dict[int, PromptLogprob] | None]


class PromptTokensDetails(BaseModel):
    cached_tokens: int


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


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
    """The body of every answer of 400 and above."""

    error: ErrorDetail
