"""The wire format of /v1/messages: https://docs.anthropic.com/en/api/messages

Content blocks stay dicts here, because there are many kinds and most mean nothing to a model that reads text.
`history.py` has the rules by which they are read.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from tinyvllm.config import MAX_STOP_STRINGS, GrammarSpec
from tinyvllm.errors import RequestError
from tinyvllm.server.anthropic.blocks import Block
from tinyvllm.server.notices import warn_once
from tinyvllm.server.openai.protocol.chat import RESERVED_TEMPLATE_NAMES
from tinyvllm.server.openai.protocol.common import effort_arguments, optional

MAX_MESSAGES = 100_000  # Anthropic's limit
MAX_TOOLS = 1024

# Known fields without effect: bookkeeping, and hints to a hosted service.
_IGNORED = frozenset((
    "billing_policy", "cache_control", "diagnostics", "fallback_credit_token", "inference_geo", "metadata",
    "service_tier", "speed", "user_profile_id", "workspace_id",
))  # fmt: skip
# Fields that ask for more than generation, with the values that ask for nothing.
_LEFT_OUT: dict[str, tuple[object, ...]] = {
    "container": (),
    # Claude Code sends the last one: all thoughts stay
    "context_management": ({}, {"edits": []}, {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}),
    "fallbacks": ([],),
    "mcp_servers": ([],),
    "safeguards": ([],),  # Claude Code's check of dangerous calls: without results, it asks the user
}

# Fields without which a request would mean something else: what to do instead, and the error code that SDKs recognize.
# On the one for `thread`, they send the whole conversation.
_REFUSED = {
    "thread": ("conversations are not stored: send all messages, without it", "thread_unsupported_request"),
    "compaction": ("ask for a summary in a message instead", None),
}

# Efforts that templates do not know, and the nearest that they do.
_EFFORTS = {"xhigh": "high", "max": "high"}


def _check_content(value: object) -> object:
    """A string, or a list of blocks, each with a type."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError("give a string or a list of content blocks")
    for position, block in enumerate(value):
        if not isinstance(block, dict) or not isinstance(block.get("type"), str):
            example = '{"type": "text", "text": "..."}'
            raise ValueError(f"block {position} is not an object with a type, such as {example}")
    return value


Content = Annotated[Any, BeforeValidator(_check_content, json_schema_input_type=str | list[dict[str, Any]])]


class OutputFormat(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True, populate_by_name=True)

    type: Literal["json_schema"]
    schema_: Annotated[dict[str, Any], Field(alias="schema")]


class OutputConfig(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)

    effort: str | None = None
    format: OutputFormat | None = None


class Message(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)

    role: Literal["user", "assistant", "system"]  # system: instructions in the middle of a conversation
    content: Content | None = None  # optional for system messages only
    clear_at: Literal["next_user_message", "never"] | None = None  # of a system message
    output_config: OutputConfig | None = None  # of a system message: the effort from here on


class Thinking(BaseModel):
    """budget_tokens is accepted, but the length of the reasoning is up to the model."""

    model_config = ConfigDict(extra="allow", strict=True)

    type: Literal["enabled", "disabled", "adaptive", "between_tools"]
    budget_tokens: int | None = None
    display: str | None = None  # all but "omitted" show the whole reasoning: "summarized", and Claude Code's "updates"


class ToolChoice(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None  # with "tool"
    disable_parallel_tool_use: bool | None = None


class CountTokensRequest(BaseModel):
    """POST /v1/messages/count_tokens: what makes the prompt."""

    model_config = ConfigDict(extra="allow", strict=True)

    model: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    system: Annotated[
        Any, BeforeValidator(lambda value: None if value is None else _check_content(value), str | list[Block] | None)
    ] = None
    tools: Annotated[list[dict[str, Any]] | None, Field(max_length=MAX_TOOLS)] = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None  # its place before output_config
    chat_template_kwargs: dict[str, Any] | None = None  # vLLM's: additional variables of the template

    def note_extras(self) -> None:
        """Log the fields that have no effect, once each. Raises RequestError for reserved template variables."""
        for name, value in (self.model_extra or {}).items():
            if name in _LEFT_OUT:
                if value is not None and value not in _LEFT_OUT[name]:
                    warn_once("the request field %s asks for what this server cannot do, and has no effect", name)
            elif name not in _KNOWN:
                warn_once("the request field %s is unknown and has no effect", name)
        for name in RESERVED_TEMPLATE_NAMES:
            if name in (self.chat_template_kwargs or {}):
                raise RequestError(
                    f"chat_template_kwargs may not contain {name!r}: the server sets it from the request's own fields",
                    param="chat_template_kwargs",
                )

    @property
    def hides_thinking(self) -> bool:
        """Whether the answer has no thinking blocks, even if the model thinks."""
        return self.thinking is not None and self.thinking.type == "disabled"

    @property
    def omits_thoughts(self) -> bool:
        """Whether thinking blocks have no text."""
        return self.thinking is not None and self.thinking.display == "omitted"

    @property
    def template_arguments(self) -> dict[str, Any]:
        """Variables of the template. Without `thinking`, whether to think is up to the template."""
        configs = (self.output_config, *(message.output_config for message in self.messages))
        effort = next((config.effort for config in reversed(configs) if config is not None and config.effort), None)
        arguments = effort_arguments(effort if effort is None else _EFFORTS.get(effort, effort))
        if self.thinking is not None and self.thinking.type != "adaptive":
            thinks = self.thinking.type != "disabled"
            arguments |= {"enable_thinking": thinks, "thinking": thinks}  # templates know one or the other
        return arguments | (self.chat_template_kwargs or {})

    def grammar(self) -> GrammarSpec | None:
        """The grammar of the answer's text, if its form is given."""
        given = self.output_config.format if self.output_config is not None else None
        param = "output_config.format.schema"
        if given is None:
            given, param = self.output_format, "output_format.schema"
        return None if given is None else GrammarSpec("json_schema", json.dumps(given.schema_), param=param)


class MessagesRequest(CountTokensRequest):
    """POST /v1/messages."""

    max_tokens: Annotated[int, Field(ge=0)]  # 0: compute the prompt for the prefix cache, and generate nothing
    stream: bool | None = None
    stop_sequences: Annotated[list[Annotated[str, Field(min_length=1)]] | None, Field(max_length=MAX_STOP_STRINGS)] = (
        None
    )
    temperature: Annotated[float | None, Field(ge=0)] = None
    top_p: float | None = None
    top_k: int | None = None
    cache_salt: Annotated[str | None, Field(min_length=1)] = None  # vLLM's: who may share the prompt's cached prefix

    def refuse_unsupported(self) -> None:
        """Raise RequestError for a field that asks for another kind of answer."""
        for name, (remedy, code) in _REFUSED.items():
            if (self.model_extra or {}).get(name) is not None:
                raise RequestError(f"{name} is not supported: {remedy}", param=name, code=code)


# Extra fields that are not logged: those of either request, because the tokens of the same body may be counted.
_KNOWN = _IGNORED | _REFUSED.keys() | MessagesRequest.model_fields.keys()


# ---- Answers ----


class OutputTokensDetails(BaseModel):
    thinking_tokens: int


class Usage(BaseModel):
    """The prompt's tokens are input_tokens + cache_read_input_tokens. Nothing is charged for writing the cache, so
    tokens that are now cached for the first time count as input."""

    input_tokens: int
    cache_creation_input_tokens: Literal[0] = 0
    cache_read_input_tokens: int
    output_tokens: int
    output_tokens_details: OutputTokensDetails | None = optional()
    service_tier: Literal["standard"] | None = optional("standard")


class TextBlock(BaseModel):
    type: Literal["text"] = "text"
    text: str = ""


class ThinkingBlock(BaseModel):
    type: Literal["thinking"] = "thinking"
    thinking: str = ""
    signature: str = ""


class ToolUseBlock(BaseModel):
    type: Literal["tool_use"] = "tool_use"
    id: str
    name: str
    input: dict[str, Any] = {}


StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use", "model_context_window_exceeded"]


class MessageAnswer(BaseModel):
    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    model: str
    content: list[TextBlock | ThinkingBlock | ToolUseBlock]
    stop_reason: StopReason | None
    stop_sequence: str | None
    usage: Usage


class TokenCount(BaseModel):
    input_tokens: int


class ErrorDetails(BaseModel):
    error_code: str


class ErrorObject(BaseModel):
    type: str
    message: str
    details: ErrorDetails | None = optional()


class ErrorAnswer(BaseModel):
    """The body of every answer with a status of 400 or above."""

    type: Literal["error"] = "error"
    error: ErrorObject
    request_id: str
