"""Requests and answers of the routes that generate. Fields are those of Ollama's api/types.go.

Requests are strict, as Ollama's are, except where its clients differ. Unknown fields are ignored and logged.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from tinyvllm.config import MAX_LOGPROBS, GrammarSpec
from tinyvllm.errors import RequestError
from tinyvllm.server.notices import warn_once
from tinyvllm.server.ollama.keep_alive import KeepAlive
from tinyvllm.server.openai.protocol.common import optional
from tinyvllm.text.tools.base import Tool

MAX_MESSAGES = 4096
MAX_TOOLS = 512

Effort = Literal["low", "medium", "high", "max"]


def _check_format(value: object) -> object:
    if value in (None, "", "json") or isinstance(value, dict):
        return value or None
    raise ValueError('give "json" or a JSON schema: an object')


def _lower(value: object) -> object:
    return value.lower() if isinstance(value, str) else value


Format = Annotated[
    Any, BeforeValidator(_check_format, json_schema_input_type=Literal["", "json"] | dict[str, Any] | None)
]


class Request(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)

    model: str

    def log_unknown(self) -> None:
        for name in self.model_extra or {}:
            warn_once("the request field %s is unknown and has no effect", name)


class PastFunction(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)

    name: str
    arguments: dict[str, Any] | str | None = None  # text, as other APIs have it, is taken too


class PastCall(BaseModel):
    """A call that the model made earlier in the conversation."""

    model_config = ConfigDict(extra="ignore", strict=True)

    id: str | None = None
    function: PastFunction


class Message(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)

    role: Annotated[Literal["system", "user", "assistant", "tool"], BeforeValidator(_lower)]
    content: str | None = None
    thinking: str | None = None
    images: list[Any] | None = None
    tool_calls: list[PastCall] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None


class ToolFunction(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)

    name: Annotated[str, Field(min_length=1)]
    description: str | None = None
    parameters: dict[str, Any] | None = None


class ToolDefinition(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)

    type: str | None = None
    function: ToolFunction

    def as_tool(self, position: int) -> Tool:
        function = self.function
        return Tool(
            name=function.name,
            description=function.description or "",
            parameters=function.parameters or None,
            param=f"tools.{position}.function.parameters",
        )

    def for_template(self) -> dict[str, Any]:
        """As chat templates expect it."""
        function = self.function
        parameters = function.parameters or {"type": "object", "properties": {}}
        shown = {"name": function.name, "description": function.description or "", "parameters": parameters}
        return {"type": "function", "function": shown}


class GenerationRequest(Request):
    """What /api/chat and /api/generate share."""

    stream: bool | None = None  # null: true
    format: Format = None
    keep_alive: KeepAlive = None
    options: dict[str, Any] | None = None
    think: bool | Effort | None = None
    truncate: bool | None = None
    shift: bool | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int | None, Field(ge=0, le=MAX_LOGPROBS)] = None

    @property
    def is_streamed(self) -> bool:
        return self.stream is not False

    @property
    def is_truncated(self) -> bool:
        return self.truncate is not False

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    def grammar(self) -> GrammarSpec | None:
        if self.format is None:
            return None
        if self.format == "json":
            return GrammarSpec("json_object", param="format")
        return GrammarSpec("json_schema", json.dumps(self.format), param="format")


class ChatRequest(GenerationRequest):
    """POST /api/chat."""

    messages: Annotated[list[Message] | None, Field(max_length=MAX_MESSAGES)] = None
    tools: Annotated[list[ToolDefinition] | None, Field(max_length=MAX_TOOLS)] = None

    def refuse_unsupported(self) -> None:
        """Raise RequestError for what would change the answer and is not supported. Log unknown fields."""
        for position, message in enumerate(self.messages or []):
            refuse_images(message.images, f"messages.{position}.images")
        names = [tool.function.name for tool in self.tools or []]
        for position, name in enumerate(names):
            if name in names[:position]:
                param = f"tools.{position}"
                raise RequestError(f"{param} is {name!a:.80}, as is another tool's: give each its own", param=param)
        self.log_unknown()


class GenerateRequest(GenerationRequest):
    """POST /api/generate."""

    prompt: str | None = None
    suffix: str | None = None
    system: str | None = None
    template: str | None = None
    context: list[Annotated[int, Field(ge=0)]] | None = None
    raw: bool | None = None
    images: list[Any] | None = None

    def refuse_unsupported(self) -> None:
        """Raise RequestError for what would change the answer and is not supported. Log unknown fields."""
        refuse_images(self.images, "images")
        if self.template:
            raise RequestError(
                "template is not supported: the model's own applies, or one that the server was started with "
                "(--chat-template). Send a complete prompt with raw=true",
                param="template",
            )
        if self.raw and (self.system or self.context):
            name = "system" if self.system else "context"
            raise RequestError(f"{name} cannot be combined with raw=true: put it into the prompt", param=name)
        if self.suffix and self.context:
            raise RequestError("context cannot be combined with suffix: leave it out", param="context")
        self.log_unknown()


def refuse_images(images: list[Any] | None, param: str) -> None:
    if images:
        raise RequestError(
            f"{param} has {len(images)} images, but this model reads text only: leave them out", param=param
        )


# ---- Answers ----


class TokenScore(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class TokenScores(TokenScore):
    top_logprobs: list[TokenScore] | None = optional()


class CalledFunction(BaseModel):
    index: int
    name: str
    arguments: dict[str, Any]


class ToolCall(BaseModel):
    id: str
    function: CalledFunction


class AnswerMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str = ""
    thinking: str | None = optional()
    tool_calls: list[ToolCall] | None = optional()


class _Heading(BaseModel):
    model: str
    created_at: str


class Answer(_Heading):
    """Fields of both routes' answers, whole or streamed. Durations are in nanoseconds."""

    done: bool = False
    done_reason: str | None = optional()  # stop, length, load or unload
    logprobs: list[TokenScores] | None = optional()
    total_duration: int | None = optional()
    load_duration: int | None = optional()  # from the request's arrival until its prompt was begun
    prompt_eval_count: int | None = optional()
    prompt_eval_duration: int | None = optional()
    eval_count: int | None = optional()
    eval_duration: int | None = optional()


class _ChatPiece(_Heading):
    message: AnswerMessage


class _GeneratePiece(_Heading):
    response: str = ""
    thinking: str | None = optional()
    context: list[int] | None = optional()  # the tokens of prompt and answer


# Of two bases, the fields of the second come first.


class ChatAnswer(Answer, _ChatPiece):
    """Of /api/chat."""


class GenerateAnswer(Answer, _GeneratePiece):
    """Of /api/generate."""
