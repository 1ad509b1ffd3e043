"""Calls whose arguments are text between tags, each after its name: Qwen3-Coder's and GLM-4.5's.

Values are typed by the tool's schema. Strings are passed on while they are read: a coder's calls hold whole files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from tinyvllm.text.grammar import lark_string
from tinyvllm.text.tools.argument_types import TextRules, is_text, property_schema, typed, write_value
from tinyvllm.text.tools.base import TEXT_RULE, Tool, ToolFormat, mark, marked_head
from tinyvllm.text.tools.events import CallArguments, CallBegin, Event, ToolParser, joined
from tinyvllm.text.tools.keyed import Schema, properties_of
from tinyvllm.text.tools.marks import MarkFinder

if TYPE_CHECKING:
    from tinyvllm.text.tokenizer import Tokenizer

BEGIN, END = "<tool_call>", "</tool_call>"


@dataclass(frozen=True)
class Tags:
    """How a family writes a call between `<tool_call>` and `</tool_call>`."""

    key_begin: str
    key_end: str
    value_end: str
    value_begin: str = ""  # "": the value follows the key's end at once
    name_begin: str = ""  # "": the name follows `<tool_call>` at once, and ends at a line break or the next tag
    name_end: str = ""
    call_end: str = ""  # before `</tool_call>`
    line: str = ""  # after tags and around values; not part of them


State = Literal["text", "head", "name", "gap", "key", "value_gap", "value", "after"]
_NAME = re.compile(r"\s*[\w.\-]*\s*")


class TaggedParser(ToolParser):
    """Text and calls. A call is reported once its name is read; anything in it that is not an argument is dropped."""

    def __init__(self, tags: Tags, tools: Mapping[str, Tool]) -> None:
        super().__init__()
        self._tags = tags
        self._tools = tools
        self._tool: Tool | None = None
        self._marks: dict[State, tuple[str, ...]] = {
            "text": (BEGIN, tags.name_begin),
            "head": (tags.name_begin, END),
            "name": (tags.name_end,) if tags.name_end else (tags.key_begin, END),
            "gap": (tags.key_begin, tags.call_end, END),
            "key": (tags.key_end,),
            "value_gap": (tags.value_begin, END),
            "value": (tags.value_end,),
            "after": (BEGIN, tags.name_begin, END),
        }
        self._raw = ""  # of a call whose name is not known yet
        self._part = ""  # the name, the key or the value that is being read
        self._num_keys = 0
        self._value = Value("", {})
        self._enter("text")

    def _enter(self, state: State) -> None:
        self._state, self._part = state, ""
        self._find = MarkFinder(*filter(None, self._marks[state]))

    def _read(self, character: str) -> list[Event]:
        mark = self._find.held + character
        text, is_found = self._find.read(character)
        events = self._take(text) if text else []
        return events + self._take_mark(mark) if is_found else events

    def _take(self, text: str) -> list[Event]:
        """Text between marks."""
        match self._state:
            case "text":
                return self._text(text)
            case "head" | "name":
                self._raw += text
                self._part += text
                is_plausible = not self._part.strip() if self._state == "head" else _NAME.fullmatch(self._part)
                return [] if is_plausible else self._give_up()
            case "after":
                self._part += text
                return self._give_up(self._part) if self._part.strip() else []
            case "key":
                self._part += text
            case "value":
                return self._arguments(self._value.take(text))
        return []

    def _give_up(self, raw: str | None = None) -> list[Event]:
        """It is no call: what was read of it is text."""
        held, raw = self._find.held, self._raw if raw is None else raw
        self._enter("text")
        events = self._text(raw)
        for character in held:
            events += self._read(character)
        return events

    def _take_mark(self, mark: str) -> list[Event]:
        tags = self._tags
        match self._state:
            case "text" | "after" if mark == END:
                self._enter("text")
            case "text" | "after":
                self._raw = mark
                self._enter("head" if mark == BEGIN and tags.name_begin else "name")
            case "head" if mark == END:
                self._raw += mark
                return self._give_up()
            case "head":
                self._raw += mark
                self._enter("name")
            case "name":
                return self._begin(mark)
            case "gap":
                return self._end(mark) if mark != tags.key_begin else self._enter_key()
            case "key":
                self._value = Value(self._part.strip(), property_schema(self._tool, self._part.strip()), tags.line)
                self._enter("value_gap" if tags.value_begin else "value")
                return self._arguments(self._value.begin(self._num_keys)) if not tags.value_begin else []
            case "value_gap" if mark == END:
                return self._end(mark)
            case "value_gap":
                self._enter("value")
                return self._arguments(self._value.begin(self._num_keys))
            case "value":
                self._num_keys += 1
                self._enter("gap")
                return self._arguments(self._value.end())
        return []

    def _begin(self, mark: str) -> list[Event]:
        """The name is complete."""
        name = self._part.strip()
        if not name:
            self._raw += mark
            return self._give_up()
        self._tool, self._num_keys = self._tools.get(name), 0
        events = self._called([CallBegin(self.num_calls, name)])
        self._enter("gap")
        if mark == self._tags.key_begin:
            return events + self._enter_key()
        return events + (self._end(mark) if mark == END else [])

    def _enter_key(self) -> list[Event]:
        self._enter("key")
        return []

    def _end(self, mark: str) -> list[Event]:
        """The call is complete."""
        self._enter("after" if mark != END else "text")
        return self._arguments("}" if self._num_keys else "{}")

    def _arguments(self, text: str) -> list[Event]:
        return [CallArguments(self.num_calls - 1, text)] if text else []

    def flush(self) -> list[Event]:
        """A call whose end is missing is read as if it were there."""
        events: list[Event] = []
        if self._state == "name" and not self._tags.name_end and self._part.strip() in self._tools:
            events += self._begin(END)
        elif self._state in ("head", "name"):
            self._raw += self._find.held
            self._find.held = ""
            events += self._give_up()
        elif self._state == "value":
            events += self._arguments(self._value.take(self._find.held) + self._value.end())
            self._num_keys += 1
        elif self._state in ("text", "after"):
            events += self._text(self._part + self._find.held) if self._part.strip() + self._find.held else []
        if self._state in ("gap", "key", "value_gap", "value"):
            events += self._end(END)
        return joined(events + self._end_text())


class Value:
    """One argument as JSON, while its text comes in."""

    def __init__(self, key: str, schema: Mapping[str, Any], line: str = "") -> None:
        self._key = key
        self._schema = schema
        self._line = line
        self._is_text = is_text(schema)
        self._text = ""  # read, but not passed on
        self._is_first = True

    def begin(self, num_earlier: int) -> str:
        quote = '"' if self._is_text else ""
        return f"{', ' if num_earlier else '{'}{json.dumps(self._key, ensure_ascii=False)}: {quote}"

    def take(self, text: str) -> str:
        """What can be passed on: of a string, all but a last line break, which may belong to the end."""
        self._text += text
        if not self._is_text:
            return ""
        if self._is_first and self._text:
            self._text, self._is_first = self._text.removeprefix(self._line), False
        kept = self._text.removesuffix(self._line)
        self._text = self._text[len(kept) :]
        return json.dumps(kept, ensure_ascii=False)[1:-1]

    def end(self) -> str:
        if self._is_text:
            return '"'
        text = self._text.removeprefix(self._line).removesuffix(self._line)
        return json.dumps(typed(text, self._schema), ensure_ascii=False)


class TaggedFormat(ToolFormat):
    """Schemas are enforced but for the patterns and formats of strings."""

    tags: Tags

    def __init__(self) -> None:
        tags = self.tags
        self.special_texts = (
            BEGIN,
            END,
            *filter(None, (tags.key_begin, tags.key_end, tags.value_begin, tags.value_end)),
        )

    def parser(self, tools: Mapping[str, Tool]) -> TaggedParser:
        return TaggedParser(self.tags, tools)

    def forced_grammar(self, tools: Sequence[Tool], tokenizer: Tokenizer, *, is_parallel: bool) -> str:
        more = ' ("\\n" marked)*' if is_parallel else ""
        marked = f"marked: {mark(tokenizer, BEGIN)} call {mark(tokenizer, END)}\n"
        return f"start: marked{more}\n{marked}{self._call_rules(tools, tokenizer, all_strict=True)}"

    def free_grammar(self, tools: Sequence[Tool], tokenizer: Tokenizer) -> str:
        head, end = marked_head(mark(tokenizer, BEGIN)), mark(tokenizer, END)
        rules = self._call_rules(tools, tokenizer, all_strict=False)
        return f"start: (head call {end})* TEXT\n{head}{TEXT_RULE}{rules}"

    def write(self, calls: Sequence[Mapping[str, Any]]) -> str:
        return "\n".join(map(self._write_call, calls))

    def _write_call(self, call: Mapping[str, Any]) -> str:
        tags, line = self.tags, self.tags.line
        head = f"{BEGIN}{line}{tags.name_begin}{call['name']}{tags.name_end}{line}"
        pairs = (
            f"{tags.key_begin}{key}{tags.key_end}{tags.value_begin}{line}{write_value(value)}{line}{tags.value_end}{line}"
            for key, value in call["arguments"].items()
        )
        return f"{head}{''.join(pairs)}{tags.call_end}{line if tags.call_end else ''}{END}"

    def _call_rules(self, tools: Sequence[Tool], tokenizer: Tokenizer, *, all_strict: bool) -> str:
        """The rule `call`: everything between the outer tags."""
        tags = self.tags

        def tag(before: str, text: str, after: str = "") -> str:
            """A tag with literals around it; unless it is a special token, they are one literal."""
            marked = mark(tokenizer, text) if text else ""
            if not marked.startswith("<["):
                return lark_string(before + text + after) if before + text + after else ""
            return " ".join(
                [*([lark_string(before)] if before else []), marked, *([lark_string(after)] if after else [])]
            )

        line = tags.line
        if mark(tokenizer, tags.value_end).startswith("<["):  # a lexer cannot look ahead for it
            writer = TextRules(tag("", tags.value_end, line), line)
        else:
            writer = TextRules(tag(line, tags.value_end, line))
        calls = []
        for tool in tools:
            schema = properties_of(tool, is_enforced=all_strict or tool.is_strict)
            name = lark_string(f"{line}{tags.name_begin}{tool.name}{tags.name_end}{line}")
            calls.append(f"{name} {'any_pair*' if schema is None else self._pairs(writer, schema, tool, tag)}")
        value = writer.text()
        any_pair = (
            f"any_pair: {tag('', tags.key_begin)} KEY {tag('', tags.key_end)} {tag('', tags.value_begin, line)} {value}"
        )
        end = tag("", tags.call_end, line) if tags.call_end else ""
        call = " | ".join(f"({one} {end})" for one in calls)
        return f"call: {call}\n{writer.rules.text()}{any_pair}\nKEY: /[A-Za-z_][\\w.\\-]*/\n"

    def _pairs(self, writer: TextRules, schema: Schema, tool: Tool, tag: Callable[..., str]) -> str:
        """All properties in the schema's order; those that are not required may be left out."""
        tags = self.tags
        definitions = {name: schema[name] for name in ("$defs", "definitions") if name in schema}
        pairs = []
        for key, one in (schema.get("properties") or {}).items():
            value = writer.value({**definitions, **one}, tool.param)
            head = [
                tag("", tags.key_begin),
                lark_string(key),
                tag("", tags.key_end),
                tag("", tags.value_begin, tags.line),
            ]
            pair = writer.rules.add(" ".join([*filter(None, head), value]))
            pairs.append(pair if key in schema.get("required", ()) else f"{pair}?")
        return " ".join(pairs)
