"""The wire format: what the OpenAI routes read and write, as pydantic models.

Requests are strict (a number in quotes is an error, not a number) and keep fields that they do not know. A field that
would change the output and that the engine cannot honour is refused by name, so that nothing is ignored in silence.
"""

from __future__ import annotations

import json
import logging
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from tinyvllm.config import MAX_CHOICES, MAX_LOGPROBS, GenerationDefaults, SamplingParams
from tinyvllm.errors import RequestError

log = logging.getLogger(__name__)

DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's default of max_tokens on /v1/completions; chat has none
MAX_CHOICES_PER_CALL = 2048  # prompts x n of one HTTP request: each is a sequence in the scheduler's queue

# Fields that change the output and are not supported yet, each with the values (besides null) that ask for nothing.
_UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "allowed_token_ids": ([],),
    "audio": (),
    "bad_words": ([],),
    "best_of": (1,),
    "cache_salt": (),
    "chat_template": (),
    "documents": ([],),
    "echo": (False,),  # on chat; completions have a field for it
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "grammar": ("",),
    "guided_choice": ([],),
    "guided_grammar": ("",),
    "guided_json": (),
    "guided_regex": ("",),
    "length_penalty": (1,),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "prediction": (),
    "presence_penalty": (0,),
    "prompt_embeds": ([],),
    "prompt_logprobs": (),
    "repetition_penalty": (1,),
    "response_format": ({"type": "text"},),
    "return_tokens_as_token_ids": (False,),
    "structured_outputs": (),
    "suffix": ("",),
    "truncate_prompt_tokens": (),
    "typical_p": (1,),
    "use_beam_search": (False,),
    "web_search_options": (),
}

# Known fields that say nothing about the output: bookkeeping of the caller, hints to a hosted service.
# fmt: off
_WITHOUT_EFFECT = frozenset((
    "metadata", "parallel_tool_calls", "prompt_cache_key", "reasoning_effort", "request_id", "safety_identifier",
    "service_tier", "store", "user", "verbosity",
))
# fmt: on

_logged_fields: set[str] = set()
_MAX_LOGGED_FIELDS = 200  # names come from clients: the set must not grow for ever


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)

    include_usage: bool | None = None


def _check_stop(value: object) -> object:
    """One string or a list of strings, as a list."""
    if value is None or isinstance(value, str):
        return [value] if value else []
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return value
    raise ValueError("give a string or a list of strings")


class GenerationRequest(BaseModel):
    """What both routes accept. OpenAI's names, and vLLM's for what OpenAI lacks. Null means: the default."""

    model_config = ConfigDict(extra="allow", strict=True)

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int | None, Field(ge=1, le=MAX_CHOICES)] = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    max_tokens: Annotated[int | None, Field(ge=1)] = None
    min_tokens: Annotated[int | None, Field(ge=0)] = None
    stop: Annotated[list[str], BeforeValidator(_check_stop, json_schema_input_type=str | list[str] | None)] = []
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    priority: Annotated[int | None, Field(ge=-(2**31), lt=2**31)] = None

    @property
    def num_choices(self) -> int:
        return self.n or 1

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def refuse_unsupported(self) -> None:
        """Raise RequestError for a field that cannot be honoured; log, once each, the names of unknown ones."""
        if self.stream_options is not None and not self.stream:
            raise RequestError(
                "stream_options is for streams: send stream=true, or leave it out", param="stream_options"
            )
        options = self.stream_options.model_extra if self.stream_options else None
        if (options or {}).get("continuous_usage_stats"):
            refuse("stream_options.continuous_usage_stats", True, "usage comes once, at the end: send include_usage")
        for name, value in (self.model_extra or {}).items():
            if name in _UNSUPPORTED:
                neutral = _UNSUPPORTED[name]
                if value is not None and value not in neutral:
                    usual = f" or send {json.dumps(neutral[0])}" if neutral else ""
                    refuse(name, value, f"leave it out{usual}")
            elif (
                name not in _WITHOUT_EFFECT and name not in _logged_fields and len(_logged_fields) < _MAX_LOGGED_FIELDS
            ):
                _logged_fields.add(name)
                log.warning("the request field %s is not known and has no effect (said once)", ascii(name[:80]))

    def _sampling_params(
        self, defaults: GenerationDefaults, *, max_tokens: int | None, logprobs: int | None
    ) -> SamplingParams:
        """The request's settings, else the model's own defaults, else vLLM's. Raises RequestError with the field."""
        given = {
            "n": self.n,
            "temperature": _first(self.temperature, defaults.temperature),
            "top_p": _first(self.top_p, defaults.top_p),
            "top_k": _first(self.top_k, defaults.top_k),
            "min_p": _first(self.min_p, defaults.min_p),
            "seed": self.seed,
            "min_tokens": self.min_tokens,
            "stop": tuple(self.stop),
            "stop_token_ids": tuple(self.stop_token_ids or ()),
            "include_stop_str_in_output": self.include_stop_str_in_output,
            "ignore_eos": self.ignore_eos,
            "skip_special_tokens": self.skip_special_tokens,
        }
        settings: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        return SamplingParams(max_tokens=max_tokens, logprobs=logprobs, **settings)


def _first(*values: float | None) -> float | None:
    return next((value for value in values if value is not None), None)


def refuse(param: str, value: object, remedy: str) -> None:
    """Raise the RequestError of a field that is understood and not supported."""
    shown = ascii(value)
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    raise RequestError(f"{param}={shown} is not supported yet: {remedy}", param=param)


# ---- /v1/completions ----


def _check_prompt(value: object) -> object:
    """str | [str] | [int] | [[int]], as a list of prompts: each a string or a list of token ids."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if all(isinstance(item, str) for item in value):
            return value
        if _is_ids(value):
            return [value]
        if all(isinstance(item, list) and _is_ids(item) for item in value):
            return value
    raise ValueError(
        "give a string, a list of strings, a list of token ids or a list of such lists, none of them empty"
    )


def _is_ids(value: list[object]) -> bool:
    return bool(value) and all(type(item) is int and 0 <= item < 2**31 for item in value)


class CompletionRequest(GenerationRequest):
    """POST /v1/completions."""

    # Any inside: the validator has seen every item, and checking a prompt of 100,000 ids twice costs time
    prompt: Annotated[
        list[Any], BeforeValidator(_check_prompt, json_schema_input_type=str | list[str] | list[int] | list[list[int]])
    ]
    logprobs: Annotated[int | None, Field(ge=0, le=MAX_LOGPROBS)] = None
    echo: bool | None = None

    def refuse_unsupported(self) -> None:
        super().refuse_unsupported()
        if self.echo and self.logprobs is not None:
            refuse("echo", True, "logprobs of prompt tokens are not computed: ask for one of echo and logprobs")
        if len(self.prompt) * self.num_choices > MAX_CHOICES_PER_CALL:
            raise RequestError(
                f"{len(self.prompt)} prompts with n={self.num_choices} are more than {MAX_CHOICES_PER_CALL} choices: "
                "send them in several requests",
                param="prompt",
            )

    def sampling_params(self, defaults: GenerationDefaults) -> SamplingParams:
        max_tokens = DEFAULT_COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens
        return self._sampling_params(defaults, max_tokens=max_tokens, logprobs=self.logprobs)


# ---- /v1/chat/completions ----


def _join_parts(value: object) -> object:
    """Content as one string; a list of text parts is joined by line ends, as vLLM does for text-only templates."""
    if not isinstance(value, list):
        return value
    texts: list[str] = []
    for position, part in enumerate(value):
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get("text") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(text, str):
            shown = "not an object" if kind is None else f"of type {ascii(kind)[:40]}"
            raise ValueError(f'part {position} is {shown}: only {{"type": "text", "text": "..."}} is supported')
        texts.append(text)
    return "\n".join(texts)


class Message(BaseModel):
    """One message of a chat. Fields that are not named here reach the model's template as they are."""

    model_config = ConfigDict(extra="allow", strict=True)

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[
        str | None, BeforeValidator(_join_parts, json_schema_input_type=str | list[dict[str, Any]] | None)
    ] = None
    tool_calls: list[dict[str, Any]] | None = None

    def for_template(self) -> dict[str, Any]:
        """As chat templates expect it: no nulls, `developer` under its older name, arguments of calls as objects."""
        message = {name: value for name, value in self if value is not None}
        message["role"] = "system" if self.role == "developer" else self.role
        message["content"] = self.content or ""
        if self.tool_calls:
            message["tool_calls"] = [_with_parsed_arguments(call) for call in self.tool_calls]
        return message


def _with_parsed_arguments(call: dict[str, Any]) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except (ValueError, RecursionError):
        return call  # a model wrote it, and it need not be JSON: the template shows the string
    return {**call, "function": {**function, "arguments": arguments}} if isinstance(arguments, dict) else call


# Names that the template's renderer gives a meaning of its own.
_RESERVED_TEMPLATE_NAMES = ("self", "messages", "tools", "add_generation_prompt")


class ChatRequest(GenerationRequest):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int | None, Field(ge=0, le=MAX_LOGPROBS)] = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def refuse_unsupported(self) -> None:
        super().refuse_unsupported()
        if self.tool_choice not in (None, "none", "auto"):
            refuse("tool_choice", self.tool_choice, 'send "none", or leave it out')
        if self.tools and self.tool_choice != "none":
            refuse("tools", self.tools, 'leave them out or send tool_choice="none"')
        for position, message in enumerate(self.messages):
            if message.content is None and not message.tool_calls:
                raise RequestError(
                    f"messages.{position} has no content: give a string, or tool_calls of an assistant",
                    param=f"messages.{position}.content",
                )
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError(
                "top_logprobs needs logprobs=true: send it, or leave top_logprobs out", param="top_logprobs"
            )
        if self.continue_final_message and self.add_generation_prompt:
            raise RequestError(
                "add_generation_prompt begins a new message and continue_final_message goes on with the last: send one",
                param="continue_final_message",
            )
        for name in _RESERVED_TEMPLATE_NAMES:
            if name in (self.chat_template_kwargs or {}):
                raise RequestError(
                    f"chat_template_kwargs may not hold {name!r}: the server sets it from the request's own fields",
                    param="chat_template_kwargs",
                )

    @property
    def token_limit(self) -> int | None:
        """Most tokens of the answer; None: as many as fit."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def sampling_params(self, defaults: GenerationDefaults) -> SamplingParams:
        num_logprobs = (self.top_logprobs or 0) if self.logprobs else None
        return self._sampling_params(defaults, max_tokens=self.token_limit, logprobs=num_logprobs)


# ---- Answers ----


class PromptTokensDetails(BaseModel):
    cached_tokens: int


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class CompletionLogprobs(BaseModel):
    """Parallel lists, one item a token. text_offset counts characters from the start of the choice's text."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


class Completion(BaseModel):
    """An answer of /v1/completions; streamed pieces have this shape too, with usage in the last one alone."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
    system_fingerprint: str | None = None


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[ChatTokenLogprob]
    refusal: None = None


class AssistantMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: str | None = None


class ChatChoice(BaseModel):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: str
    stop_reason: int | str | None = None


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str | None = None


class RoleDelta(BaseModel):
    """The first delta of a choice."""

    role: Literal["assistant"] = "assistant"
    content: str = ""


class ContentDelta(BaseModel):
    content: str


class EmptyDelta(BaseModel):
    """The last delta of a choice: its finish_reason stands beside it."""


class ChatChunkChoice(BaseModel):
    index: int
    delta: RoleDelta | ContentDelta | EmptyDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


class ChatChunk(BaseModel):
    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    system_fingerprint: str | None = None


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
