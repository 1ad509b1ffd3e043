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
from tinyvllm.server.sampling import SpecialTokens
from tinyvllm.server.text_limits import Fit
from tinyvllm.text.continuation import cut_at_mark, mark_end
from tinyvllm.text.grammar import lark_json
from tinyvllm.text.json_schema import parse_schema
from tinyvllm.text.reasoning import FORMATS, ReasoningFormat, find_reasoning_format
from tinyvllm.text.tools import find_tool_format, harmony
from tinyvllm.text.tools.base import Tool, ToolFormat
from tinyvllm.text.tools.harmony import HarmonyFormat

if TYPE_CHECKING:
    from tinyvllm.config import EngineConfig
    from tinyvllm.engine.async_engine import AsyncEngine
    from tinyvllm.text.tokenizer import Tokenizer

JSON_KINDS = ("json_object", "json_schema")


@dataclass(frozen=True)
class Conversation:
    """A conversation as the routes hand it over, whatever its wire format."""

    messages: Sequence[Mapping[str, Any]]  # in the client's order; `text/template_adapter` fits them to the template
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
    is_chat: bool = True  # the answer has one text; otherwise each message of the model's is an item

    @property
    def has_tools(self) -> bool:
        return bool(self.tools) and self.tool_choice != "none"


@dataclass(frozen=True)
class Prompt:
    """What the engine is asked, and how to parse what it answers."""

    ids: list[int]
    grammar: GrammarSpec | None
    format: OutputFormat
    special_tokens: SpecialTokens  # "keep" or "mark": marks of calls or reasoning are among them


def make_prompt(conversation: Conversation, engine: AsyncEngine, fit: Fit | None = None) -> Prompt:
    """Render and encode. Takes milliseconds for long chats, so it belongs on a worker thread.

    fit: what is encoded of the rendered chat; None: all of it. Raises RequestError for messages that the template
    refuses and for tools whose schema cannot be enforced.
    """
    template = engine.chat_template
    if template is None:
        raise RequestError(
            "this model has no chat template: use /v1/completions, or start the server with --chat-template FILE",
            param="messages",
        )
    formats = Formats.find(engine.config, template.source)
    tools = conversation.tools if conversation.has_tools else ()
    arguments = formats.template_arguments(conversation.template_arguments)
    messages = mark_end(conversation.messages) if conversation.continue_final_message else conversation.messages
    with request_span(measure.TEMPLATE):
        has_template = template.renders_tools()
        text = template.render(
            formats.tools.prepare(messages, tools, has_template=has_template),
            tools=list(conversation.tools_for_template) if tools and has_template else None,
            add_generation_prompt=conversation.add_generation_prompt,
            tool_format=formats.tools,
            **arguments,
        )
    if conversation.continue_final_message:
        text = cut_at_mark(text, conversation.messages)
    elif formats.harmony is not None and not tools and arguments.get("enable_thinking") is False:
        text += formats.harmony.without_reasoning()
    special_tokens = formats.special_tokens(engine.tokenizer, has_tools=bool(tools))
    output = OutputFormat(
        prompt=text[-100:] if formats.harmony is None else formats.harmony.opening(text),
        harmony=formats.harmony,
        marks_special_tokens=special_tokens == "mark",
        is_chat=conversation.is_chat,
        reasoning=formats.reasoning,
        shows_reasoning=conversation.shows_reasoning,
        tools=formats.tools if tools else None,
        functions={tool.name: tool for tool in tools},
        is_parallel=conversation.is_parallel,
    )
    grammar = _grammar(conversation, formats, engine) if tools else conversation.grammar
    if grammar is not None:
        # with tools, the grammar contains the headers of harmony's messages
        grammar = replace(grammar, prefix=formats.prefix(text, engine.tokenizer, has_header=bool(tools)))
    with request_span(measure.TOKENIZE):
        ids = engine.tokenizer.encode_chat(text if fit is None else fit(text))
    return Prompt(ids=ids, grammar=grammar, format=output, special_tokens=special_tokens)


@dataclass(frozen=True)
class Formats:
    """How a model writes calls and reasoning."""

    tools: ToolFormat
    reasoning: ReasoningFormat | None
    harmony: HarmonyFormat | None  # reads both at once

    @classmethod
    def find(cls, config: EngineConfig, template_source: str) -> Formats:
        tools = find_tool_format(config.tool_call_parser, template_source)
        reasoning = find_reasoning_format(config.reasoning_parser, template_source)
        is_harmony = tools is harmony.FORMAT or (config.tool_call_parser is None and reasoning is FORMATS["harmony"])
        if not is_harmony:
            return cls(tools, reasoning, None)
        if config.reasoning_parser is None:
            reasoning = FORMATS["harmony"]
        return cls(harmony.FORMAT, reasoning, harmony.FORMAT)

    def template_arguments(self, arguments: Mapping[str, Any]) -> Mapping[str, Any]:
        return arguments if self.harmony is None else self.harmony.template_arguments(arguments)

    def special_tokens(self, tokenizer: Tokenizer, *, has_tools: bool) -> SpecialTokens:
        """What the parser of the output needs of special tokens."""
        if self.harmony is not None:
            return "mark" if self.harmony.shows_special_tokens(tokenizer) else "skip"
        shown = has_tools and self.tools.shows_special_tokens(tokenizer)
        shown = shown or (self.reasoning is not None and self.reasoning.shows_special_tokens(tokenizer))
        return "keep" if shown else "skip"

    def prefix(self, prompt: str, tokenizer: Tokenizer, *, has_header: bool) -> str:
        """See GrammarSpec.prefix. has_header: the answer's grammar contains the headers of harmony's messages."""
        if self.harmony is not None:
            return self.harmony.prefix(prompt, tokenizer, has_header=has_header)
        return "" if self.reasoning is None else self.reasoning.prefix(prompt, tokenizer)

    def document_head(self, tokenizer: Tokenizer) -> str:
        """What precedes an answer that is a document, in a Lark rule."""
        return "" if self.harmony is None else f"{self.harmony.document_head(tokenizer)} "


def _grammar(conversation: Conversation, formats: Formats, engine: AsyncEngine) -> GrammarSpec | None:
    """The grammar of the output of a request with tools; None: the output is unconstrained."""
    tools, answer, format = conversation.tools, conversation.grammar, formats.tools
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
    head = formats.document_head(engine.tokenizer)
    text = f"start: calls | {head}document\ndocument: {lark_json(schema, answer.param)}\n"
    return GrammarSpec("lark", text + calls.replace("start:", "calls:", 1), param=answer.param)
