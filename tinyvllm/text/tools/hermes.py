"""The Hermes format, also used by Qwen 2.5 and 3, SmolLM2 1.7B and others: JSON in `<tool_call>` … `</tool_call>`.

https://github.com/NousResearch/Hermes-Function-Calling
"""

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

BEGIN, END = "<tool_call>", "</tool_call>"


class HermesParser(ToolParser):
    """Text, and between marks calls: one object, several, or a list of them."""

    def __init__(self) -> None:
        super().__init__()
        self._begin, self._end = MarkFinder(BEGIN), MarkFinder(END)
        self._body: ListReader | None = None
        self._raw = ""  # emitted as text if it turns out not to be a call

    def _read(self, character: str) -> list[Event]:
        if self._body is None:
            return self._read_text(character)
        if self._body.is_in_string:  # in which the end mark is ordinary text
            return self._read_body(character)
        inside, is_end = self._end.read(character)
        events: list[Event] = []
        for one in inside:
            events += self._read_text(one) if self._body is None else self._read_body(one)
        if self._body is None:
            held = END if is_end else self._end.held
            for one in held:
                events += self._read_text(one)
        elif is_end:
            events += self._close(END)
        return events

    def _read_text(self, character: str) -> list[Event]:
        text, is_found = self._begin.read(character)
        if is_found:
            self._body, self._raw, self._end = ListReader(self.num_calls, separators=","), BEGIN, MarkFinder(END)
        return self._text(text) if text else []

    def _read_body(self, character: str) -> list[Event]:
        assert self._body is not None
        self._raw += character
        events = self._called(self._body.read(character))
        if self._body.state == "broken" and self._body.num_reported == 0:
            self._body = None
            return self._text(self._raw)
        if not self._body.is_pending:
            self._raw = ""
        return events

    def _close(self, end: str) -> list[Event]:
        """Handle the end mark. Anything between the last call and the mark that is not a call is dropped."""
        assert self._body is not None
        num_reported, self._body = self._body.num_reported, None
        return self._text(self._raw + end) if num_reported == 0 else []

    def flush(self) -> list[Event]:
        events = self._text(self._begin.held) if self._body is None else self._close(self._end.held)
        return joined(events + self._end_text())


class HermesFormat(ToolFormat):
    marks = (BEGIN,)
    special_texts = (BEGIN, END)

    def parser(self, tools: Mapping[str, Tool]) -> ToolParser:
        return HermesParser()

    def forced_grammar(self, tools: Sequence[Tool], tokenizer: Tokenizer, *, is_parallel: bool) -> str:
        more = ' ("\\n" marked)*' if is_parallel else ""
        return f"start: marked{more}\n{self._marked(tokenizer)}{call_rules(tools, 'arguments')}"

    def free_grammar(self, tools: Sequence[Tool], tokenizer: Tokenizer) -> str:
        begin, end = mark(tokenizer, BEGIN), mark(tokenizer, END)
        rules = call_rules(tools, "arguments", all_strict=False)
        return f'start: (head "\\n" call "\\n" {end})* TEXT\n{marked_head(begin)}{TEXT_RULE}{rules}'

    def write(self, calls: Sequence[Mapping[str, Any]]) -> str:
        return "\n".join(f"{BEGIN}\n{json.dumps(call, ensure_ascii=False)}\n{END}" for call in calls)

    def _marked(self, tokenizer: Tokenizer) -> str:
        return f'marked: {mark(tokenizer, BEGIN)} "\\n" call "\\n" {mark(tokenizer, END)}\n'


FORMAT = HermesFormat()
