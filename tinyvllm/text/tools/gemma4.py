"""Gemma 4: `<|tool_call>call:name{key:value,...}<tool_call|>`, where `<|"|>` quotes strings and keys are bare.

https://ai.google.dev/gemma/docs/core/prompt-formatting-gemma4 (and the model's chat template)
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tinyvllm.text.grammar import lark_json, lark_string
from tinyvllm.text.tools.base import TEXT_RULE, Tool, ToolFormat, mark, marked_head, special_id
from tinyvllm.text.tools.block import BlockParser
from tinyvllm.text.tools.events import ToolParser
from tinyvllm.text.tools.keyed import Rules, Schema, pairs, properties_of

if TYPE_CHECKING:
    from tinyvllm.text.tokenizer import Tokenizer

BEGIN, END, QUOTE = "<|tool_call>", "<tool_call|>", '<|"|>'
HEAD = re.compile(r"\s*call:([^\s{]+)\s*\{")
WORD = re.compile(r"[^,:{}\[\]\s<]+")
DEFINITIONS = ("$defs", "definitions")
WORDS = {"true": True, "false": False, "null": None, "none": None}


class Gemma4Parser(BlockParser):
    def __init__(self) -> None:
        super().__init__(BEGIN, END)

    def read_block(self, body: str) -> list[tuple[str, dict[str, Any]]] | None:
        head = HEAD.match(body)
        if head is None:
            return None
        reader = Reader(body, head.end())
        try:
            arguments = reader.read_object()
        except (ValueError, RecursionError):
            return None
        return [(head[1], arguments)] if not body[reader.position :].strip() else None


class Reader:
    """Reads Gemma's notation. Owns the position in the text. Raises ValueError for anything else."""

    def __init__(self, text: str, position: int) -> None:
        self.text = text
        self.position = position

    def read_object(self) -> dict[str, Any]:
        """The pairs up to the closing brace; the opening one was read."""
        found: dict[str, Any] = {}
        while not self._take("}"):
            key = self._string() if self._starts(QUOTE) else self._word()
            self._require(":")
            found[key] = self._value()
            if not self._take(",") and not self._starts("}"):
                raise ValueError("no comma")
        return found

    def _value(self) -> Any:
        if self._starts(QUOTE):
            return self._string()
        if self._take("{"):
            return self.read_object()
        if self._take("["):
            return self._list()
        word = self._word()
        if word.lower() in WORDS:
            return WORDS[word.lower()]
        return json.loads(word)  # a number; raises ValueError for a bare word

    def _list(self) -> list[Any]:
        found: list[Any] = []
        while not self._take("]"):
            found.append(self._value())
            if not self._take(",") and not self._starts("]"):
                raise ValueError("no comma")
        return found

    def _string(self) -> str:
        self._require(QUOTE)
        end = self.text.index(QUOTE, self.position)  # raises ValueError
        found, self.position = self.text[self.position : end], end + len(QUOTE)
        return found

    def _word(self) -> str:
        self._skip_blanks()
        match = WORD.match(self.text, self.position)
        if match is None:
            raise ValueError("no word")
        self.position = match.end()
        return match[0]

    def _skip_blanks(self) -> None:
        while self.position < len(self.text) and self.text[self.position].isspace():
            self.position += 1

    def _starts(self, mark: str) -> bool:
        self._skip_blanks()
        return self.text.startswith(mark, self.position)

    def _take(self, mark: str) -> bool:
        is_there = self._starts(mark)
        self.position += len(mark) if is_there else 0
        return is_there

    def _require(self, mark: str) -> None:
        if not self._take(mark):
            raise ValueError(f"no {mark}")


class Gemma4Format(ToolFormat):
    """Schemas are enforced but for the patterns and formats of strings."""

    marks = (BEGIN,)
    special_texts = (BEGIN, END, QUOTE)

    def parser(self, tools: Mapping[str, Tool]) -> ToolParser:
        return Gemma4Parser()

    def forced_grammar(self, tools: Sequence[Tool], tokenizer: Tokenizer, *, is_parallel: bool) -> str:
        one = f"{mark(tokenizer, BEGIN)} call {mark(tokenizer, END)}"
        return f"start: {one}{f' ({one})*' if is_parallel else ''}\n{_call_rules(tools, tokenizer, all_strict=True)}"

    def free_grammar(self, tools: Sequence[Tool], tokenizer: Tokenizer) -> str:
        rules, head = _call_rules(tools, tokenizer, all_strict=False), marked_head(mark(tokenizer, BEGIN))
        return f"start: (head call {mark(tokenizer, END)})* TEXT\n{head}{TEXT_RULE}{rules}"

    def write(self, calls: Sequence[Mapping[str, Any]]) -> str:
        def one(call: Mapping[str, Any]) -> str:
            return f"{BEGIN}call:{call['name']}{_written(call['arguments'])}{END}"

        return "".join(map(one, calls))

    def prepare(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Tool], *, has_template: bool
    ) -> list[Mapping[str, Any]]:
        """Results become `tool_responses` of the message with the calls, where its first templates look for them."""
        prepared = super().prepare(messages, tools, has_template=has_template)
        if not has_template:
            return prepared
        joined: list[Mapping[str, Any]] = []
        for message in prepared:
            last = joined[-1] if joined else {}
            if message["role"] == "tool" and last.get("tool_calls"):
                responses = [*last.get("tool_responses", ()), _response(message, last["tool_calls"])]
                joined[-1] = {**last, "tool_responses": responses}
            else:
                joined.append(message)
        return joined


def _response(message: Mapping[str, Any], calls: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A result as {"name": ..., "response": ...}: an object where the content is one."""
    names = {call.get("id"): call.get("function", {}).get("name") for call in calls}
    content = message.get("content")
    if isinstance(content, str) and content.lstrip().startswith("{"):
        with contextlib.suppress(ValueError):
            content = json.loads(content)
    return {"name": message.get("name") or names.get(message.get("tool_call_id")) or "unknown", "response": content}


def _written(value: Any) -> str:
    """A value in Gemma's notation."""
    if isinstance(value, str):
        return f"{QUOTE}{value}{QUOTE}"
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{_written(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(_written, value)) + "]"
    return json.dumps(value)


def _call_rules(tools: Sequence[Tool], tokenizer: Tokenizer, *, all_strict: bool) -> str:
    writer = ValueRules(tokenizer)
    calls = []
    for tool in tools:
        schema = properties_of(tool, is_enforced=all_strict or tool.is_strict)
        arguments = "any_object" if schema is None else writer.object_rule(schema)
        calls.append(writer.rules.add(f"{lark_string('call:' + tool.name)} {arguments}"))
    return f"call: {' | '.join(calls)}\n{writer.text()}"


class ValueRules:
    """Writes the rules of values by their schemas. Owns the grammar's rules. Numbers are written as in JSON."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.rules = Rules()
        self._quote = mark(tokenizer, QUOTE)
        self._is_special = special_id(tokenizer, QUOTE) is not None
        self._definitions: dict[str, str] = {}  # rules by the references that lead to them

    def object_rule(self, schema: Schema) -> str:
        if not schema.get("properties") and schema.get("additionalProperties", True) is not False:
            return "any_object"
        inside = pairs(self.rules, schema, self._pair)
        return self.rules.add(f'"{{" {inside} "}}"')

    def _pair(self, key: str, schema: Schema) -> str:
        return self.rules.add(f"{lark_string(key + ':')} {self._value(schema)}")

    def _value(self, schema: Schema) -> str:
        definitions = {key: schema[key] for key in DEFINITIONS if key in schema}

        def either(schemas: Sequence[Schema]) -> str:
            return self.rules.add(" | ".join(self._value({**definitions, **one}) for one in schemas))

        if "$ref" in schema:
            return self._reference(str(schema["$ref"]), schema)
        if "const" in schema or "enum" in schema:
            return self.rules.add(" | ".join(map(self._constant, schema.get("enum", [schema.get("const")]))))
        if choices := schema.get("anyOf") or schema.get("oneOf"):
            return either(choices)
        kind = schema.get("type")
        if isinstance(kind, list):
            return either([{**schema, "type": one} for one in kind])
        if kind == "string":
            return self._string(schema.get("minLength", 0), schema.get("maxLength"))
        if kind == "array":
            return self._array({**definitions, **schema.get("items", {})})
        if kind == "object":
            return self.object_rule(schema)
        return "any_value" if kind is None else self.rules.add(lark_json(schema, "tools"))

    def _reference(self, reference: str, schema: Schema) -> str:
        """The rule of a definition, which may refer to itself."""
        place, _, name = reference.removeprefix("#/").partition("/")
        target = schema.get(place, {}).get(name) if place in DEFINITIONS else None
        if target is None:
            return "any_value"
        if reference not in self._definitions:
            self._definitions[reference] = rule = self.rules.reserve()
            self.rules.define(rule, self._value({key: schema[key] for key in DEFINITIONS if key in schema} | target))
        return self._definitions[reference]

    def _string(self, least: int, most: int | None) -> str:
        characters = self.rules.add_terminal(f"/(.|\\n){{{least},{'' if most is None else most}}}/")
        if self._is_special:
            return self.rules.add(f"{self._quote} {characters} {self._quote}")
        return self.rules.add(f"{self._quote} {self.rules.add(f'{characters} {self._quote}', is_lazy=True)}")

    def _array(self, items: Schema) -> str:
        item = self._value(items)
        return self.rules.add(f'"[" ({item} ("," {item})*)? "]"')

    def _constant(self, value: Any) -> str:
        if isinstance(value, str):
            return f"{self._quote} {lark_string(value)} {self._quote}"
        return lark_string(_written(value))

    def text(self) -> str:
        any_string = self._string(0, None)
        return f"""{self.rules.text()}KEY: /[A-Za-z_][A-Za-z0-9_]*/
any_value: {any_string} | any_word | any_list | any_object
any_word: {lark_json({"type": ["number", "boolean", "null"]}, "tools")}
any_list: "[" (any_value ("," any_value)*)? "]"
any_object: "{{" (any_pair ("," any_pair)*)? "}}"
any_pair: KEY ":" any_value
"""


FORMAT = Gemma4Format()
