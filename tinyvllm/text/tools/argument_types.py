"""Arguments that are written as plain text: their values by the tool's schema, and the grammar of such text."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from tinyvllm.text.grammar import lark_json, lark_string
from tinyvllm.text.tools.base import Tool
from tinyvllm.text.tools.keyed import Rules, Schema

_WORDS = {"True": True, "False": False, "None": None}  # Python's, which some templates write
_NAMES = {bool: "boolean", int: "integer", float: "number", dict: "object", list: "array", type(None): "null"}


def property_schema(tool: Tool | None, key: str) -> Schema:
    """The schema of one argument; {} if the tool does not say."""
    parameters = {} if tool is None else tool.parameters or {}
    schema = (parameters.get("properties") or {}).get(key)
    return _resolved(schema, parameters) if isinstance(schema, Mapping) else {}


def _resolved(schema: Schema, root: Schema) -> Schema:
    """The schema that references inside the document lead to. Follows at most 8, which may form a cycle."""
    for _ in range(8):
        reference = schema.get("$ref")
        if not isinstance(reference, str) or not reference.startswith("#/"):
            break
        target: Any = root
        for name in reference.removeprefix("#/").split("/"):
            target = target.get(name) if isinstance(target, Mapping) else None
        if not isinstance(target, Mapping):
            return {}
        schema = target
    return schema


def types_of(schema: Schema) -> set[str]:
    """The JSON types that a schema names; empty if any will do."""
    if "enum" in schema or "const" in schema:
        values = schema.get("enum", [schema.get("const")])
        return {"string" if isinstance(value, str) else _NAMES.get(type(value), "object") for value in values}
    kind = schema.get("type")
    if kind is not None:
        return {kind} if isinstance(kind, str) else {*kind}
    choices = [types_of(one) for name in ("anyOf", "oneOf") for one in schema.get(name, ()) if isinstance(one, Mapping)]
    return set().union(*choices) if choices and all(choices) else set()


def is_text(schema: Schema) -> bool:
    """Whether every value is a string, so that text can be passed on while it is read."""
    return types_of(schema) == {"string"}


def typed(text: str, schema: Schema) -> Any:
    """The value that `text` means: one of the schema's choices, else a string if the schema allows strings (but null
    if it also allows that), else what the JSON says, and the text itself if it is no JSON."""
    for choice in schema.get("enum", [schema["const"]] if "const" in schema else ()):
        if text == write_value(choice):
            return choice
    types = types_of(schema)
    if "string" in types:
        return None if text == "null" and "null" in types else text
    try:
        value = json.loads(text)
        json.dumps(value, allow_nan=False)
    except (ValueError, RecursionError):
        return _WORDS.get(text.strip(), text)
    return value


def write_value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


class TextRules:
    """Writes the Lark rules of values as text, each with what ends it. Owns the grammar's rules.

    Schemas are enforced but for the patterns and formats of strings."""

    def __init__(self, end: str, line: str = "") -> None:
        """end: the Lark of what follows a value, a literal or a special token. line: what may be between the two; text
        contains it anyway."""
        self.rules = Rules()
        self._end = end
        self._line = f"{lark_string(line)}? " if line else ""

    def value(self, schema: Schema, param: str) -> str:
        """The name of a rule for a value of `schema` and its end."""
        return self.rules.add(" | ".join(self._choices(schema, param)))

    def text(self, least: int = 0, most: int | None = None) -> str:
        """A rule of any text of so many characters, and its end."""
        characters = self.rules.add_terminal(f"/(.|\\n){{{least},{'' if most is None else most}}}/")
        return self.rules.add(f"{characters} {self._end}", is_lazy=not self._end.startswith("<["))

    def _choices(self, schema: Schema, param: str) -> Iterator[str]:
        definitions = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
        resolved = _resolved(schema, schema)
        if "enum" in resolved or "const" in resolved:
            values = resolved.get("enum", [resolved.get("const")])
            yield from (f"{lark_string(write_value(value))} {self._line}{self._end}" for value in values)
            return
        branches = resolved.get("anyOf") or resolved.get("oneOf")
        if branches:
            for branch in branches:
                yield from self._choices({**definitions, **branch}, param)
            return
        types = types_of(resolved)
        if not types or "string" in types:
            yield self.text(resolved.get("minLength", 0), resolved.get("maxLength"))
        if types == {"string"}:
            return
        if types:
            others = sorted(types - {"string"})
            document = {**definitions, **resolved, "type": others if len(others) > 1 else others[0]}
            yield f"{self.rules.add(lark_json(document, param))} {self._line}{self._end}"
