"""Llama 3.1 to 3.3: the whole message is a call, {"name": ..., "parameters": {...}}, or several separated by `;`.

https://github.com/meta-llama/llama-models/blob/main/models/llama3_1/prompt_format.md
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tinyvllm.text.tools.base import Tool, ToolFormat, call_rules, mark
from tinyvllm.text.tools.events import Event, ToolParser, joined
from tinyvllm.text.tools.json_calls import ListReader
from tinyvllm.text.tools.marks import MarkFinder

if TYPE_CHECKING:
    from tinyvllm.text.tokenizer import Tokenizer

PYTHON_TAG = "<|python_tag|>"  # some models write it before calls, as they do before code

# Without marks, text must not begin like a call.
WORDS_RULE = "WORDS: /[^{\\[<\\s](.|\\n)*/\n"


class BareParser(ToolParser):
    """Reads calls of known functions from the start of a message, up to the first text; all else is text.

    Without marks, only its name identifies a call, so its characters are held back until the name is read.
    """

    def __init__(self, names: frozenset[str], separators: str = ";,", mark: str | None = None) -> None:
        """mark: a text that may precede the first call."""
        super().__init__()
        self._names = names
        self._separators = separators
        self._mark = None if mark is None else MarkFinder(mark)
        self._is_start = True  # only whitespace so far
        self._body: ListReader | None = None
        self._raw = ""

    def _read(self, character: str) -> list[Event]:
        if self._mark is None:
            return self._read_unmarked(character)
        text, is_found = self._mark.read(character)
        if is_found:
            self._mark = None
        elif text and not text.isspace():
            text += self._mark.held
            self._mark = None
        return [event for one in text for event in self._read_unmarked(one)]

    def _read_unmarked(self, character: str) -> list[Event]:
        if self._body is not None:
            return self._read_body(self._body, character)
        return self._read_start(character) if self._is_start else self._text(character)

    def _read_start(self, character: str) -> list[Event]:
        if character in "{[":
            self._body, self._raw = ListReader(0, self._names, self._separators), ""
            return self._read_body(self._body, character)
        self._is_start = character.isspace()
        return self._text(character)

    def _read_body(self, body: ListReader, character: str) -> list[Event]:
        was_reported = not body.is_pending
        events = self._called(body.read(character))
        if was_reported or not body.is_pending:
            self._raw = ""
        if not was_reported or body.state == "broken":
            self._raw += character
        if body.state != "open":
            self._body, self._is_start = None, False
            raw = self._raw.lstrip(" \n" + self._separators) if body.num_reported else self._raw
            events += self._text(raw) if body.state == "broken" and raw else []
        return events

    def flush(self) -> list[Event]:
        events: list[Event] = []
        if self._body is not None and (
            self._body.num_reported == 0 or (self._body.is_in_call and self._body.is_pending)
        ):
            events = self._text(self._raw)
        if self._mark is not None:
            events += self._text(self._mark.held)
        return joined(events + self._end_text())


class Llama3Format(ToolFormat):
    marks = ("<|python_tag|>", "Environment: ipython", '"ipython"', "'ipython'")
    special_texts = (PYTHON_TAG,)

    def parser(self, tools: Mapping[str, Tool]) -> ToolParser:
        return BareParser(frozenset(tools), mark=PYTHON_TAG)

    def forced_grammar(self, tools: Sequence[Tool], tokenizer: Tokenizer, *, is_parallel: bool) -> str:
        more = ' ("; " call)*' if is_parallel else ""
        return f"start: call{more}\n{call_rules(tools, 'parameters')}"

    def free_grammar(self, tools: Sequence[Tool], tokenizer: Tokenizer) -> str:
        rules = call_rules(tools, "parameters", all_strict=False)
        return f'start: WORDS? | {mark(tokenizer, PYTHON_TAG)}? call ("; " call)*\n{WORDS_RULE}{rules}'

    def write(self, calls: Sequence[Mapping[str, Any]]) -> str:
        written = ({"name": call["name"], "parameters": call["arguments"]} for call in calls)
        return "; ".join(json.dumps(call, ensure_ascii=False) for call in written)


FORMAT = Llama3Format()
