"""The events that a tool call parser produces, and the base class of all parsers.

Every parser is a state machine that reads single characters, so the result does not depend on how the text is split.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass


@dataclass(frozen=True)
class Reasoning:
    """A piece of the model's reasoning."""

    text: str


@dataclass(frozen=True)
class Text:
    """Text for the user."""

    text: str


@dataclass(frozen=True)
class CallBegin:
    """The start of a function call; its arguments follow. index counts the calls of the message."""

    index: int
    name: str


@dataclass(frozen=True)
class CallArguments:
    """The next piece of a call's arguments, as JSON."""

    index: int
    text: str


Event = Reasoning | Text | CallBegin | CallArguments


def joined(events: list[Event]) -> list[Event]:
    """The events, with adjacent ones of the same kind merged."""
    out: list[Event] = []
    for event in events:
        last = out[-1] if out else None
        if isinstance(event, Text) and isinstance(last, Text):
            out[-1] = Text(last.text + event.text)
        elif isinstance(event, Reasoning) and isinstance(last, Reasoning):
            out[-1] = Reasoning(last.text + event.text)
        elif isinstance(event, CallArguments) and isinstance(last, CallArguments) and event.index == last.index:
            out[-1] = CallArguments(event.index, last.text + event.text)
        else:
            out.append(event)
    return out


class ToolParser(ABC):
    """Splits one message into text and calls. Owns the characters that may still become either.

    Whitespace between text and a call, and between calls, belongs to the format and is dropped.
    """

    def __init__(self) -> None:
        self.num_calls = 0
        self._blanks = ""  # held back: whitespace that is text only if more text follows
        self._is_after_call = False

    def push(self, text: str) -> list[Event]:
        """The events that are now final."""
        events: list[Event] = []
        for character in text:
            events += self._read(character)
        return joined(events)

    @abstractmethod
    def flush(self) -> list[Event]:
        """The rest, when no more text follows."""

    @abstractmethod
    def _read(self, character: str) -> list[Event]: ...

    def _text(self, text: str) -> list[Event]:
        """Text, except its trailing whitespace, which is held back."""
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
        """Pass on the events of a call, and count the calls in them."""
        for event in events:
            if isinstance(event, CallBegin):
                self._blanks, self._is_after_call = "", True
                self.num_calls += 1
        return events
