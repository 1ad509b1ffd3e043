"""Formats with a mark and then a JSON list of calls: Granite 3 and Phi-4-mini."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tinyvllm.text.tools.base import TEXT_RULE, Tool, ToolFormat, call_rules, mark, marked_head
from tinyvllm.text.tools.events import Event, ToolParser, joined
from tinyvllm.text.tools.json_calls import ListReader
from tinyvllm.text.tools.marks import MarkFinder

if TYPE_CHECKING:
    from tinyvllm.text.tokenizer import Tokenizer


class MarkedListParser(ToolParser):
    """Text, and after a mark a call, several, or a list of them. The end mark may be missing."""

    def __init__(self, begins: Sequence[str], end: str | None) -> None:
        super().__init__()
        self._begin = MarkFinder(*begins)
        self._end_mark = end
        self._end: MarkFinder | None = None  # set after a list, where an end mark may follow
        self._body: ListReader | None = None
        self._raw = ""  # emitted as text if it turns out not to be a call

    def _read(self, character: str) -> list[Event]:
        if self._body is not None:
            return self._read_body(self._body, character)
        if self._end is not None:
            return self._read_end(self._end, character)
        return self._read_text(character)

    def _read_text(self, character: str) -> list[Event]:
        before = self._begin.held
        text, is_found = self._begin.read(character)
        if is_found:
            self._body, self._raw = ListReader(self.num_calls, separators=",;"), before + character
        return self._text(text) if text else []

    def _read_body(self, body: ListReader, character: str) -> list[Event]:
        was_reported = not body.is_pending
        events = self._called(body.read(character))
        if was_reported or not body.is_pending:
            self._raw = ""
        if not was_reported or body.state == "broken":
            self._raw += character
        if body.state == "open":
            return events
        self._body = None
        if body.num_reported == 0:
            return events + self._text(self._raw)
        self._end = None if self._end_mark is None else MarkFinder(self._end_mark)
        rest = self._raw.lstrip(" \n,;") if body.state == "broken" else ""  # after calls without brackets
        return events + [event for one in rest for event in self._read(one)]

    def _read_end(self, end: MarkFinder, character: str) -> list[Event]:
        if not end.held and character.isspace():
            return self._text(character)
        text, is_found = end.read(character)
        if is_found or not text:
            self._end = None if is_found else end
            return []
        self._end, events = None, list[Event]()
        for one in text + end.held:
            events += self._read_text(one)
        return events

    def flush(self) -> list[Event]:
        events: list[Event] = []
        if self._body is not None:
            if self._body.num_reported == 0:
                events = self._text(self._raw)
        elif self._end is not None:
            events = self._text(self._end.held) if self._end.held else []
        else:
            events = self._text(self._begin.held)
        return joined(events + self._end_text())


class MarkedListFormat(ToolFormat):
    """A format by its marks. `begins`: the first one is written, all are read."""

    def __init__(self, marks: Sequence[str], begins: Sequence[str], end: str | None = None) -> None:
        self.marks = tuple(marks)
        self.begins = tuple(begins)
        self.end = end
        self.special_texts = (*begins, *([] if end is None else [end]))

    def parser(self, tools: Mapping[str, Tool]) -> ToolParser:
        return MarkedListParser(self.begins, self.end)

    def forced_grammar(self, tools: Sequence[Tool], tokenizer: Tokenizer, *, is_parallel: bool) -> str:
        more = ' (", " call)*' if is_parallel else ""
        begin, end = mark(tokenizer, self.begins[0]), self._end_of(tokenizer)
        return f'start: {begin} "[" call{more} "]"{end}\n{call_rules(tools, "arguments")}'

    def free_grammar(self, tools: Sequence[Tool], tokenizer: Tokenizer) -> str:
        rules = call_rules(tools, "arguments", all_strict=False)
        head, end = marked_head(mark(tokenizer, self.begins[0])), self._end_of(tokenizer)
        return f'start: TEXT | head "[" call (", " call)* "]"{end}\n{head}{TEXT_RULE}{rules}'

    def _end_of(self, tokenizer: Tokenizer) -> str:
        return "" if self.end is None else f" {mark(tokenizer, self.end)}"

    def write(self, calls: Sequence[Mapping[str, Any]]) -> str:
        return f"{self.begins[0]}{json.dumps(list(calls), ensure_ascii=False)}{self.end or ''}"
