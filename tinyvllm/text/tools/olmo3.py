"""OLMo 3: `<function_calls>`, calls as in Python with named arguments, one a line, and `</function_calls>`.

https://huggingface.co/allenai/Olmo-3-7B-Instruct (its chat template)
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tinyvllm.text.grammar import lark_json, lark_string
from tinyvllm.text.tools.base import TEXT_RULE, Tool, ToolFormat, mark, marked_head
from tinyvllm.text.tools.block import BlockParser
from tinyvllm.text.tools.events import ToolParser
from tinyvllm.text.tools.keyed import Rules, Schema, pairs, properties_of

if TYPE_CHECKING:
    from tinyvllm.text.tokenizer import Tokenizer

BEGIN, END = "<function_calls>", "</function_calls>"
HEAD = re.compile(r"[\s,;]*([\w.\-]+)\(")
WORDS = {"true": True, "false": False, "null": None}  # JSON's, which models write as often as Python's


class Olmo3Parser(BlockParser):
    def __init__(self) -> None:
        super().__init__(BEGIN, END)

    def read_block(self, body: str) -> list[tuple[str, dict[str, Any]]] | None:
        calls, rest = [], body.rstrip(" \n,;")
        while rest:
            head = HEAD.match(rest)
            length = None if head is None else _length_of_arguments(rest[head.end() :])
            if head is None or length is None:
                return None
            arguments = read_arguments(rest[head.end() : head.end() + length])
            if arguments is None:
                return None
            calls.append((head[1], arguments))
            rest = rest[head.end() + length + 1 :]
        return calls


def _length_of_arguments(text: str) -> int | None:
    """The place of the parenthesis that ends the arguments; None if it is missing."""
    depth, quote, is_escaped = 1, "", False
    for index, character in enumerate(text):
        if quote:
            is_escaped, is_end = character == "\\" and not is_escaped, character == quote and not is_escaped
            quote = "" if is_end else quote
        elif character in "\"'":
            quote = character
        elif character in "([{":
            depth += 1
        elif character in ")]}":
            depth -= 1
            if depth == 0:
                return index
    return None


def read_arguments(text: str) -> dict[str, Any] | None:
    """`city="Rome", days=2` as a dictionary; None if a value is not a literal, or has no name."""
    try:
        call = ast.parse(f"f({text})", mode="eval").body
        if not isinstance(call, ast.Call) or call.args:
            return None
        return {keyword.arg: _literal(keyword.value) for keyword in call.keywords if keyword.arg is not None}
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _literal(node: ast.expr) -> Any:
    """The value of a literal of Python or JSON. Raises ValueError."""
    if isinstance(node, ast.Name) and node.id in WORDS:
        return WORDS[node.id]
    if isinstance(node, ast.List | ast.Tuple):
        return [_literal(element) for element in node.elts]
    if isinstance(node, ast.Dict):
        keys = [None if key is None else _literal(key) for key in node.keys]
        if any(not isinstance(key, str) for key in keys):
            raise ValueError("keys are strings")
        return {str(key): _literal(value) for key, value in zip(keys, node.values, strict=True)}
    value = ast.literal_eval(node)
    json.dumps(value, allow_nan=False)
    return value


class Olmo3Format(ToolFormat):
    marks = (BEGIN,)
    special_texts = (BEGIN, END)

    def parser(self, tools: Mapping[str, Tool]) -> ToolParser:
        return Olmo3Parser()

    def forced_grammar(self, tools: Sequence[Tool], tokenizer: Tokenizer, *, is_parallel: bool) -> str:
        more = ' ("\\n" call)*' if is_parallel else ""
        begin, end = mark(tokenizer, BEGIN), mark(tokenizer, END)
        return f'start: {begin} "\\n"? call{more} "\\n"? {end}\n{_call_rules(tools, all_strict=True)}'

    def free_grammar(self, tools: Sequence[Tool], tokenizer: Tokenizer) -> str:
        end, rules = mark(tokenizer, END), _call_rules(tools, all_strict=False)
        head = marked_head(mark(tokenizer, BEGIN))
        return f'start: (head "\\n"? call ("\\n" call)* "\\n"? {end})* TEXT\n{head}{TEXT_RULE}{rules}'

    def write(self, calls: Sequence[Mapping[str, Any]]) -> str:
        def written(arguments: Mapping[str, Any]) -> str:
            return ", ".join(f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in arguments.items())

        return BEGIN + "\n".join(f"{call['name']}({written(call['arguments'])})" for call in calls) + END


def _call_rules(tools: Sequence[Tool], *, all_strict: bool) -> str:
    """The rule `call`; values are JSON, which is read like Python's."""
    rules = Rules()
    calls = []
    for tool in tools:
        schema = properties_of(tool, is_enforced=all_strict or tool.is_strict)

        def pair(key: str, value: Schema, param: str = tool.param) -> str:
            return rules.add(f"SPACE? {lark_string(key + '=')} {rules.add(lark_json(value, param))}")

        any_pair = 'SPACE? KEY "=" any_value'
        arguments = f'({any_pair} ("," {any_pair})*)?' if schema is None else pairs(rules, schema, pair)
        calls.append(rules.add(f"{lark_string(tool.name + '(')} {arguments} {lark_string(')')}"))
    any_value = f'any_value: {lark_json({}, "tools")}\nKEY: /[A-Za-z_]\\w*/\nSPACE: " "\n'
    return f"call: {' | '.join(calls)}\n{rules.text()}{any_value}"


FORMAT = Olmo3Format()
