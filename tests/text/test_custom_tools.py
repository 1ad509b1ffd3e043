"""Custom tools: their text from arguments as they come, and their grammars as patterns of strings."""

from __future__ import annotations

import json
import random
import re

import pytest

from tests.server.fake_engine import ByteTokenizer
from tinyvllm.config import GrammarSpec
from tinyvllm.text.grammar import Vocabulary, compile_grammar
from tinyvllm.text.lark_regex import lark_to_regex
from tinyvllm.text.tools.custom import InputGrammar, InputReader, custom_tool, pattern_of

# Codex's, of its tool apply_patch
PATCHES = r"""start: begin_patch hunk+ end_patch
begin_patch: "*** Begin Patch" LF
end_patch: "*** End Patch" LF?

hunk: add_hunk | delete_hunk | update_hunk
add_hunk: "*** Add File: " filename LF add_line+
delete_hunk: "*** Delete File: " filename LF
update_hunk: "*** Update File: " filename LF change_move? change?

filename: /(.+)/
add_line: "+" /(.*)/ LF -> line

change_move: "*** Move to: " filename LF
change: (change_context | change_line)+ eof_line?
change_context: ("@@" | "@@ " /(.+)/) LF
change_line: ("+" | "-" | " ") /(.*)/ LF
eof_line: "*** End of File" LF

%import common.LF
"""
PATCH = '*** Begin Patch\n*** Update File: a.txt\n@@\n-Helo "é"\\ \t\n+Hello\n*** End Patch'


@pytest.mark.parametrize("text", ['a"b\\n\n\t😀é\\u', "", "x" * 50, '"}', "😀😀"])
def test_the_text_does_not_depend_on_how_arguments_are_divided(text: str) -> None:
    randomness = random.Random(0)
    for arguments in (json.dumps({"input": text}), json.dumps({"input": text}, ensure_ascii=False)):
        for _ in range(20):
            reader, read, rest = InputReader(), "", arguments
            while rest:
                count = randomness.randint(1, 5)
                read += reader.push(rest[:count])
                rest = rest[count:]
            assert read + reader.flush() == text


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ('{"input": "cut off \\u00', "cut off \\u00"),
        ('{"input": "\\ud83d"}', "\ufffd"),
        ('{"input": "a\\qb"}', "aqb"),
        ('{"input": "a\nb"}', "a\nb"),
        ('{"other": "a"}', "a"),
        ('{"a": "b", "input": "c"}', "c"),
        ("not JSON", "not JSON"),
    ],
)
def test_arguments_that_are_no_document_still_have_a_text(arguments: str, text: str) -> None:
    reader = InputReader()
    assert reader.push(arguments) + reader.flush() == text


@pytest.mark.parametrize(
    ("grammar", "matching", "other"),
    [
        (PATCHES, [PATCH, PATCH + "\n"], [PATCH + "x", PATCH.replace("@@", "@")]),
        ('start: "a".."c"~2..3 ["x"i] | B\nB.2: /[0-9]+\\/x/i // a comment\n', ["ab", "cccX", "12/X"], ["a", "abcd"]),
        ("?start: WORD (WS_INLINE WORD)~2\n%import common (WORD, WS_INLINE)", ["a b c"], ["a b", "a b c d"]),
        ('start: NL "(.*)"\n%import common.LF -> NL', ["\n(.*)"], ["\nab", "(.*)"]),
    ],
)
def test_a_grammar_without_recursion_is_an_expression(grammar: str, matching: list[str], other: list[str]) -> None:
    expression = re.compile(lark_to_regex(grammar))
    assert all(expression.fullmatch(text) for text in matching)
    assert not any(expression.fullmatch(text) for text in other)


@pytest.mark.parametrize(
    ("grammar", "reason"),
    [
        ('start: "(" start ")" | "x"', "recursive"),
        ("start: /a", "cannot be read"),
        ("start: b", "missing"),
        ('start: "a"\n%ignore WS', "not supported"),
        ("", "does not begin"),
        ('start: "a" ~', "too early"),
        ('start: ("a"', "too early"),
        ("start: %json {}", "cannot be read"),
        ("start: " + "(" * 5000, "brackets"),
        ('start: a a a a a\na: b b b b b b b b\nb: c c c c c c c c\nc: "' + "x" * 300 + '"', "longer than"),
    ],
)
def test_what_is_no_expression_is_refused(grammar: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        lark_to_regex(grammar)


def test_the_pattern_is_enforced_inside_of_json() -> None:
    grammar = InputGrammar("lark", PATCHES)
    tool = custom_tool("apply_patch", "Edits files.", grammar, pattern_of(grammar), "tools.0")
    assert tool.is_strict and PATCHES in tool.description and "pattern" not in str(tool.shown_parameters)
    vocabulary = Vocabulary(ByteTokenizer(), 257, frozenset({256}))  # type: ignore[arg-type]
    compiled = compile_grammar(GrammarSpec("lark", f"start: {tool.rule()}", param="x"), vocabulary)

    def is_accepted(text: str) -> bool:
        matcher = compiled.matcher()
        document = json.dumps({"input": text}, ensure_ascii=False).encode()
        return all(matcher.accept(byte) for byte in document) and matcher.accept(256)

    assert is_accepted(PATCH)
    assert not is_accepted(PATCH + "x") and not is_accepted("Hello")
    with pytest.raises(ValueError, match="look-around"):
        pattern_of(InputGrammar("regex", "(?=a)b"))
