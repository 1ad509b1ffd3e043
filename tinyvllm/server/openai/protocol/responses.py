"""/v1/responses."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from tinyvllm.config import MAX_LOGPROBS, GrammarSpec
from tinyvllm.errors import RequestError
from tinyvllm.server.openai.protocol.chat import MAX_MESSAGES, ChatTokenLogprob, PastCall, PastFunction, join_parts
from tinyvllm.server.openai.protocol.common import optional, unsupported
from tinyvllm.server.openai.protocol.generation import GenerationRequest, Schema
from tinyvllm.server.openai.protocol.tools import (
    MAX_TOOLS,
    NamedChoice,
    ToolChoice,
    ToolName,
    check_choice,
    check_names,
)
from tinyvllm.text.tools.base import Tool

LOGPROBS = "message.output_text.logprobs"  # the value of `include` that requests logprobs
# Values of `include` for things that this server never has.
_INCLUDE_WITHOUT_EFFECT = ("reasoning.encrypted_content",)

# Unsupported fields that would change the answer, each with the values besides null that request nothing.
_UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "background": (False,),
    "conversation": (),
    "max_tool_calls": (),
    "prompt": (),
    "truncation": ("disabled",),
}
_OF_OTHER_ROUTES = {"max_tokens": "max_output_tokens", "response_format": "text.format", "prompt_logprobs": "nothing"}


class InputItem(BaseModel):
    """One item of `input`: a message, a call that the model made, or its result. `type` says which fields apply."""

    model_config = ConfigDict(extra="allow", strict=True)

    type: Literal["message", "function_call", "function_call_output", "reasoning"] = "message"
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: Any = None
    call_id: str | None = None
    name: ToolName | None = None
    arguments: str | None = None
    output: Any = None
    summary: Any = None


def _check_input(value: object) -> object:
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


class ResponseTool(BaseModel):
    """A function. Flat here, where chat completions nest it."""

    model_config = ConfigDict(extra="allow", strict=True)

    type: Literal["function"]
    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    def as_tool(self, param: str) -> Tool:
        parameters = self.parameters or None
        return Tool(
            name=self.name,
            description=self.description or "",
            parameters=parameters,
            is_strict=bool(self.strict),
            param=f"{param}.parameters",
        )

    def for_template(self) -> dict[str, Any]:
        parameters = self.parameters or {"type": "object", "properties": {}}
        function = {"name": self.name, "description": self.description or "", "parameters": parameters}
        return {"type": "function", "function": function}


class TextFormat(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True, populate_by_name=True)

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = optional()
    schema_: Annotated[Schema, Field(alias="schema", exclude_if=lambda value: value is None)] = None
    strict: bool | None = optional()


class TextSettings(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)

    format: TextFormat | None = None


class ReasoningSettings(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)

    effort: str | None = None
    summary: str | None = None


class ResponsesRequest(GenerationRequest):
    """POST /v1/responses."""

    input: Annotated[
        list[InputItem],
        Field(min_length=1, max_length=MAX_MESSAGES),
        BeforeValidator(_check_input, json_schema_input_type=str | list[InputItem]),
    ]
    instructions: str | None = None
    previous_response_id: str | None = None
    max_output_tokens: Annotated[int | None, Field(ge=1)] = None
    top_logprobs: Annotated[int | None, Field(ge=0, le=MAX_LOGPROBS)] = None
    include: list[str] | None = None
    tools: Annotated[list[ResponseTool] | None, Field(max_length=MAX_TOOLS)] = None
    tool_choice: ToolChoice = None
    parallel_tool_calls: bool | None = None
    text: TextSettings | None = None
    reasoning: ReasoningSettings | None = None
    store: bool | None = None
    metadata: dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def refuse_unsupported(self) -> None:
        super().refuse_unsupported()
        if self.num_choices != 1:
            raise unsupported("n", self.n, "a response has one choice: leave it out, or use /v1/chat/completions")
        for name, instead in _OF_OTHER_ROUTES.items():
            if getattr(self, name) is not None:
                raise unsupported(name, "...", f"send {instead} here")
        for name, neutral in _UNSUPPORTED.items():
            value = (self.model_extra or {}).get(name)
            if value is not None and value not in neutral:
                raise unsupported(name, value, "leave it out")
        for position, value in enumerate(self.include or []):
            if value != LOGPROBS and value not in _INCLUDE_WITHOUT_EFFECT:
                raise unsupported(f"include.{position}", value, f"the only one is {LOGPROBS}")
        names = [tool.name for tool in self.tools or []]
        check_names(names, "tools")
        if isinstance(self.tool_choice, NamedChoice):
            check_choice(self.tool_choice.name, names)
        elif self.tool_choice == "required" and not names:
            raise RequestError("tool_choice is 'required', but there are no tools: send some", param="tool_choice")

    @property
    def num_logprobs(self) -> int | None:
        wanted = LOGPROBS in (self.include or []) or self.top_logprobs
        return (self.top_logprobs or 0) if wanted else None

    def grammar(self) -> GrammarSpec | None:
        text_format = self.text.format if self.text is not None else None
        other = super().grammar()
        if text_format is None or text_format.type == "text":
            return other
        if other is not None:
            raise RequestError(f"text.format and {other.param} both constrain the output: send one", param=other.param)
        if text_format.type == "json_object":
            return GrammarSpec("json_object", param="text.format")
        if text_format.schema_ is None:
            raise RequestError(
                "text.format.schema is missing: give the schema of the output", param="text.format.schema"
            )
        text = text_format.schema_ if isinstance(text_format.schema_, str) else json.dumps(text_format.schema_)
        return GrammarSpec("json_schema", text, param="text.format.schema")

    def messages(self) -> list[dict[str, Any]]:
        """The input as messages for a chat template, without those of earlier responses."""
        return messages_of(self.input)


def messages_of(items: Sequence[InputItem]) -> list[dict[str, Any]]:
    """Items as messages. The assistant's reasoning, text and calls between other messages become one message."""
    messages: list[dict[str, Any]] = []
    for position, item in enumerate(items):
        param = f"input.{position}"
        match item.type:
            case "message":
                role = item.role or "user"
                message = {"role": "system" if role == "developer" else role, "content": _text(item.content, param)}
                if role == "assistant" and _is_unfinished(messages):
                    messages[-1]["content"] = message["content"]
                else:
                    messages.append(message)
            case "reasoning":
                text = _text(item.content or [], param)
                if text:  # a template cannot use summaries or encrypted reasoning
                    messages.append({"role": "assistant", "content": "", "reasoning_content": text})
            case "function_call":
                if item.name is None or item.call_id is None:
                    raise RequestError(f"{param} needs a name and a call_id", param=param)
                function = PastFunction(name=item.name, arguments=item.arguments)
                call = PastCall(id=item.call_id, function=function).for_template()
                if not messages or messages[-1]["role"] != "assistant":
                    messages.append({"role": "assistant", "content": ""})
                messages[-1].setdefault("tool_calls", []).append(call)
            case "function_call_output":
                if item.call_id is None:
                    raise RequestError(f"{param}.call_id is missing", param=f"{param}.call_id")
                text = _text(item.output, f"{param}.output")
                messages.append({"role": "tool", "tool_call_id": item.call_id, "content": text})
    return messages


def _is_unfinished(messages: list[dict[str, Any]]) -> bool:
    """Whether the last message has reasoning, but no content yet."""
    return bool(messages) and "reasoning_content" in messages[-1] and not messages[-1]["content"]


_PART_TYPES = ("input_text", "output_text", "text", "reasoning_text", "refusal")


def _text(content: object, param: str) -> str:
    if isinstance(content, list):
        for part in content:
            if isinstance(part, dict) and part.get("type") == "reasoning_text":
                part["type"] = "text"
    try:
        text = join_parts(content)
    except ValueError as error:
        raise RequestError(f"{param}.content: {error}", param=f"{param}.content") from None
    if not isinstance(text, str):
        raise RequestError(f"{param}.content is missing: give a string or text parts", param=f"{param}.content")
    return text


# ---- Answers ----


class OutputText(BaseModel):
    type: Literal["output_text"] = "output_text"
    text: str
    annotations: list[Any] = []
    logprobs: list[ChatTokenLogprob] = []


class ReasoningText(BaseModel):
    type: Literal["reasoning_text"] = "reasoning_text"
    text: str


Status = Literal["in_progress", "completed", "incomplete"]


class MessageItem(BaseModel):
    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    status: Status
    content: list[OutputText]


class ReasoningItem(BaseModel):
    id: str
    type: Literal["reasoning"] = "reasoning"
    summary: list[Any] = []
    content: list[ReasoningText]
    status: Status


class FunctionCallItem(BaseModel):
    id: str
    type: Literal["function_call"] = "function_call"
    call_id: str
    name: str
    arguments: str
    status: Status


OutputItem = MessageItem | ReasoningItem | FunctionCallItem


class InputTokensDetails(BaseModel):
    cached_tokens: int


class OutputTokensDetails(BaseModel):
    reasoning_tokens: int


class ResponseUsage(BaseModel):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class IncompleteDetails(BaseModel):
    reason: Literal["max_output_tokens", "content_filter"]


class ResponseAnswer(BaseModel):
    """An answer of /v1/responses, which its first and last events carry too."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    completed_at: int | None = None
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    background: bool = False
    error: dict[str, Any] | None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None
    max_output_tokens: int | None
    model: str
    output: list[OutputItem]
    parallel_tool_calls: bool
    previous_response_id: str | None
    reasoning: ReasoningSettings
    store: bool
    temperature: float
    text: TextSettings
    tool_choice: Any
    tools: list[ResponseTool]
    top_logprobs: int
    top_p: float
    truncation: Literal["disabled"] = "disabled"
    usage: ResponseUsage | None = None
    user: str | None = None
    metadata: dict[str, Any]


class DeletedResponse(BaseModel):
    id: str
    object: Literal["response"] = "response"
    deleted: Literal[True] = True
