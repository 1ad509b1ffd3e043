"""Incremental parsing of a model's output into reasoning, content and tool calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from tinyvllm.text.reasoning import ReasoningFormat
from tinyvllm.text.tools.base import ToolFormat
from tinyvllm.text.tools.events import CallArguments, CallBegin, Event, Text


@dataclass(frozen=True)
class Reasoning:
    """A piece of the model's reasoning."""

    text: str


Piece = Reasoning | Event


@dataclass(frozen=True)
class OutputFormat:
    """How the outputs of one request are parsed."""

    prompt: str = ""  # the end of the rendered prompt: it may have opened the reasoning
    reasoning: ReasoningFormat | None = None
    shows_reasoning: bool = True
    tools: ToolFormat | None = None  # None: do not look for calls
    tool_names: frozenset[str] = frozenset()
    is_parallel: bool = True  # several calls are allowed

    def parser(self) -> MessageParser:
        return MessageParser(self)


class MessageParser:
    """Parses one choice. The pieces, joined, do not depend on how the text is divided between pushes."""

    def __init__(self, format: OutputFormat) -> None:
        self._format = format
        self._reasoning = None if format.reasoning is None else format.reasoning.parser(format.prompt)
        self._tools = None if format.tools is None else format.tools.parser(format.tool_names)
        self._has_called = False

    @property
    def is_plain(self) -> bool:
        """Whether every text is content, unchanged."""
        return self._reasoning is None and self._tools is None

    @property
    def num_calls(self) -> int:
        made = 0 if self._tools is None else self._tools.num_calls
        return made if self._format.is_parallel else min(made, 1)

    def push(self, text: str) -> list[Piece]:
        """Parse more text. Returns the pieces that are now final."""
        if self._reasoning is None:
            return self._read_content(text)
        reasoning, content = self._reasoning.push(text)
        return self._shown(reasoning) + self._read_content(content)

    def flush(self) -> list[Piece]:
        """End the text. Returns the remaining pieces."""
        reasoning, content = ("", "") if self._reasoning is None else self._reasoning.flush()
        pieces = self._shown(reasoning) + self._read_content(content)
        return pieces + (self._allowed(self._tools.flush()) if self._tools is not None else [])

    def finish_reason(self, reason: str) -> str:
        """OpenAI's finish_reason for a choice that the engine ended with `reason`."""
        return "tool_calls" if reason == "stop" and self.num_calls else reason

    def _shown(self, reasoning: str) -> list[Piece]:
        return [Reasoning(reasoning)] if reasoning and self._format.shows_reasoning else []

    def _read_content(self, text: str) -> list[Piece]:
        if not text:
            return []
        if self._tools is None:
            return [Text(text)]
        return self._allowed(self._tools.push(text))

    def _allowed(self, events: Sequence[Event]) -> list[Piece]:
        """`events`, up to the first call if only one is allowed."""
        if self._format.is_parallel:
            return list(events)
        kept: list[Piece] = []
        for event in events:
            is_further = not isinstance(event, Text) and event.index > 0
            if isinstance(event, CallBegin) and event.index == 0:
                self._has_called = True
            if not is_further and not (isinstance(event, Text) and self._has_called):
                kept.append(event)
        return kept


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

    @classmethod
    def parse(cls, text: str, format: OutputFormat) -> tuple[ParsedMessage, MessageParser]:
        parser, message = format.parser(), cls()
        for piece in parser.push(text) + parser.flush():
            message.add(piece, format)
        return message, parser

    def add(self, piece: Piece, format: OutputFormat) -> None:
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
