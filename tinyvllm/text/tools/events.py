"""What a parser makes of a model's text, and what all parsers share.

Every parser is a machine that reads characters one by one, so that the calls are the same however a text is cut.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass


@dataclass(frozen=True)
class Text:
    """Words for the user."""

    text: str


@dataclass(frozen=True)
class CallBegin:
    """A call of a function; its arguments follow. index counts the message's calls."""

    index: int
    name: str


@dataclass(frozen=True)
class CallArguments:
    """The next piece of a call's arguments, as JSON."""

    index: int
    text: str


Event = Text | CallBegin | CallArguments


def joined(events: list[Event]) -> list[Event]:
    """Neighbours of one kind as one event."""
    out: list[Event] = []
    for event in events:
        last = out[-1] if out else None
        if isinstance(event, Text) and isinstance(last, Text):
            out[-1] = Text(last.text + event.text)
        elif isinstance(event, CallArguments) and isinstance(last, CallArguments) and event.index == last.index:
            out[-1] = CallArguments(event.index, last.text + event.text)
        else:
            out.append(event)
    return out


class ToolParser(ABC):
    """Splits one message into text and calls. Owns what may yet become either.

    Blanks between text and a call, and between calls, are the format's and are left out.
    """

    def __init__(self) -> None:
        self.num_calls = 0
        self._blanks = ""  # held: they are text only if text follows
        self._is_after_call = False

    def push(self, text: str) -> list[Event]:
        """What has become certain."""
        events: list[Event] = []
        for character in text:
            events += self._read(character)
        return joined(events)

    @abstractmethod
    def flush(self) -> list[Event]:
        """The rest, once nothing follows."""

    @abstractmethod
    def _read(self, character: str) -> list[Event]: ...

    def _text(self, text: str) -> list[Event]:
        """Text, its blanks at the end held back."""
        text = self._blanks + text
        kept = text.rstrip()
        self._blanks = text[len(kept) :]
        if not kept:
            return []
        if self._is_after_call:
            kept = kept.lstrip()
        self._is_after_call = False
        return [Text(kept)]

    def _end_text(self) -> list[Event]:
        blanks, self._blanks = self._blanks, ""
        return [Text(blanks)] if blanks and not self._is_after_call else []

    def _called(self, events: list[Event]) -> list[Event]:
        """Events of a call, noted."""
        for event in events:
            if isinstance(event, CallBegin):
                self._blanks, self._is_after_call = "", True
                self.num_calls += 1
        return events
