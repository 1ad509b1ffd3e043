"""/v1/responses."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from tinyvllm.config import MAX_LOGPROBS, GrammarSpec
from tinyvllm.errors import RequestError
from tinyvllm.server.notices import warn_once
from tinyvllm.server.openai.protocol.chat import MAX_MESSAGES, ChatTokenLogprob
from tinyvllm.server.openai.protocol.common import optional, unsupported
from tinyvllm.server.openai.protocol.generation import GenerationRequest, Schema, schema_grammar
from tinyvllm.server.openai.protocol.response_items import AnyItem, InputItem, qualified
from tinyvllm.server.openai.protocol.tools import (
    MAX_TOOLS,
    Choice,
    Custom,
    Function,
    InputFormat,
    Offer,
    Toolbox,
    ToolChoice,
    ToolName,
    choose,
)

LOGPROBS = "message.output_text.logprobs"  # the value of `include` that requests logprobs
SEALED_REASONING = "reasoning.encrypted_content"
# Values of `include` for what this server never has, because it runs no tools and reads no images.
_INCLUDE_WITHOUT_EFFECT = (
    "web_search_call.action.sources", "web_search_call.results", "code_interpreter_call.outputs",
    "computer_call_output.output.image_url", "file_search_call.results", "message.input_image.image_url",
)  # fmt: skip
_INCLUDE = (LOGPROBS, SEALED_REASONING, *_INCLUDE_WITHOUT_EFFECT)

# Unsupported fields that would change the answer, each with the values besides null that request nothing, and a remedy.
_UNSUPPORTED: dict[str, tuple[tuple[object, ...], str]] = {
    "conversation": ((), "this server stores responses, not conversations: send previous_response_id"),
    "enable_response_messages": ((False,), "leave it out, or send false"),
    "previous_input_messages": (([],), "send the items of the conversation as input"),
    "previous_response": ((), "send previous_response_id, or the items of the conversation as input"),
    "prompt": ((), "prompts stored with OpenAI cannot be read here: send instructions and input"),
}
_OF_OTHER_ROUTES = {
    "max_tokens": "max_output_tokens",
    "response_format": "text.format",
    "prompt_logprobs": "nothing",
    "return_token_ids": "nothing",
    "return_tokens_as_token_ids": "nothing",
    "truncate_prompt_tokens": "truncation",
    "truncation_side": "truncation",
}


def _check_input(value: object) -> object:
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


class ResponseTool(BaseModel):
    """A tool, whose `type` determines its fields. Flat, unlike in chat completions."""

    model_config = ConfigDict(extra="allow", strict=True)

    type: Annotated[str, Field(min_length=1)]
    name: ToolName | None = optional()
    description: str | None = optional()
    parameters: dict[str, Any] | None = optional()
    strict: bool | None = optional()
    format: InputFormat | None = optional()
    tools: Annotated[list[AnyTool] | None, Field(max_length=MAX_TOOLS, exclude_if=lambda value: value is None)] = None

    def offers(self, param: str, namespace: str | None = None) -> list[Offer]:
        """What a model is offered: nothing if only a hosted service can run the tool; for a namespace, its tools.

        param: path of the tool in the request, for messages.
        """
        if not self.is_offered:
            return []
        if self.type == "tool_search":
            given = self._given("description", "parameters")
            offer = Function.model_construct(name=self.type, strict=None, **given).offer(param)
            return [replace(offer, kind="tool_search")]
        if self.name is None:
            raise RequestError(f"{param}.name is required and missing", param=f"{param}.name")
        if self.type == "namespace":
            tools = enumerate(self.tools or [])
            return [offer for number, tool in tools for offer in tool.offers(f"{param}.tools.{number}", self.name)]
        model_name = qualified(self.name, namespace)
        if self.type == "custom":
            offer = Custom.model_construct(name=model_name, **self._given("description", "format")).offer(param)
        else:
            given = self._given("description", "parameters", "strict")
            offer = Function.model_construct(name=model_name, **given).offer(param)
        return [replace(offer, name=self.name, namespace=namespace)]

    def _given(self, *names: str) -> dict[str, Any]:
        return {name: getattr(self, name) for name in names}

    def shown(self) -> dict[str, Any]:
        """The tool as responses show it: as it was sent."""
        if not self.is_offered:  # its fields have not been checked
            return {name: value for name, value in self if value is not None}
        return self.model_dump(mode="json") | ({"tools": [tool.shown() for tool in self.tools]} if self.tools else {})

    def left_out(self) -> list[str]:
        """The types in this tool that a model is not offered."""
        if not self.is_offered:
            return [self.type]
        return [kind for tool in self.tools or [] for kind in tool.left_out()]

    @property
    def is_offered(self) -> bool:
        return _is_offered(self.type, (self.model_extra or {}).get("execution"))


def _is_offered(kind: str, execution: object) -> bool:
    """Whether the client runs tools of this type, so that a model can be offered them."""
    return kind in ("function", "custom", "namespace") or (kind == "tool_search" and execution == "client")


def _keep_hosted(value: object) -> object:
    """Keep a hosted service's tool unchecked: its fields are not ours to check."""
    kind = value.get("type") if isinstance(value, dict) else None
    if isinstance(value, dict) and isinstance(kind, str) and kind and not _is_offered(kind, value.get("execution")):
        return ResponseTool.model_construct(**value)
    return value


AnyTool = Annotated[ResponseTool, BeforeValidator(_keep_hosted, json_schema_input_type=ResponseTool)]


_Tools = TypeAdapter(list[AnyTool])


def _added_tools(item: InputItem, param: str) -> list[tuple[str, ResponseTool]]:
    """The tools that an item adds to those of the request, each with its path in the request."""
    if item.type not in ("additional_tools", "tool_search_output"):
        return []
    try:
        tools = _Tools.validate_python(item.get("tools") or [])
    except ValidationError as error:
        raise RequestError(f"{param}: {error.errors()[0]['msg']}", param=param) from None
    return [(f"{param}.{number}", tool) for number, tool in enumerate(tools)]


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
    generate_summary: str | None = optional()  # its older name


class ResponsesRequest(GenerationRequest):
    """POST /v1/responses."""

    input: Annotated[
        list[AnyItem],
        Field(min_length=1, max_length=MAX_MESSAGES),
        BeforeValidator(_check_input, json_schema_input_type=str | list[AnyItem]),
    ]
    instructions: str | None = None
    previous_response_id: str | None = None
    max_output_tokens: Annotated[int | None, Field(ge=1)] = None
    top_logprobs: Annotated[int | None, Field(ge=0, le=MAX_LOGPROBS)] = None
    include: list[str] | None = None
    tools: Annotated[list[AnyTool] | None, Field(max_length=MAX_TOOLS)] = None
    tool_choice: ToolChoice = None
    parallel_tool_calls: bool | None = None
    text: TextSettings | None = None
    reasoning: ReasoningSettings | None = None
    store: bool | None = None
    background: bool | None = None
    truncation: Literal["auto", "disabled"] | None = None
    max_tool_calls: Annotated[int | None, Field(ge=1)] = None  # of tools that the server runs: there are none
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    service_tier: str | None = None
    metadata: dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def refuse_unsupported(self) -> None:
        super().refuse_unsupported()
        if self.num_choices != 1:
            raise unsupported("n", self.n, "a response has one choice: leave it out, or use /v1/chat/completions")
        for name, instead in _OF_OTHER_ROUTES.items():
            if getattr(self, name) not in (None, False):
                raise unsupported(name, "...", f"send {instead} here")
        for name, (neutral, remedy) in _UNSUPPORTED.items():
            value = (self.model_extra or {}).get(name)
            if value is not None and value not in neutral:
                raise unsupported(name, value, remedy)
        for position, value in enumerate(self.include or []):
            if value not in _INCLUDE:
                raise unsupported(f"include.{position}", value, f"choose from {', '.join(_INCLUDE)}")
        if self.background and self.store is False:
            raise RequestError(
                "a response in the background is read from the store: leave store out, or send background=false",
                param="store",
            )

    @cached_property
    def toolbox(self) -> Toolbox:
        """The tools that the model is offered, and the types of the others."""
        tools = [(f"tools.{number}", tool) for number, tool in enumerate(self.tools or [])]
        offers = [offer for param, tool in tools for offer in tool.offers(param)]
        names = {offer.tool.name for offer in offers}
        for position, item in enumerate(self.input):
            added = _added_tools(item, f"input.{position}.tools")
            for offer in (offer for param, tool in added for offer in tool.offers(param)):
                if offer.tool.name not in names:  # a search may find the same tool again
                    names.add(offer.tool.name)
                    offers.append(offer)
            tools += added
        left_out = list(dict.fromkeys(kind for _, tool in tools for kind in tool.left_out()))
        for kind in left_out:
            warn_once("tools of type %s are left out of requests: only a hosted service can run them", kind)
        return Toolbox(offers, left_out)

    def choice(self) -> Choice:
        """What the model may call. Raises RequestError for invalid tools, and for a tool_choice that names an unknown
        one. Converts grammars, which takes milliseconds, so it belongs on a worker thread."""
        self.toolbox.check("tools")
        return choose(self.tool_choice, self.toolbox)

    @property
    def summarizes(self) -> bool:
        """Whether reasoning is returned where OpenAI returns summaries, which is what some clients show (Codex)."""
        settings = self.reasoning
        return settings is not None and (settings.summary or settings.generate_summary or "none") != "none"

    @property
    def seals_reasoning(self) -> bool:
        """Whether items of reasoning have `encrypted_content`."""
        return SEALED_REASONING in (self.include or [])

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
        if text_format.schema_ is not None:
            return schema_grammar(text_format.schema_, "text.format.schema")
        if text_format.type == "json_object":
            return GrammarSpec("json_object", param="text.format")
        raise RequestError("text.format.schema is missing: give the schema of the output", param="text.format.schema")


# ---- Answers ----


class OutputText(BaseModel):
    type: Literal["output_text"] = "output_text"
    text: str
    annotations: list[Any] = []
    logprobs: list[ChatTokenLogprob] = []


class ReasoningText(BaseModel):
    type: Literal["reasoning_text"] = "reasoning_text"
    text: str


class SummaryText(BaseModel):
    type: Literal["summary_text"] = "summary_text"
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
    summary: list[SummaryText] = []
    content: list[ReasoningText]
    encrypted_content: str | None = optional()
    status: Status


class FunctionCallItem(BaseModel):
    id: str
    type: Literal["function_call"] = "function_call"
    call_id: str
    name: str
    arguments: str
    namespace: str | None = optional()
    status: Status


class CustomCallItem(BaseModel):
    """A call of a custom tool, whose input is free text."""

    id: str
    type: Literal["custom_tool_call"] = "custom_tool_call"
    call_id: str
    name: str
    input: str
    namespace: str | None = optional()
    status: Status


class ToolSearchCallItem(BaseModel):
    """A call of the client's search for tools."""

    id: str
    type: Literal["tool_search_call"] = "tool_search_call"
    call_id: str
    execution: Literal["client"] = "client"
    arguments: Any
    status: Status


OutputItem = MessageItem | ReasoningItem | FunctionCallItem | CustomCallItem | ToolSearchCallItem


class InputTokensDetails(BaseModel):
    cached_tokens: int
    cache_write_tokens: int = 0  # which OpenAI charges for, so clients expect the field


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
    status: Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]
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
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float
    truncation: Literal["auto", "disabled"] = "disabled"
    usage: ResponseUsage | None = None
    user: str | None = None
    max_tool_calls: int | None = optional()
    prompt_cache_key: str | None = optional()
    safety_identifier: str | None = optional()
    service_tier: Literal["default"] | None = optional()
    metadata: dict[str, Any]


class ItemList(BaseModel):
    """A page of the items that a response answers."""

    object: Literal["list"] = "list"
    data: list[dict[str, Any]]
    first_id: str | None
    last_id: str | None
    has_more: bool


class InputTokens(BaseModel):
    object: Literal["response.input_tokens"] = "response.input_tokens"
    input_tokens: int


class DeletedResponse(BaseModel):
    id: str
    object: Literal["response"] = "response"
    deleted: Literal[True] = True
