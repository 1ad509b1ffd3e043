"""What several routes share: usage, logprobs of tokens, models."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field

from tinyvllm.errors import RequestError
from tinyvllm.server.notices import warn_once
from tinyvllm.server.shelf import LoadState

if TYPE_CHECKING:
    from tinyvllm.text.tokenizer import Tokenizer


def unsupported(param: str, value: object, remedy: str) -> RequestError:
    """The error for a field that is known but not supported."""
    shown = ascii(value)
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    return RequestError(f"{param}={shown} is not supported: {remedy}", param=param)


def refuse_unsupported_fields(
    extras: Mapping[str, object], refused: Mapping[str, tuple[object, ...]], ignored: Collection[str]
) -> None:
    """Raise RequestError for a field in `refused`, unless its value is one of those there, which request nothing. Log
    the names of fields in neither `refused` nor `ignored`, once each."""
    for name, value in extras.items():
        if name in refused:
            neutral = refused[name]
            if value is not None and value not in neutral:
                usual = f" or send {json.dumps(neutral[0])}" if neutral else ""
                raise unsupported(name, value, f"leave it out{usual}")
        elif name not in ignored:
            warn_once("the request field %s is unknown and has no effect", name)


# Fields of other servers' requests for embeddings and scores that would change the numbers, each with the values
# (besides null) that request nothing
POOLING_UNSUPPORTED: dict[str, tuple[object, ...]] = {
    # vLLM's
    "cache_salt": (),
    "embed_dtype": ("float32",),
    "endianness": ("native", "little"),
    "messages": ([],),
    "normalize": (True,),
    "padding": ("do_not_pad",),
    # Jina's, Cohere's and Voyage's
    "embedding_type": ("float",),
    "embedding_types": (["float"],),
    "input_type": (),
    "late_chunking": (False,),
    "max_chunks_per_doc": (),
    "normalized": (True,),
    "output_dtype": ("float",),
    "rank_fields": ([],),
    "return_multivector": (False,),
    "task": (),
}
POOLING_IGNORED = frozenset(("metadata", "mm_processor_kwargs", "request_id", "user"))


def optional(default: Any = None) -> Any:
    """A field that the answer leaves out if it is None, as clients expect."""
    return Field(default=default, exclude_if=lambda value: value is None)


def _check_truncation(value: object) -> object:
    if type(value) is int and (value < -1 or value == 0):
        raise ValueError("give the number of tokens to keep, or -1 for as many as fit")
    return value


# vLLM's: how many tokens of a prompt are kept, and at which side it is cut
TruncatePromptTokens = Annotated[int | None, Field(ge=-1), BeforeValidator(_check_truncation)]
TruncationSide = Literal["left", "right"] | None


def truncated(
    tokenizer: Tokenizer,
    ids: list[int],
    num_tokens: int | None,
    *,
    room: int,
    keeps_end: bool,
    has_special_tokens: bool = False,
) -> list[int]:
    """A prompt's ids after truncate_prompt_tokens. room: what -1 stands for. keeps_end: the beginning is cut off."""
    if num_tokens is None:
        return ids
    kept = max(room, 1) if num_tokens == -1 else num_tokens
    return tokenizer.cut(ids, kept, keeps_end=keeps_end, has_special_tokens=has_special_tokens)


class PromptLogprob(BaseModel):
    """vLLM's: the logprob of a prompt token, or of another token in its place."""

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
    """The template's variables for a reasoning effort. As in vLLM, it also turns reasoning on, or off for "none", in
    templates that know only `enable_thinking`."""
    return {} if effort is None else {"reasoning_effort": effort, "enable_thinking": effort != "none"}


def thinking_arguments(extras: Mapping[str, Any]) -> dict[str, Any]:
    """The template's variables for other services' names of an effort: `reasoning` (OpenRouter), `thinking` (DeepSeek,
    Z.ai) and `enable_thinking` (DashScope), among the fields of a chat that OpenAI does not have."""
    found: dict[str, Any] = {}
    reasoning, thinking, enabled = (extras.get(name) for name in ("reasoning", "thinking", "enable_thinking"))
    if isinstance(reasoning, dict):
        effort = reasoning.get("effort")
        found |= effort_arguments(effort) if isinstance(effort, str) else {}
        if isinstance(reasoning.get("enabled"), bool):
            found["enable_thinking"] = reasoning["enabled"]
    if isinstance(thinking, dict) and thinking.get("type") in ("enabled", "disabled"):
        found["enable_thinking"] = thinking["type"] == "enabled"
    return found | ({"enable_thinking": enabled} if isinstance(enabled, bool) else {})


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "tinyvllm"
    root: str
    parent: str | None = None
    max_model_len: int | None = optional()  # None until it is loaded for the first time
    state: LoadState


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]
