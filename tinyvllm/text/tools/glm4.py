"""GLM-4: a call is the function's name on a line of its own, and the arguments as a JSON object after it.

https://huggingface.co/zai-org/GLM-4-9B-0414 (its chat template)
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tinyvllm.text.grammar import lark_string
from tinyvllm.text.tools.base import Tool, ToolFormat, named_call_rules
from tinyvllm.text.tools.events import CallArguments, CallBegin, Event, ToolParser, joined
from tinyvllm.text.tools.json_calls import ValueReader

if TYPE_CHECKING:
    from tinyvllm.text.tokenizer import Tokenizer


class Glm4Parser(ToolParser):
    """A line is held back while it may be a known function's name, and then until its arguments begin."""

    def __init__(self, names: frozenset[str]) -> None:
        super().__init__()
        self._names = names
        self._line: str | None = ""  # held back since the start of a line; None: the line is text
        self._name: str | None = None  # a line that is a name, after which arguments must follow
        self._value: ValueReader | None = None

    def _read(self, character: str) -> list[Event]:
        if self._value is not None:
            return self._read_arguments(self._value, character)
        if self._name is not None:
            return self._read_after_name(self._name, character)
        if self._line is None:
            self._line = "" if character == "\n" else None
            return self._text(character)
        line = self._line + character
        if character == "\n" and line[:-1] in self._names:
            self._name, self._line = line[:-1], line
            return []
        if any(name.startswith(line) for name in self._names):
            self._line = line
            return []
        self._line = "" if character == "\n" else None
        return self._text(line)

    def _read_after_name(self, name: str, character: str) -> list[Event]:
        assert self._line is not None
        if character.isspace():
            self._line += character
            return []
        held, self._name = self._line, None
        if character == "{":
            index, self._value = self.num_calls, ValueReader("{")
            return self._called([CallBegin(index, name), CallArguments(index, "{")])
        self._line = "" if held.endswith("\n") else None
        return self._text(held) + self._read(character)

    def _read_arguments(self, value: ValueReader, character: str) -> list[Event]:
        value.read(character)
        if value.is_done:
            self._value, self._line = None, ""
        return [CallArguments(self.num_calls - 1, character)]

    def flush(self) -> list[Event]:
        held = self._line if self._value is None and self._line else ""
        return joined((self._text(held) if held else []) + self._end_text())


class Glm4Format(ToolFormat):
    marks = ("<|observation|>",)

    def parser(self, tools: Mapping[str, Tool]) -> ToolParser:
        return Glm4Parser(frozenset(tools))

    def forced_grammar(self, tools: Sequence[Tool], tokenizer: Tokenizer, *, is_parallel: bool) -> str:
        more = ' ("\\n" call)*' if is_parallel else ""
        return f"start: call{more}\n{_call_rules(tools, all_strict=True)}"

    def free_grammar(self, tools: Sequence[Tool], tokenizer: Tokenizer) -> str:
        # a line that is a tool's name must be a call, so text may not begin with one
        first = "".join(sorted({tool.name[0] for tool in tools}))
        words = f"WORDS: /[^{''.join(chr(92) + one if one in ']^-' + chr(92) else one for one in first)}](.|\\n)*/\n"
        return f'start: WORDS? | call ("\\n" call)*\n{words}{_call_rules(tools, all_strict=False)}'

    def write(self, calls: Sequence[Mapping[str, Any]]) -> str:
        return "\n".join(f"{call['name']}\n{json.dumps(call['arguments'], ensure_ascii=False)}" for call in calls)


def _call_rules(tools: Sequence[Tool], *, all_strict: bool) -> str:
    return named_call_rules(tools, lambda tool: lark_string(f"{tool.name}\n"), all_strict=all_strict)


FORMAT = Glm4Format()
