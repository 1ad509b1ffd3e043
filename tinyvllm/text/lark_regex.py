"""Lark grammars without recursion as one regular expression.

The input of a custom tool is a string inside JSON. A grammar of characters cannot describe it, but the pattern of a
JSON schema can, because llguidance escapes it. The language is Lark's without templates, %ignore, %declare and %extend:
https://lark-parser.readthedocs.io/en/stable/grammar.html
"""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence

MAX_CHARS = 64 * 1024  # of the expression: rules that name each other twice grow exponentially

_TOKEN = re.compile(
    r"""(?P<skip>\s+|//[^\n]*)
    |(?P<string>"(?:\\.|[^"\\\n])*"i?)
    |(?P<regexp>/(?!/)(?:\\.|[^/\\\n])*/[imslux]*)
    |(?P<name>[?!]?[A-Za-z_]\w*)
    |(?P<number>\d+)
    |(?P<sign>->|\.\.|[:|()\[\]*+?~.,%])""",
    re.VERBOSE,
)
_COMMON = {
    "CR": r"\r", "LF": r"\n", "NEWLINE": r"(?:\r?\n)+", "WS": r"[ \t\f\r\n]+", "WS_INLINE": r"[ \t]+",
    "DIGIT": "[0-9]", "HEXDIGIT": "[0-9a-fA-F]", "INT": "[0-9]+", "SIGNED_INT": "[+-]?[0-9]+",
    "DECIMAL": r"(?:[0-9]+\.[0-9]*|\.[0-9]+)",
    "FLOAT": r"(?:[0-9]+[eE][+-]?[0-9]+|(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)",
    "NUMBER": r"(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?",
    "SIGNED_NUMBER": r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?",
    "LCASE_LETTER": "[a-z]", "UCASE_LETTER": "[A-Z]", "LETTER": "[a-zA-Z]", "WORD": "[a-zA-Z]+",
    "CNAME": "[a-zA-Z_][a-zA-Z_0-9]*", "ESCAPED_STRING": r'"(?:[^"\\\n]|\\[^\n])*"',
}  # fmt: skip
_ESCAPED = re.compile(r"[\\.+*?()|\[\]{}^$#&~/-]")
_CONTROLS = {"\n": r"\n", "\r": r"\r", "\t": r"\t", "\f": r"\f"}


def lark_to_regex(grammar: str) -> str:
    """The expression that matches what the rule `start` matches. Raises ValueError for what cannot be expressed."""
    try:
        return _Rules(grammar).expression("start")
    except RecursionError:
        raise ValueError("the grammar has too many brackets inside of brackets") from None


def _tokens(grammar: str) -> list[tuple[str, str]]:
    """(kind, text) of each token."""
    tokens, position = [], 0
    while position < len(grammar):
        found = _TOKEN.match(grammar, position)
        if found is None or found.lastgroup is None:
            raise ValueError(f"{grammar[position : position + 20]!a} cannot be read")
        if found.lastgroup != "skip":
            tokens.append((found.lastgroup, found[0]))
        position = found.end()
    return tokens


class _Rules:
    """The rules of a grammar. Owns the expressions of those that have been converted."""

    def __init__(self, grammar: str) -> None:
        self._bodies: dict[str, Sequence[tuple[str, str]]] = {}
        self._expressions: dict[str, str] = {}
        self._open: list[str] = []  # rules that are being converted
        tokens = _tokens(grammar)
        starts = [position for position in range(len(tokens)) if _begins(tokens, position)]
        if starts[:1] != [0]:
            raise ValueError("the grammar does not begin with a rule")
        for start, end in zip(starts, [*starts[1:], len(tokens)], strict=True):
            self._define(tokens[start:end])

    def _define(self, tokens: Sequence[tuple[str, str]]) -> None:
        if tokens[0][1] == "%":
            self._import(tokens)
            return
        colon = tokens.index(("sign", ":"))
        self._bodies[tokens[0][1].lstrip("?!")] = tokens[colon + 1 :]

    def _import(self, tokens: Sequence[tuple[str, str]]) -> None:
        """%import common.LF, common.LF -> NL, or common (LF, WS)."""
        names = [text for kind, text in tokens if kind == "name"]
        if names[:2] != ["import", "common"]:
            raise ValueError(f"%{' '.join(names[:2])} is not supported")
        known = names[2:3] if ("sign", "->") in tokens else names[2:]
        for name, given in zip(known, names[3:] if ("sign", "->") in tokens else known, strict=True):
            if name not in _COMMON:
                raise ValueError(f"common.{name} is not known")
            self._expressions[given] = _COMMON[name]

    def expression(self, name: str) -> str:
        if name in self._open:
            raise ValueError(f"the rule {name} is recursive")
        if name not in self._expressions:
            if name not in self._bodies:
                raise ValueError(f"the rule {name} is missing")
            self._open.append(name)
            self._expressions[name] = _Body(self, self._bodies[name]).read()
            self._open.pop()
        return self._expressions[name]


def _begins(tokens: Sequence[tuple[str, str]], position: int) -> bool:
    """Whether a rule or a directive begins here: a name with a colon, perhaps after its priority, or a %."""
    kind, text = tokens[position]
    if text == "%":
        return True
    rest = [text for _, text in tokens[position + 1 : position + 4]]
    is_rule = rest[:1] == [":"] or (rest[:1] == ["."] and rest[2:3] == [":"])
    return kind == "name" and is_rule


class _Body:
    """Reads the body of one rule, from left to right."""

    def __init__(self, rules: _Rules, tokens: Sequence[tuple[str, str]]) -> None:
        self._rules = rules
        self._tokens = tokens
        self._position = 0

    def read(self) -> str:
        expression = self._alternatives()
        if self._position < len(self._tokens):
            raise ValueError(f"{self._tokens[self._position][1]!a} is not expected here")
        return expression

    @property
    def _next(self) -> str:
        return self._tokens[self._position][1] if self._position < len(self._tokens) else ""

    def _take(self) -> tuple[str, str]:
        if self._position >= len(self._tokens):
            raise ValueError("a rule ends too early")
        self._position += 1
        return self._tokens[self._position - 1]

    def _alternatives(self) -> str:
        found = [self._sequence()]
        while self._next == "|":
            self._take()
            found.append(self._sequence())
        expression = found[0] if len(found) == 1 else f"(?:{'|'.join(found)})"
        if len(expression) > MAX_CHARS:
            raise ValueError(f"the grammar is longer than {MAX_CHARS} characters without its rules")
        return expression

    def _sequence(self) -> str:
        items = []
        while self._next not in ("", "|", ")", "]", "->"):
            items.append(self._repeated())
        if self._next == "->":  # an alias, which only names the result
            self._take()
            self._take()
        return "".join(items)

    def _repeated(self) -> str:
        item = self._item()
        if self._next in ("*", "+", "?"):
            return f"(?:{item}){self._take()[1]}"
        if self._next != "~":
            return item
        self._take()
        low = high = self._number()
        if self._next == "..":
            self._take()
            high = self._number()
        return f"(?:{item}){{{low},{high}}}"

    def _number(self) -> int:
        kind, text = self._take()
        if kind != "number":
            raise ValueError(f"~{text} is not a number")
        return int(text)

    def _item(self) -> str:
        kind, text = self._take()
        if text in ("(", "["):
            inner = self._alternatives()
            if self._take()[1] != {"(": ")", "[": "]"}[text]:
                raise ValueError(f"{text!a} is not closed")
            return f"(?:{inner})" + ("?" if text == "[" else "")
        match kind:
            case "name":
                return self._rules.expression(text)
            case "string" if self._next == "..":
                self._take()
                return f"[{_escape(_literal(text))}-{_escape(_literal(self._take()[1]))}]"
            case "string":
                return _with_flags(_escape(_literal(text)), "i" if text.endswith("i") else "")
            case "regexp":
                body, _, flags = text[1:].rpartition("/")
                return _with_flags(body.replace("\\/", "/"), flags)
        raise ValueError(f"{text!a} is not expected here")


def _literal(text: str) -> str:
    try:
        value = ast.literal_eval(text.removesuffix("i"))
    except (SyntaxError, ValueError):
        value = None
    if not isinstance(value, str):
        raise ValueError(f"{text[:40]!a} is not a string")
    return value


def _escape(text: str) -> str:
    escaped = _ESCAPED.sub(lambda found: "\\" + found[0], text)
    return "".join(_CONTROLS.get(character, character) for character in escaped)


def _with_flags(expression: str, flags: str) -> str:
    known = "".join(flag for flag in flags if flag in "imsx")  # Python's l and u have no meaning here
    return f"(?{known}:{expression})" if known else f"(?:{expression})"
