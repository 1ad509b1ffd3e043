"""/v1/completions."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field

from tinyvllm.config import MAX_LOGPROBS, GenerationDefaults, SamplingParams
from tinyvllm.errors import RequestError
from tinyvllm.server.body_timings import Timings
from tinyvllm.server.openai.protocol.common import PromptLogprobs, Usage, optional, unsupported
from tinyvllm.server.openai.protocol.generation import GenerationRequest

DEFAULT_TOKENS = 16  # OpenAI's default of max_tokens here; chat has none
MAX_CHOICES_PER_CALL = 2048  # prompts x n of one HTTP request: each is a sequence in the scheduler's queue


def check_prompt(value: object) -> object:
    """str | [str] | [int] | [[int]] as a list of prompts, each a string or a list of token ids."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if all(isinstance(item, str) for item in value):
            return value
        if is_ids(value):
            return [value]
        if all(isinstance(item, list) and is_ids(item) for item in value):
            return value
    raise ValueError(
        "give a string, a list of strings, a list of token ids or a list of such lists, none of them empty"
    )


def is_ids(value: list[object]) -> bool:
    return bool(value) and all(type(item) is int and 0 <= item < 2**31 for item in value)


# list[Any]: the validator has checked every item, and checking a prompt of 100,000 ids twice takes time
Prompts = Annotated[
    list[Any], BeforeValidator(check_prompt, json_schema_input_type=str | list[str] | list[int] | list[list[int]])
]


class CompletionRequest(GenerationRequest):
    """POST /v1/completions."""

    prompt: Prompts
    max_tokens: Annotated[int | None, Field(ge=0)] = None  # 0, with echo: only the prompt and its logprobs
    logprobs: Annotated[int | None, Field(ge=0, le=MAX_LOGPROBS)] = None
    echo: bool | None = None
    suffix: str | None = None
    add_special_tokens: bool | None = None

    @property
    def token_limit(self) -> int | None:
        return DEFAULT_TOKENS if self.max_tokens is None else self.max_tokens

    def refuse_unsupported(self) -> None:
        super().refuse_unsupported()
        if self.suffix:
            for name, value in (("echo", self.echo), ("truncate_prompt_tokens", self.truncate_prompt_tokens)):
                if value:
                    raise unsupported(name, value, "the prompt of a request with suffix has two parts: leave it out")
        if self.max_tokens == 0 and not self.echo:
            raise RequestError("max_tokens is 0, which leaves only the prompt: send echo=true", param="max_tokens")
        if len(self.prompt) * self.num_choices > MAX_CHOICES_PER_CALL:
            raise RequestError(
                f"{len(self.prompt)} prompts with n={self.num_choices} are more than {MAX_CHOICES_PER_CALL} choices: "
                "split them into several requests",
                param="prompt",
            )

    def sampling_params(self, defaults: GenerationDefaults) -> SamplingParams:
        max_tokens = DEFAULT_TOKENS if self.max_tokens is None else max(self.max_tokens, 1)
        params = self.make_params(defaults, max_tokens=max_tokens, logprobs=self.logprobs, grammar=self.grammar())
        if self.echo and self.logprobs is not None:
            return replace(params, prompt_logprobs=max(self.logprobs, self.prompt_logprobs or 0))
        return params


# ---- Answers ----


class CompletionLogprobs(BaseModel):
    """Parallel lists, one item per token. text_offset counts characters from the start of the choice's text."""

    tokens: list[str]
    token_logprobs: list[float | None]  # None for a prompt's first token, which nothing predicts
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]

    def then(self, later: CompletionLogprobs) -> CompletionLogprobs:
        """These logprobs, followed by `later`."""
        return CompletionLogprobs(
            tokens=self.tokens + later.tokens,
            token_logprobs=self.token_logprobs + later.token_logprobs,
            top_logprobs=self.top_logprobs + later.top_logprobs,
            text_offset=self.text_offset + later.text_offset,
        )


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    prompt_logprobs: PromptLogprobs | None = optional()
    token_ids: list[int] | None = optional()  # vLLM's, with return_token_ids
    prompt_token_ids: list[int] | None = optional()  # the same; in streams, in the first chunk of a choice


class Completion(BaseModel):
    """An answer of /v1/completions; streamed chunks have this shape too, with usage in the last one only."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
    system_fingerprint: str | None = None
    timings: Timings | None = optional()  # with timings_per_token
