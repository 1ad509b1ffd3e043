"""/v1/chat/completions."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from tinyvllm.config import MAX_LOGPROBS
from tinyvllm.errors import RequestError
from tinyvllm.server.openai.protocol.common import PromptLogprobs, Usage, effort_arguments, optional, unsupported
from tinyvllm.server.openai.protocol.generation import GenerationRequest
from tinyvllm.server.openai.protocol.tools import (
    MAX_TOOLS,
    FunctionTool,
    NamedChoice,
    ToolChoice,
    ToolName,
    check_choice,
    check_names,
)

MAX_MESSAGES = 4096
# What content parts of these types hold, which models here cannot read: they run text only
MEDIA = {
    "image": "an image",
    "image_url": "an image",
    "input_image": "an image",
    "input_audio": "audio",
    "audio_url": "audio",
    "video_url": "a video",
    "file": "a file",
    "input_file": "a file",
}


def join_parts(value: object) -> object:
    """Content as one string. Text parts are joined by newlines, as vLLM does for text-only templates."""
    if not isinstance(value, list):
        return value
    texts: list[str] = []
    for position, part in enumerate(value):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in MEDIA:
            raise ValueError(f"part {position} is {MEDIA[kind]} ({kind}), but this model runs text only: leave it out")
        name = "refusal" if kind == "refusal" else "text"
        text = part.get(name) if isinstance(part, dict) else None
        if kind not in ("text", "refusal", "input_text", "output_text") or not isinstance(text, str):
            shown = "not an object" if kind is None else f"of type {ascii(kind)[:40]}"
            raise ValueError(f'part {position} is {shown}: only {{"type": "text", "text": "..."}} is supported')
        texts.append(text)
    return "\n".join(texts)


Content = Annotated[str | None, BeforeValidator(join_parts, json_schema_input_type=str | list[dict[str, Any]] | None)]


class PastFunction(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)

    name: ToolName
    arguments: str | None = None


class PastCall(BaseModel):
    """A call that the assistant made earlier in the conversation."""

    model_config = ConfigDict(extra="allow", strict=True)

    id: str | None = None
    type: Literal["function"] = "function"
    function: PastFunction

    def for_template(self) -> dict[str, Any]:
        """As chat templates expect it: with arguments as an object, or as text if the model wrote something else."""
        text = self.function.arguments or "{}"
        try:
            arguments = json.loads(text)
        except (ValueError, RecursionError):
            arguments = text
        if not isinstance(arguments, dict):
            arguments = text
        call: dict[str, Any] = {"type": "function", "function": {"name": self.function.name, "arguments": arguments}}
        return call if self.id is None else {"id": self.id, **call}


class Message(BaseModel):
    """One message of a chat. Unknown fields reach the model's template unchanged."""

    model_config = ConfigDict(extra="allow", strict=True)

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content = None
    tool_calls: list[PastCall] | None = None

    def for_template(self) -> dict[str, Any]:
        """As chat templates expect it: no nulls, `system` for `developer`, arguments of calls as objects."""
        message = {name: value for name, value in self if value is not None}
        message["role"] = "system" if self.role == "developer" else self.role
        message["content"] = self.content or ""
        if self.tool_calls:
            message["tool_calls"] = [call.for_template() for call in self.tool_calls]
        else:
            message.pop("tool_calls", None)
        return message


# Variables that the template's renderer sets itself.
RESERVED_TEMPLATE_NAMES = ("self", "messages", "tools", "add_generation_prompt")


class ChatRequest(GenerationRequest):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int | None, Field(ge=0, le=MAX_LOGPROBS)] = None
    tools: Annotated[list[FunctionTool] | None, Field(max_length=MAX_TOOLS)] = None
    tool_choice: ToolChoice = None
    parallel_tool_calls: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    include_reasoning: bool | None = None

    def refuse_unsupported(self) -> None:
        super().refuse_unsupported()
        self._check_tools()
        for position, message in enumerate(self.messages):
            if message.content is None and not message.tool_calls:
                raise RequestError(
                    f"messages.{position} has no content: give a string, or tool_calls of an assistant",
                    param=f"messages.{position}.content",
                )
            if message.tool_calls and message.role != "assistant":
                raise unsupported(
                    f"messages.{position}.tool_calls", "...", "only messages of an assistant may have them"
                )
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError(
                "top_logprobs needs logprobs=true: send it, or leave top_logprobs out", param="top_logprobs"
            )
        if self.continue_final_message and self.add_generation_prompt:
            raise RequestError(
                "add_generation_prompt starts a new message and continue_final_message continues the last: send one",
                param="continue_final_message",
            )
        for name in RESERVED_TEMPLATE_NAMES:
            if name in (self.chat_template_kwargs or {}):
                raise RequestError(
                    f"chat_template_kwargs may not contain {name!r}: the server sets it from the request's own fields",
                    param="chat_template_kwargs",
                )

    def _check_tools(self) -> None:
        names = [tool.function.name for tool in self.tools or []]
        check_names(names, "tools")
        choice = self.tool_choice
        if isinstance(choice, NamedChoice):
            check_choice(choice.name, names)
        elif choice == "required" and not names:
            raise RequestError("tool_choice is 'required', but there are no tools: send some", param="tool_choice")

    @property
    def token_limit(self) -> int | None:
        """The most tokens of the answer; None: as many as fit."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def template_arguments(self) -> dict[str, Any]:
        """Additional variables of the template."""
        return effort_arguments(self.reasoning_effort) | (self.chat_template_kwargs or {})


# ---- Answers ----


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[ChatTokenLogprob]
    refusal: None = None


class CalledFunction(BaseModel):
    name: str
    arguments: str


class ToolCall(BaseModel):
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class AssistantMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: str | None = None
    reasoning_content: str | None = optional()
    tool_calls: list[ToolCall] | None = optional()


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
    prompt_logprobs: PromptLogprobs | None = optional()


class FunctionDelta(BaseModel):
    name: str | None = optional()
    arguments: str


class ToolCallDelta(BaseModel):
    """A piece of a call. Only the first has the id, the type and the name."""

    index: int
    id: str | None = optional()
    type: Literal["function"] | None = optional()
    function: FunctionDelta


class ChatDelta(BaseModel):
    """What is new in a message; empty in the chunk with the finish_reason."""

    role: Literal["assistant"] | None = optional()
    content: str | None = optional()
    reasoning_content: str | None = optional()
    tool_calls: list[ToolCallDelta] | None = optional()


class ChatChunkChoice(BaseModel):
    index: int
    delta: ChatDelta
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
