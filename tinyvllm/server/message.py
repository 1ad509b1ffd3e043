"""A model's words as a message: reasoning, content and tool calls, told apart while they come."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from tinyvllm.text.reasoning import ReasoningFormat
from tinyvllm.text.tools.base import ToolFormat
from tinyvllm.text.tools.events import CallArguments, CallBegin, Event, Text


@dataclass(frozen=True)
class Reasoning:
    """What the model thinks."""

    text: str


Piece = Reasoning | Event


@dataclass(frozen=True)
class OutputFormat:
    """How the outputs of one request are to be read."""

    prompt: str = ""  # rendered: it may end within reasoning
    reasoning: ReasoningFormat | None = None
    shows_reasoning: bool = True
    tools: ToolFormat | None = None  # None: no calls are looked for
    tool_names: frozenset[str] = frozenset()
    is_parallel: bool = True  # several calls may be made

    def reader(self) -> MessageReader:
        return MessageReader(self)


class MessageReader:
    """Reads one choice. What it returns, joined, does not depend on how the text is cut."""

    def __init__(self, format: OutputFormat) -> None:
        self._format = format
        self._reasoning = None if format.reasoning is None else format.reasoning.parser(format.prompt)
        self._tools = None if format.tools is None else format.tools.parser(format.tool_names)
        self._has_called = False

    @property
    def num_calls(self) -> int:
        made = 0 if self._tools is None else self._tools.num_calls
        return made if self._format.is_parallel else min(made, 1)

    def push(self, text: str) -> list[Piece]:
        """What has become certain."""
        if self._reasoning is None:
            return self._read_content(text)
        reasoning, content = self._reasoning.push(text)
        return self._shown(reasoning) + self._read_content(content)

    def flush(self) -> list[Piece]:
        """The rest, once nothing follows."""
        reasoning, content = ("", "") if self._reasoning is None else self._reasoning.flush()
        pieces = self._shown(reasoning) + self._read_content(content)
        return pieces + (self._allowed(self._tools.flush()) if self._tools is not None else [])

    def finish_reason(self, reason: str) -> str:
        """OpenAI's, of a choice that the engine ended for `reason`."""
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
        """Without parallel calls the message ends with its first call."""
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
class MessageCall:
    """A call, gathered."""

    id: str
    name: str
    arguments: str = ""


@dataclass
class Message:
    """One choice, gathered."""

    reasoning: str = ""
    content: str = ""
    calls: list[MessageCall] = field(default_factory=list)

    @classmethod
    def read(cls, text: str, format: OutputFormat) -> tuple[Message, MessageReader]:
        reader, message = format.reader(), cls()
        for piece in reader.push(text) + reader.flush():
            message.add(piece, format)
        return message, reader

    def add(self, piece: Piece, format: OutputFormat) -> None:
        match piece:
            case Reasoning():
                self.reasoning += piece.text
            case Text():
                self.content += piece.text
            case CallBegin():
                assert format.tools is not None
                self.calls.append(MessageCall(format.tools.make_id(), piece.name))
            case CallArguments():
                self.calls[-1].arguments += piece.text
