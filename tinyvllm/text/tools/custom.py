"""Custom tools: calls that carry free text instead of JSON arguments.

Models are trained to call functions, so a custom tool is offered as a function with one string, `input`, and the
arguments of its calls are turned back into the text.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import lru_cache

from tinyvllm.text.grammar import pattern_fault
from tinyvllm.text.lark_regex import lark_to_regex
from tinyvllm.text.tools.base import Tool

INPUT = "input"  # the name of the string


@dataclass(frozen=True)
class InputGrammar:
    """What the text of a custom tool's calls has to match."""

    syntax: str  # "lark" or "regex"
    definition: str

    @property
    def shown(self) -> str:
        kind = "regular expression" if self.syntax == "regex" else "Lark grammar"
        return f"The input must match this {kind}:\n{self.definition}"


@lru_cache(maxsize=256)  # agents send the same grammar with each request
def pattern_of(grammar: InputGrammar) -> str:
    """The pattern of a JSON schema that enforces a grammar. Raises ValueError for one that cannot be enforced."""
    expression = grammar.definition if grammar.syntax == "regex" else lark_to_regex(grammar.definition)
    pattern = f"^(?:{expression})$"
    fault = pattern_fault(pattern)
    if fault is not None:
        raise ValueError(fault)
    return pattern


def custom_tool(name: str, description: str, grammar: InputGrammar | None, pattern: str | None, param: str) -> Tool:
    """The function that stands for a custom tool.

    pattern: enforces `grammar`, which the model is shown too. param: path of the tool in the request, for messages."""
    parts = [*filter(None, [description]), *([] if grammar is None else [grammar.shown])]
    text = {"type": "string", "description": "the whole input of the tool, as plain text"}
    if pattern is not None:
        text["pattern"] = pattern
    return Tool(
        name=name,
        description="\n\n".join(parts),
        parameters={"type": "object", "properties": {INPUT: text}, "required": [INPUT], "additionalProperties": False},
        is_strict=pattern is not None,
        hides_pattern=True,
        param=f"{param}.format",
    )


def input_arguments(text: str) -> dict[str, str]:
    """The arguments of a call with this text, as chat templates expect them."""
    return {INPUT: text}


_HEAD = re.compile(r'\s*\{\s*"input"\s*:\s*"')
_PAIR = r"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}"
_PIECE = re.compile(rf'[^"\\]+|{_PAIR}|\\u[0-9a-fA-F]{{4}}|\\[^u]', re.DOTALL)
# A part of an escape, or the first half of a surrogate pair with what may begin the second.
_UNFINISHED = re.compile(r"\\(u[0-9a-fA-F]{0,3})?|\\u[dD][89abAB][0-9a-fA-F]{2}(\\(u[0-9a-fA-F]{0,3})?)?")


class InputReader:
    """Reads the text of a custom tool's call from the call's arguments while they arrive.

    A model may write other arguments than it was offered. Then the arguments themselves are the text, which is final
    only at the end. The joined pieces do not depend on how the arguments are divided between pushes.
    """

    def __init__(self) -> None:
        self._held = ""  # what cannot be decided yet: the beginning, or a part of an escape
        self._is_inside = False  # the string
        self._is_complete = False

    def push(self, arguments: str) -> str:
        """The text that is now final."""
        if self._is_complete:
            return ""
        self._held += arguments
        if not self._is_inside:
            head = _HEAD.match(self._held)
            if head is None:
                return ""
            self._held = self._held[head.end() :]
            self._is_inside = True
        return self._read_string(is_last=False)

    def flush(self) -> str:
        """The rest, when no more arguments follow."""
        if self._is_complete:
            return ""
        if self._is_inside:
            return self._read_string(is_last=True)
        self._is_complete = True
        return _other_text(self._held)

    def _read_string(self, *, is_last: bool) -> str:
        """The characters of the string in `_held`, up to its end or to a part of an escape."""
        held, position, text = self._held, 0, []
        while position < len(held):
            if held[position] == '"':
                self._is_complete = True
                break
            if _UNFINISHED.fullmatch(held, position) and not is_last:
                break
            found = _PIECE.match(held, position)
            piece = held[position] if found is None else found[0]  # not JSON: the character itself
            text.append(_unescaped(piece))
            position += len(piece)
        self._held = held[position:]
        return "".join(text)


def _unescaped(piece: str) -> str:
    """The characters that a piece of a JSON string stands for. Half a surrogate pair, which UTF-8 cannot encode, is
    replaced."""
    if not piece.startswith("\\"):
        return piece
    try:
        character: str = json.loads(f'"{piece}"')
    except ValueError:  # not one of JSON's escapes
        return piece.removeprefix("\\") or piece
    return "\N{REPLACEMENT CHARACTER}" if "\ud800" <= character <= "\udfff" else character


def _other_text(arguments: str) -> str:
    """The text of unexpected arguments: their only value if it is a string, else all of them."""
    try:
        value = json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
    if isinstance(value, dict):
        value = value.get(INPUT, next(iter(value.values()), "") if len(value) <= 1 else value)
    return value if isinstance(value, str) else arguments
