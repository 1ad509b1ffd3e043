"""Calls that are read when the block that holds them is complete: their notation is not JSON."""

from __future__ import annotations

import json
from abc import abstractmethod
from typing import Any

from tinyvllm.text.tools.events import CallArguments, CallBegin, Event, ToolParser, joined
from tinyvllm.text.tools.marks import MarkFinder


class BlockParser(ToolParser):
    """Text, and between marks a block that is read when it is complete."""

    def __init__(self, begin: str, end: str) -> None:
        super().__init__()
        self._begin, self._end = MarkFinder(begin), MarkFinder(end)
        self._marks = begin, end
        self._body: str | None = None

    @abstractmethod
    def read_block(self, body: str) -> list[tuple[str, dict[str, Any]]] | None:
        """The calls of a block: names and arguments. None if it holds anything else."""

    def _read(self, character: str) -> list[Event]:
        if self._body is None:
            text, is_found = self._begin.read(character)
            if is_found:
                self._body = ""
            return self._text(text) if text else []
        text, is_found = self._end.read(character)
        self._body += text
        return self._close(self._marks[1]) if is_found else []

    def _close(self, end: str) -> list[Event]:
        assert self._body is not None
        body, self._body = self._body, None
        calls = self.read_block(body)
        if not calls:
            return self._text(self._marks[0] + body + end)
        events: list[Event] = []
        for name, arguments in calls:
            index = self.num_calls
            text = json.dumps(arguments, ensure_ascii=False)
            events += self._called([CallBegin(index, name), CallArguments(index, text)])
        return events

    def flush(self) -> list[Event]:
        """A block whose end is missing is read as if it were there."""
        events = self._text(self._begin.held) if self._body is None else self._close_rest(self._body)
        return joined(events + self._end_text())

    def _close_rest(self, body: str) -> list[Event]:
        held = self._end.held
        if self.read_block(body):
            return self._close("")
        self._body = body + held
        return self._close("")
