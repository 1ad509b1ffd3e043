"""What formats have in common whose arguments are pairs of a key and a value, in a notation of the family's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tinyvllm.text.grammar import lark_string
from tinyvllm.text.json_schema import prepare_schema
from tinyvllm.text.tools.base import Tool

Schema = Mapping[str, Any]


@dataclass
class Rules:
    """Owns the rules of one Lark grammar."""

    lines: list[str] = field(default_factory=list)
    num_rules: int = 0

    def add(self, body: str, *, is_lazy: bool = False) -> str:
        """The name of a new rule with this body."""
        rule = self.reserve()
        self.define(rule, body, is_lazy=is_lazy)
        return rule

    def add_terminal(self, body: str) -> str:
        name = self.reserve().upper()
        self.define(name, body)
        return name

    def reserve(self) -> str:
        """The name of a rule whose body follows."""
        self.num_rules += 1
        return f"rule_{self.num_rules}"

    def define(self, rule: str, body: str, *, is_lazy: bool = False) -> None:
        self.lines.append(f"{rule}{'[lazy]' if is_lazy else ''}: {body}")

    def text(self) -> str:
        return "".join(f"{line}\n" for line in self.lines)


def properties_of(tool: Tool, *, is_enforced: bool) -> Schema | None:
    """The schema of a tool's arguments; None if any arguments will do. Raises RequestError for what no grammar can
    enforce."""
    if not is_enforced:
        return None
    schema = tool.parameters or {"type": "object", "properties": {}, "additionalProperties": False}
    prepared = prepare_schema(schema, tool.param)
    return prepared if isinstance(prepared, Mapping) else None


def pairs(rules: Rules, schema: Schema, pair: Callable[[str, Schema], str]) -> str:
    """A rule of all of an object's pairs with commas between them: the required ones, and then the others, each of
    which may be left out. `pair`: the rule of one, by its key and schema."""
    properties: Mapping[str, Schema] = schema.get("properties") or {}
    required = [key for key in properties if key in schema.get("required", ())]
    optional = [key for key in properties if key not in required]
    definitions = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    names = {key: pair(key, {**definitions, **properties[key]}) for key in (*required, *optional)}
    return rules.add(" | ".join(_sequences([names[key] for key in required], [names[key] for key in optional])))


def _sequences(required: Sequence[str], optional: Sequence[str]) -> Iterator[str]:
    """The alternatives of `pairs`: after required ones, each other has a comma; without them, any may be first."""
    comma = lark_string(",")
    if required:
        yield " ".join([f" {comma} ".join(required), *(f"({comma} {name})?" for name in optional)])
        return
    yield lark_string("")
    for index, name in enumerate(optional):
        yield " ".join([name, *(f"({comma} {later})?" for later in optional[index + 1 :])])
