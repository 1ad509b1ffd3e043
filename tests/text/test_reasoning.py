"""Reasoning is split off the same way however the text is cut."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import hypothesis
import pytest
from hypothesis import strategies as st

from tinyvllm.errors import TinyvllmError
from tinyvllm.text.chat import ChatTemplate
from tinyvllm.text.reasoning import FORMATS, find_reasoning_format

THINK = FORMATS["think"]


def read(pieces: Iterable[str], prompt: str = "") -> tuple[str, str]:
    parser = THINK.parser(prompt)
    parts = [*(parser.push(piece) for piece in pieces), parser.flush()]
    return "".join(reasoning for reasoning, _ in parts), "".join(content for _, content in parts)


CASES = [
    ("<think>\nHm.\n\nSo.\n</think>\n\nYes. ", "", ("Hm.\n\nSo.", "Yes. ")),
    (" \n<think>a</think>b", "", ("a", "b")),
    ("<think></think>b", "", ("", "b")),
    ("  no reasoning <think>x</think>", "", ("", "  no reasoning <think>x</think>")),
    ("<thin", "", ("", "<thin")),
    ("<thinking>", "", ("", "<thinking>")),
    (" ", "", ("", " ")),
    ("", "", ("", "")),
    ("<think>cut off </thi", "", ("cut off </thi", "")),
    ("a</think>b<think>c</think>", "<|assistant|><think>\n", ("a", "b<think>c</think>")),
    ("b", "<think>\n\n</think>\n\n", ("", "b")),
]


@pytest.mark.parametrize(("message", "prompt", "expected"), CASES)
def test_reasoning_and_content_are_told_apart(message: str, prompt: str, expected: tuple[str, str]) -> None:
    assert read([message], prompt) == expected
    assert read(message, prompt) == expected


@hypothesis.given(
    st.one_of(
        st.sampled_from([case[0] for case in CASES]),
        st.lists(st.sampled_from(["<think>", "</think>", "<thi", "</", " ", "\n", "a"]), max_size=12).map("".join),
    ),
    st.sets(st.integers(0, 40), max_size=6),
    st.sampled_from(["", "<think>"]),
)
def test_every_cut_gives_the_same(message: str, cuts: set[int], prompt: str) -> None:
    edges = sorted({min(cut, len(message)) for cut in cuts} | {0, len(message)})
    pieces = [message[start:end] for start, end in itertools.pairwise(edges)]
    assert read(pieces, prompt) == read([message], prompt)


def test_what_a_template_begins_the_answer_with_decides_who_speaks_first() -> None:
    """Qwen3's thinks unless the request says otherwise: the prompt then ends after empty reasoning."""
    source = "{{ messages[0].content }}\n{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
    template = ChatTemplate({"default": source}, {}, "tiny")
    assert find_reasoning_format(None, template.source) is THINK
    messages = [{"role": "user", "content": "Hm?"}]
    assert read(["<think>\nSo.\n</think>\n\nYes."], template.render(messages)) == ("So.", "Yes.")
    assert read(["Yes."], template.render(messages, enable_thinking=False)) == ("", "Yes.")


@pytest.mark.parametrize(
    ("name", "message", "expected"),
    [
        ("gemma4", "<|channel>thought\nHm.\n<channel|>Yes.", ("Hm.", "Yes.")),
        ("gemma4", "<|channel>final\nYes.", ("", "<|channel>final\nYes.")),
        ("granite", "Here is my thought process:\nHm.\n\nHere is my response:\nYes.", ("Hm.", "Yes.")),
        ("mistral", "[THINK]Hm.[/THINK]Yes.", ("Hm.", "Yes.")),
    ],
)
def test_other_families_have_other_marks(name: str, message: str, expected: tuple[str, str]) -> None:
    parser = FORMATS[name].parser("")
    parts = [*(parser.push(character) for character in message), parser.flush()]
    assert tuple(map("".join, zip(*parts, strict=True))) == expected


def test_the_format_is_found_by_name_or_template() -> None:
    assert find_reasoning_format(None, "'Here is my response:'") is FORMATS["granite"]
    assert find_reasoning_format(None, "<|channel>thought\n<channel|>") is FORMATS["gemma4"]
    assert find_reasoning_format(None, "... '</think>' ...") is THINK
    assert find_reasoning_format(None, "plain") is None
    assert find_reasoning_format("none", "</think>") is None
    assert find_reasoning_format("qwen3", "") is THINK
    with pytest.raises(TinyvllmError, match="deepseek_r1"):
        find_reasoning_format("deepseek", "")
