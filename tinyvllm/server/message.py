"""Incremental parsing of a model's output into reasoning, content and tool calls."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from tinyvllm.text.reasoning import ReasoningFormat
from tinyvllm.text.tools.base import Tool, ToolFormat
from tinyvllm.text.tools.events import CallArguments, CallBegin, Event, Reasoning, Text, ToolParser
from tinyvllm.text.tools.harmony import HarmonyFormat


@dataclass(frozen=True)
class OutputFormat:
    """How the outputs of one request are parsed."""

    prompt: str = ""  # the end of the rendered prompt: it may have opened the reasoning
    harmony: HarmonyFormat | None = None  # reads everything, in place of `reasoning` and `tools`
    marks_special_tokens: bool = False  # with `harmony`
    is_chat: bool = True  # the answer has one text, however many messages the model writes
    reasoning: ReasoningFormat | None = None
    shows_reasoning: bool = True
    tools: ToolFormat | None = None  # None: do not look for calls
    functions: Mapping[str, Tool] = field(default_factory=dict)  # by name
    is_parallel: bool = True  # several calls are allowed

    def parser(self) -> MessageParser:
        return MessageParser(self)

    def count_reasoning(self, parsers: Iterable[MessageParser]) -> int | None:
        """The tokens of reasoning that the parsers of all choices have read; None without a format of reasoning."""
        return None if self.reasoning is None else sum(parser.num_reasoning_tokens for parser in parsers)


class MessageParser:
    """Parses one choice. The pieces, joined, do not depend on how the text is divided between pushes."""

    def __init__(self, format: OutputFormat) -> None:
        self._format = format
        self._reasoning = None
        if format.reasoning is not None and format.harmony is None:
            self._reasoning = format.reasoning.parser(format.prompt)
        self._tools = self._make_tool_parser()
        self._has_called = False
        self.num_reasoning_tokens = 0  # of the deltas that added to the reasoning, shown or not

    def _make_tool_parser(self) -> ToolParser | None:
        format = self._format
        if format.harmony is not None:
            return format.harmony.completion_parser(
                None if format.tools is None else format.functions,
                format.prompt,
                is_marked=format.marks_special_tokens,
                is_chat=format.is_chat,
                splits_reasoning=format.reasoning is not None,
            )
        return None if format.tools is None else format.tools.parser(format.functions)

    @property
    def is_plain(self) -> bool:
        """Whether every text is content, unchanged."""
        return self._reasoning is None and self._tools is None

    @property
    def num_calls(self) -> int:
        made = 0 if self._tools is None else self._tools.num_calls
        return made if self._format.is_parallel else min(made, 1)

    def push(self, text: str, num_tokens: int = 0) -> list[Event]:
        """Parse more text, of so many tokens. Returns the pieces that are now final."""
        reasoning, content = ("", text) if self._reasoning is None else self._reasoning.push(text)
        events: list[Event] = [Reasoning(reasoning)] if reasoning else []
        events += self._read_content(content)
        if any(isinstance(event, Reasoning) for event in events):
            self.num_reasoning_tokens += num_tokens
        return self._shown(events)

    def flush(self) -> list[Event]:
        """End the text. Returns the remaining pieces."""
        reasoning, content = ("", "") if self._reasoning is None else self._reasoning.flush()
        events: list[Event] = [Reasoning(reasoning)] if reasoning else []
        events += self._read_content(content)
        return self._shown(events + (self._tools.flush() if self._tools is not None else []))

    def finish_reason(self, reason: str) -> str:
        """OpenAI's finish_reason for a choice that the engine ended with `reason`."""
        return "tool_calls" if reason == "stop" and self.num_calls else reason

    def _read_content(self, text: str) -> list[Event]:
        if not text:
            return []
        return [Text(text)] if self._tools is None else self._tools.push(text)

    def _shown(self, events: Sequence[Event]) -> list[Event]:
        """`events` as the request and the server's settings want them: up to the first call if only one is allowed,
        and without reasoning if it is left out."""
        kept: list[Event] = []
        for event in events:
            if isinstance(event, CallBegin) and event.index == 0:
                self._has_called = True
            if self._is_after_only_call(event):
                continue
            if not isinstance(event, Reasoning) or self._format.shows_reasoning:
                kept.append(event)
        return kept

    def _is_after_only_call(self, event: Event) -> bool:
        if self._format.is_parallel:
            return False
        return event.index > 0 if isinstance(event, CallBegin | CallArguments) else self._has_called


@dataclass
class ParsedCall:
    """A complete tool call."""

    id: str
    name: str
    arguments: str = ""


@dataclass
class ParsedMessage:
    """The complete message of one choice."""

    reasoning: str = ""
    content: str = ""
    calls: list[ParsedCall] = field(default_factory=list)

    def add_all(self, pieces: Sequence[Event], format: OutputFormat) -> None:
        for piece in pieces:
            self.add(piece, format)

    def add(self, piece: Event, format: OutputFormat) -> None:
        match piece:
            case Reasoning():
                self.reasoning += piece.text
            case Text():
                self.content += piece.text
            case CallBegin():
                assert format.tools is not None
                self.calls.append(ParsedCall(format.tools.make_id(), piece.name))
            case CallArguments():
                self.calls[-1].arguments += piece.text
