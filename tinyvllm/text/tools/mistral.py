"""Mistral: [TOOL_CALLS] and a list of calls or, in newer models, `name[ARGS]{...}` with a mark for each call.

https://github.com/mistralai/mistral-common (tokens/tokenizers/instruct.py)
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tinyvllm.text.tools.base import TEXT_RULE, Tool, ToolFormat, call_rules, mark, marked_head
from tinyvllm.text.tools.events import CallArguments, CallBegin, Event, ToolParser, joined
from tinyvllm.text.tools.json_calls import ListReader, ValueReader
from tinyvllm.text.tools.marks import MarkFinder

if TYPE_CHECKING:
    from tinyvllm.text.tokenizer import Tokenizer

CALLS, ARGS, CALL_ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"


class MistralParser(ToolParser):
    def __init__(self) -> None:
        super().__init__()
        self._begin = MarkFinder(CALLS)
        self._is_inside = False
        self._raw = ""
        self._body: ListReader | None = None
        self._value: ValueReader | None = None  # of name[ARGS]{...}

    def _read(self, character: str) -> list[Event]:
        if not self._is_inside:
            text, self._is_inside = self._begin.read(character)
            self._raw = CALLS
            return self._text(text) if text else []
        if self._value is not None:
            return self._read_arguments(character)
        self._raw += character
        if self._body is not None:
            return self._read_list(self._body, character)
        head = self._raw.removeprefix(CALLS).strip()
        if head in ("[", "{"):
            self._body = ListReader(self.num_calls)
            return self._read_list(self._body, character)
        if character == "{":
            return self._begin_call(head[:-1])
        return []

    def _read_list(self, body: ListReader, character: str) -> list[Event]:
        events = self._called(body.read(character))
        if body.state == "broken" and body.num_reported == 0:
            events += self._text(self._raw)
        if body.state != "open":
            self._body, self._is_inside = None, False
        return events

    def _begin_call(self, head: str) -> list[Event]:
        name = head.removesuffix(ARGS).split(CALL_ID)[0].strip()
        if not name or not name.replace("_", "").replace("-", "").replace(".", "").isalnum():
            self._is_inside = False
            return self._text(self._raw)
        self._value, self._raw = ValueReader("{"), ""
        index = self.num_calls
        return self._called([CallBegin(index, name), CallArguments(index, "{")])

    def _read_arguments(self, character: str) -> list[Event]:
        assert self._value is not None
        self._value.read(character)
        if self._value.is_done:
            self._value, self._is_inside = None, False
        return [CallArguments(self.num_calls - 1, character)]

    def flush(self) -> list[Event]:
        if not self._is_inside:
            return joined(self._text(self._begin.held) + self._end_text())
        is_reported = self._value is not None or (self._body is not None and self._body.num_reported > 0)
        return joined(([] if is_reported else self._text(self._raw)) + self._end_text())


class MistralFormat(ToolFormat):
    marks: tuple[str, ...] = (CALLS, "[AVAILABLE_TOOLS]")
    special_texts = (CALLS, ARGS)
    id_prefix = ""  # its templates require nine letters and digits
    id_length = 9

    def parser(self, tools: Mapping[str, Tool]) -> ToolParser:
        return MistralParser()

    def forced_grammar(self, tools: Sequence[Tool], tokenizer: Tokenizer, *, is_parallel: bool) -> str:
        more = ' (", " call)*' if is_parallel else ""
        return f'start: {mark(tokenizer, CALLS)} "[" call{more} "]"\n{call_rules(tools, "arguments")}'

    def free_grammar(self, tools: Sequence[Tool], tokenizer: Tokenizer) -> str:
        rules = call_rules(tools, "arguments", all_strict=False)
        head = marked_head(mark(tokenizer, CALLS))
        return f'start: TEXT | head "[" call (", " call)* "]"\n{head}{TEXT_RULE}{rules}'

    def write(self, calls: Sequence[Mapping[str, Any]]) -> str:
        return CALLS + json.dumps(calls, ensure_ascii=False)


FORMAT = MistralFormat()
