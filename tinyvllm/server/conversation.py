"""From messages and tools to a prompt, the grammar of its output, and the format to parse the output with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from tinyvllm.config import GrammarSpec
from tinyvllm.errors import RequestError
from tinyvllm.profiling import measure
from tinyvllm.server.context import request_span
from tinyvllm.server.message import OutputFormat
from tinyvllm.text.grammar import lark_json
from tinyvllm.text.json_schema import parse_schema
from tinyvllm.text.reasoning import find_reasoning_format
from tinyvllm.text.tools import find_tool_format
from tinyvllm.text.tools.base import Tool, ToolFormat

if TYPE_CHECKING:
    from tinyvllm.engine.async_engine import AsyncEngine

JSON_KINDS = ("json_object", "json_schema")


@dataclass(frozen=True)
class Conversation:
    """A conversation as the routes hand it over, whatever its wire format."""

    messages: Sequence[Mapping[str, Any]]  # as templates expect them
    tools: Sequence[Tool] = ()
    tools_for_template: Sequence[Mapping[str, Any]] = ()
    tool_choice: Literal["none", "auto", "required"] = "auto"
    named_tool: str | None = None  # the one that must be called
    is_parallel: bool = True
    grammar: GrammarSpec | None = None  # of an answer that is not a call
    shows_reasoning: bool = True
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    template_arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def has_tools(self) -> bool:
        return bool(self.tools) and self.tool_choice != "none"


@dataclass(frozen=True)
class Prompt:
    """What the engine is asked, and how to parse what it answers."""

    ids: list[int]
    grammar: GrammarSpec | None
    format: OutputFormat
    keeps_special_tokens: bool  # marks of calls or reasoning are special tokens, so they must appear in the text


def make_prompt(conversation: Conversation, engine: AsyncEngine) -> Prompt:
    """Render and encode. Takes milliseconds for long chats, so it belongs on a worker thread.

    Raises RequestError for messages that the template refuses and for tools whose schema cannot be enforced.
    """
    template = engine.chat_template
    if template is None:
        raise RequestError(
            "this model has no chat template: use /v1/completions, or start the server with --chat-template FILE",
            param="messages",
        )
    tool_format = find_tool_format(engine.config.tool_call_parser, template.source)
    reasoning = find_reasoning_format(engine.config.reasoning_parser, template.source)
    tools = conversation.tools if conversation.has_tools else ()
    with request_span(measure.TEMPLATE):
        text = template.render(
            tool_format.prepare(conversation.messages, tools, has_template="tools" in template.source),
            tools=list(conversation.tools_for_template) if tools else None,
            add_generation_prompt=conversation.add_generation_prompt,
            **conversation.template_arguments,
        )
    if conversation.continue_final_message:
        text = cut_after(text, str(conversation.messages[-1]["content"]))
    grammar = _grammar(conversation, tool_format, engine) if tools else conversation.grammar
    if grammar is not None and reasoning is not None:
        grammar = replace(grammar, prefix=reasoning.prefix(text, engine.tokenizer))
    output = OutputFormat(
        prompt=text[-100:],
        reasoning=reasoning,
        shows_reasoning=conversation.shows_reasoning,
        tools=tool_format if tools else None,
        tool_names=frozenset(tool.name for tool in tools),
        is_parallel=conversation.is_parallel,
    )
    keeps = bool(tools) and tool_format.shows_special_tokens(engine.tokenizer)
    keeps = keeps or (reasoning is not None and reasoning.shows_special_tokens(engine.tokenizer))
    with request_span(measure.TOKENIZE):
        ids = engine.tokenizer.encode_chat(text)
    return Prompt(ids=ids, grammar=grammar, format=output, keeps_special_tokens=keeps)


def _grammar(conversation: Conversation, format: ToolFormat, engine: AsyncEngine) -> GrammarSpec | None:
    """The grammar of the output of a request with tools; None: the output is unconstrained."""
    tools, answer = conversation.tools, conversation.grammar
    if conversation.named_tool is not None:
        tools = [tool for tool in tools if tool.name == conversation.named_tool]
    if conversation.tool_choice == "required":  # the output is always a call, so `answer` does not apply
        text = format.forced_grammar(tools, engine.tokenizer, is_parallel=conversation.is_parallel)
        return GrammarSpec("lark", text, param="tools")
    if answer is None:
        is_bound = any(tool.is_strict for tool in tools)
        return GrammarSpec("lark", format.free_grammar(tools, engine.tokenizer), param="tools") if is_bound else None
    if answer.kind not in JSON_KINDS:
        raise RequestError(
            f"{answer.param} cannot constrain an answer that may be a tool call: send tool_choice 'none' or "
            "'required', or leave the tools out",
            param=answer.param,
        )
    schema = parse_schema(answer.text, answer.param) if answer.kind == "json_schema" else {"type": "object"}
    calls = format.forced_grammar(tools, engine.tokenizer, is_parallel=conversation.is_parallel)
    text = f"start: calls | document\ndocument: {lark_json(schema, answer.param)}\n"
    return GrammarSpec("lark", text + calls.replace("start:", "calls:", 1), param=answer.param)


def cut_after(text: str, last_content: str) -> str:
    """`text` without what the template puts after the last message's content, so that the model continues it."""
    content = last_content.strip()  # templates strip it
    start = text.rfind(content) if content else -1
    if start < 0:
        raise RequestError(
            "continue_final_message needs a last message whose content the chat template renders unchanged",
            param="continue_final_message",
        )
    return text[: start + len(content)]
