"""/v1/chat/completions."""

from __future__ import annotations

from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from tinyvllm.config import MAX_LOGPROBS
from tinyvllm.errors import RequestError
from tinyvllm.server.body_timings import Timings
from tinyvllm.server.openai.protocol.common import (
    PromptLogprobs,
    Usage,
    effort_arguments,
    optional,
    thinking_arguments,
    unsupported,
)
from tinyvllm.server.openai.protocol.content import Content, note_media
from tinyvllm.server.openai.protocol.generation import GenerationRequest
from tinyvllm.server.openai.protocol.tools import (
    MAX_TOOLS,
    ChatTool,
    Choice,
    Function,
    NamedChoice,
    Toolbox,
    ToolChoice,
    choose,
)
from tinyvllm.text.messages import parse_object
from tinyvllm.text.tools.custom import input_arguments

MAX_MESSAGES = 4096


class PastFunction(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)

    name: str
    arguments: str | dict[str, Any] | None = None


class PastCustom(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)

    name: str
    input: str


class PastCall(BaseModel):
    """A call that the assistant made earlier in the conversation."""

    model_config = ConfigDict(extra="allow", strict=True)

    id: str | None = None
    type: Literal["function", "custom"] | None = None
    function: PastFunction | None = None
    custom: PastCustom | None = None

    def for_template(self) -> dict[str, Any]:
        """As chat templates expect it: a custom call as the call of a function."""
        if self.custom is not None:
            function: dict[str, Any] = {"name": self.custom.name, "arguments": input_arguments(self.custom.input)}
        else:
            assert self.function is not None, "checked before"
            function = {"name": self.function.name, "arguments": parse_object(self.function.arguments)}
        call: dict[str, Any] = {"type": "function", "function": function}
        return call if self.id is None else {"id": self.id, **call}


# Fields of a message that servers send and that mean nothing to a model.
_NOT_FOR_TEMPLATES = ("annotations", "audio", "function_call", "reasoning", "refusal", "tool_calls")
# Roles in templates, where they differ.
_TEMPLATE_ROLES = {"developer": "system", "function": "tool"}


class Message(BaseModel):
    """One message of a chat. Unknown fields reach the model's template unchanged."""

    model_config = ConfigDict(extra="allow", strict=True)

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Content = None
    refusal: str | None = None
    reasoning: Any = None  # newer vLLM's name of reasoning_content
    tool_calls: list[PastCall] | None = None
    function_call: PastFunction | None = None  # OpenAI's form before tools

    @model_validator(mode="before")
    @classmethod
    def _note_media(cls, value: object) -> object:
        if isinstance(value, dict) and value.get("role") in ("tool", "function"):
            return {**value, "content": note_media(value.get("content"))}
        return value

    def check(self, param: str) -> None:
        """Raise RequestError for fields that contradict the role."""
        if self.content is None and self.role in ("system", "developer", "user"):
            raise RequestError(f"{param} has no content: give a string or text parts", param=f"{param}.content")
        if (self.tool_calls or self.function_call) and self.role != "assistant":
            name = "tool_calls" if self.tool_calls else "function_call"
            raise unsupported(f"{param}.{name}", "...", "only assistant messages may have them")
        for position, call in enumerate(self.tool_calls or []):
            if call.function is None and call.custom is None:
                missing = f"{param}.tool_calls.{position}.{call.type or 'function'}"
                raise RequestError(f"{missing} is required and missing", param=missing)

    def for_template(self) -> dict[str, Any]:
        """As chat templates expect it: no nulls, `system` for `developer`, arguments of calls as objects."""
        message = {name: value for name, value in self if value is not None and name not in _NOT_FOR_TEMPLATES}
        message["role"] = _TEMPLATE_ROLES.get(self.role, self.role)
        message["content"] = self.content or self.refusal or ""
        if isinstance(self.reasoning, str) and self.reasoning:
            message.setdefault("reasoning_content", self.reasoning)
        if calls := self._calls():
            message["tool_calls"] = calls
        return message

    def _calls(self) -> list[dict[str, Any]]:
        calls = self.tool_calls or []
        if self.function_call is not None:
            calls = [PastCall(function=self.function_call)]
        return [call.for_template() for call in calls]


# Variables that the renderer sets itself.
RESERVED_TEMPLATE_NAMES = ("self", "messages", "tools", "add_generation_prompt")


class FunctionChoice(BaseModel):
    """A function_call that names a function."""

    model_config = ConfigDict(extra="allow", strict=True)

    name: str


class ChatRequest(GenerationRequest):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int | None, Field(ge=0, le=MAX_LOGPROBS)] = None
    tools: Annotated[list[ChatTool] | None, Field(max_length=MAX_TOOLS)] = None
    tool_choice: ToolChoice = None
    # OpenAI's forms before `tools` and `tool_choice`; calls are answered in the old form too
    functions: Annotated[list[Function] | None, Field(max_length=MAX_TOOLS)] = None
    function_call: Literal["none", "auto"] | FunctionChoice | None = None
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
            message.check(f"messages.{position}")
        if self.top_logprobs and not self.logprobs:
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
        for new, old in (("tools", "functions"), ("tool_choice", "function_call")):
            if getattr(self, new) is not None and getattr(self, old) is not None:
                raise RequestError(f"{new} and {old} are two forms of the same field: send {new}", param=old)

    @cached_property
    def toolbox(self) -> Toolbox:
        """The tools that the model is offered."""
        offers = [tool.offer(f"tools.{position}") for position, tool in enumerate(self.tools or [])]
        offers += [function.offer(f"functions.{position}") for position, function in enumerate(self.functions or [])]
        return Toolbox(offers)

    @property
    def uses_functions(self) -> bool:
        """Whether calls are answered in the form before tools, in which a message has at most one."""
        return bool(self.functions)

    def choice(self) -> Choice:
        """What the model may call. Raises RequestError for invalid tools, and for a tool_choice that names an unknown
        one. Converts grammars, which takes milliseconds, so it belongs on a worker thread."""
        self.toolbox.check("tools" if self.functions is None else "functions")
        choice = self.tool_choice if self.function_call is None else self.function_call
        if isinstance(choice, FunctionChoice):
            choice = NamedChoice(choice.name)
        return choose(choice, self.toolbox)

    @property
    def token_limit(self) -> int | None:
        """Maximum tokens of the answer; None: as many as fit."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def template_arguments(self) -> dict[str, Any]:
        """Additional variables of the template."""
        asked = thinking_arguments(self.model_extra or {}) | effort_arguments(self.reasoning_effort)
        return asked | (self.chat_template_kwargs or {})


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


class CalledCustom(BaseModel):
    name: str
    input: str


class ToolCall(BaseModel):
    """A call of a function, or of a custom tool."""

    id: str
    type: Literal["function", "custom"] = "function"
    function: CalledFunction | None = optional()
    custom: CalledCustom | None = optional()


class AssistantMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: str | None = None
    reasoning_content: str | None = optional()
    tool_calls: list[ToolCall] | None = optional()
    function_call: CalledFunction | None = optional()


class ChatChoice(BaseModel):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: str
    stop_reason: int | str | None = None
    token_ids: list[int] | None = optional()  # vLLM's, with return_token_ids


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str | None = None
    prompt_logprobs: PromptLogprobs | None = optional()
    prompt_token_ids: list[int] | None = optional()  # with return_token_ids
    timings: Timings | None = optional()  # with timings_per_token


class FunctionDelta(BaseModel):
    name: str | None = optional()
    arguments: str


class CustomDelta(BaseModel):
    name: str | None = optional()
    input: str


class ToolCallDelta(BaseModel):
    """A piece of a call. Only the first has the id, the type and the name."""

    index: int
    id: str | None = optional()
    type: Literal["function", "custom"] | None = optional()
    function: FunctionDelta | None = optional()
    custom: CustomDelta | None = optional()


class ChatDelta(BaseModel):
    """What is new in a message; empty in the chunk with the finish_reason."""

    role: Literal["assistant"] | None = optional()
    content: str | None = optional()
    reasoning_content: str | None = optional()
    tool_calls: list[ToolCallDelta] | None = optional()
    function_call: FunctionDelta | None = optional()


class ChatChunkChoice(BaseModel):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    token_ids: list[int] | None = optional()


class ChatChunk(BaseModel):
    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    system_fingerprint: str | None = None
    prompt_token_ids: list[int] | None = optional()  # in the first chunk
    timings: Timings | None = optional()  # so far, with timings_per_token
