"""gpt-oss's messages: read as OpenAI's library reads them, and rendered as it renders them.

Expected: data/harmony_reference.json, which write_harmony_reference.py makes.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st

from tests.sweeps import examples
from tests.text.harmony import TEMPLATE, encode, make_tokenizer, written
from tests.text.write_harmony_reference import CHATS, DATE, FORMED, MALFORMED, OUTPUT, PIECES, TOOL
from tinyvllm.config import GrammarSpec
from tinyvllm.errors import RequestError
from tinyvllm.text import template_environment
from tinyvllm.text.chat import ChatTemplate, end_of_turn_ids
from tinyvllm.text.detokenizer import SPECIAL_MARK, Detokenizer, detokenize
from tinyvllm.text.grammar import Grammar, Vocabulary, compile_grammar
from tinyvllm.text.tools.base import Tool
from tinyvllm.text.tools.events import CallArguments, CallBegin, Reasoning, Text, joined
from tinyvllm.text.tools.harmony import FORMAT
from tinyvllm.text.tools.harmony_parser import HarmonyParser

REFERENCE: dict[str, Any] = json.loads(OUTPUT.read_text(encoding="utf-8"))
TOKENIZER = make_tokenizer()
VOCABULARY = Vocabulary(TOKENIZER, TOKENIZER.vocab_size, frozenset(TOKENIZER.encode_chat("<|return|><|call|>")))
NAMES = ("get_weather", "time-now")
WEATHER = Tool("get_weather", parameters=TOOL["function"]["parameters"])  # type: ignore[index]

Read = tuple[str, str, list[list[str]]]


def read(pieces: Iterable[str], names: Iterable[str] | None = NAMES, opening: str = "assistant") -> Read:
    """(reasoning, content, calls)"""
    parser = HarmonyParser(None if names is None else frozenset(names), opening, SPECIAL_MARK)
    events = [event for piece in pieces for event in parser.push(piece)] + parser.flush()
    reasoning, content, calls = "", "", list[list[str]]()
    for event in joined(events):
        match event:
            case Reasoning():
                reasoning += event.text
            case Text():
                content += event.text
            case CallBegin():
                assert event.index == len(calls)
                calls.append([event.name, ""])
            case CallArguments():
                calls[-1][1] += event.text
    assert parser.num_calls == len(calls)
    return reasoning, content, calls


def expected(messages: list[list[str | None]]) -> Read:
    """The rule of harmony_parser.py on the library's messages."""
    reasoning, content, calls = list[str](), list[str](), list[list[str]]()
    for role, channel, recipient, text in messages:
        assert text is not None
        recipient = None if recipient is not None and recipient.startswith(("<|", "json")) else recipient
        if role == "assistant" and recipient is not None and recipient.startswith("functions."):
            calls.append([recipient.removeprefix("functions."), text or "{}"])
        elif role == "assistant" and channel == "final":
            content.append(text)
        elif role != "assistant" or channel == "analysis" or recipient not in (None, "assistant", "all"):
            reasoning.append(text)
        else:
            content.append(text)
    return "\n\n".join(filter(None, reasoning)), "\n\n".join(filter(None, content)), calls


def test_completions_are_read_as_by_the_library() -> None:
    formed = [one for one in REFERENCE["completions"] if one["text"] not in MALFORMED]
    assert len(formed) > 90 and all("messages" in one for one in formed)
    for one in formed:
        assert read([written(one["text"])]) == expected(one["messages"]), one["text"]


def test_the_library_refuses_or_drops_what_is_malformed() -> None:
    """But for a header inside a message, which is text for the library, and here the next message."""
    refused = {one["text"]: "messages" in one for one in REFERENCE["completions"] if one["text"] in MALFORMED}
    assert [*refused.values()].count(False) == 8


@pytest.mark.parametrize(
    ("message", "found"),
    [
        ("Just text, without any header.", ("", "Just text, without any header.", [])),
        ("«channel»final", ("", "", [])),
        ("«channel»analysis We should greet.", ("We should greet.", "", [])),
        ("«channel»analysis«message»cut «start»assistant«channel»final«message»off", ("cut ", "off", [])),
        ("«end»«end»text between", ("", "text between", [])),
        ("«start»«start»assistant«message»a", ("", "a", [])),
        ("«channel»final«message»a«end»«channel»final«message»b", ("", "a\n\nb", [])),
        ("«channel»«channel»«message»x", ("", "x", [])),
        ("«channel»commentary to=functions.get_weather", ("", "", [])),
        ("«channel»final\nThe header never ends", ("", "The header never ends", [])),
    ],
)
def test_malformed_output_is_not_lost(message: str, found: Read) -> None:
    assert read([written(message)]) == found


@pytest.mark.parametrize(
    ("message", "found"),
    [
        ("«channel»final«message»a «start» b «message» c", ("", "a <|start|> b <|message|> c", [])),
        ("«channel»final«message»a «channel» b\nc", ("", "a <|channel|> b\nc", [])),
        ("«channel»analysis«message»a«start»" + "b" * 300, ("a<|start|>" + "b" * 300, "", [])),
        ("«channel»commentary to=get_weather«message»{}", ("", "", [["get_weather", "{}"]])),
        ("«channel»commentary to=unknown«message»{}", ("{}", "", [])),
        (" assistant«channel»final«message»a", ("", "a", [])),
        ("«channel»final«message»a«end»b", ("", "a\n\nb", [])),
        (
            "«channel»commentary to=functions.f«message»«start»assistant«channel»final«message»a",
            ("", "a", [["f", "{}"]]),
        ),
        ("«end»«start»assistant odd words«channel»analysis«message»a", ("odd words a", "", [])),
        ("to be or not to be", ("", "to be or not to be", [])),
        (" \n", ("", " \n", [])),
    ],
)
def test_words_stay_where_the_model_put_them(message: str, found: Read) -> None:
    assert read([written(message)]) == found


def test_without_tools_a_call_is_content() -> None:
    message = written('«channel»commentary to=functions.get_weather«message»{"a": 1}')
    assert read([message], names=None) == ("", '{"a": 1}', [])


def test_the_prompt_may_have_begun_the_message() -> None:
    assert read(["Yes."], opening="assistant<|channel|>final<|message|>") == ("", "Yes.", [])
    message = written("Hm.«end»«start»assistant«channel»final«message»Yes.")
    assert read([message], opening="assistant<|channel|>analysis<|message|>") == ("Hm.", "Yes.", [])


@examples(80, 300)
@hypothesis.given(
    st.one_of(st.sampled_from([*FORMED, *MALFORMED]), st.lists(st.sampled_from(PIECES), max_size=12).map("".join)).map(
        written
    ),
    st.sets(st.integers(0, 200), max_size=8),
)
def test_every_cut_gives_the_same(message: str, cuts: set[int]) -> None:
    edges = sorted({min(cut, len(message)) for cut in cuts} | {0, len(message)})
    assert read(message[start:end] for start, end in itertools.pairwise(edges)) == read([message]) == read(message)


def test_special_tokens_are_told_from_the_same_text() -> None:
    text = "«channel»final«message»<|end|> \ufdd0<|end|> é«end»"
    detokenizer = Detokenizer(TOKENIZER, skip_special_tokens=False, mark_special_tokens=True)
    ids = encode(TOKENIZER, text)
    pieces = [*map(detokenizer.push, ids), detokenizer.flush()]
    assert read(pieces) == ("", "<|end|> \ufffd<|end|> é", [])
    assert "".join(pieces) == detokenize(TOKENIZER, ids, skip_special_tokens=False, mark_special_tokens=True)
    half = [*encode(TOKENIZER, "«channel»final«message»é")[:-1], *encode(TOKENIZER, "«end»")]
    assert read([detokenize(TOKENIZER, half, skip_special_tokens=False, mark_special_tokens=True)])[1] == "\ufffd"


def test_text_streams_as_soon_as_it_is_none_of_the_header() -> None:
    parser = HarmonyParser(None, mark=SPECIAL_MARK)
    assert parser.push("He") == [Text("He")] and parser.push("llo") == [Text("llo")]
    parser = HarmonyParser(frozenset(NAMES), mark=SPECIAL_MARK)
    assert parser.push(written("«channel»commentary to=functions.get_weather")) == []
    assert parser.push(written("«message»")) == [CallBegin(0, "get_weather")]
    assert parser.push('{"ci') == [CallArguments(0, '{"ci')]


# ---- Prompts ----


def render(name: str, **more: Any) -> str:
    template = ChatTemplate({"default": TEMPLATE}, {}, "tiny")
    asked = CHATS[name]
    tools = [WEATHER] if "tools" in asked else []
    messages = FORMAT.prepare(asked["messages"], tools, has_template=True)
    return template.render(messages, tools=asked.get("tools"), **FORMAT.template_arguments(more))


@pytest.mark.parametrize("name", CHATS)
def test_history_is_rendered_as_by_the_library(name: str) -> None:
    """Everything after the developer's message, in which the template of the tests describes tools its own way."""

    def history(text: str) -> str:
        return text[text.index("<|start|>user") :]

    assert history(render(name)) == history(REFERENCE["chats"][name])


def test_instructions_are_one_message_and_none_is_lost() -> None:
    said = [("system", "A"), ("system", "B"), ("user", "C"), ("system", "D"), ("assistant", "E")]
    messages = [{"role": role, "content": content} for role, content in said]
    found = FORMAT.prepare(messages, [], has_template=True)
    assert [(one["role"], one["content"]) for one in found] == [
        ("system", "A\n\nB"), ("user", "C"), ("user", "D"), ("assistant", "E"),
    ]  # fmt: skip


def test_efforts_are_those_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_environment, "strftime_now", lambda _: DATE)
    efforts = {"minimal": "low", "none": "low", "high": "high", "xhigh": "high", "medium": "medium"}
    for effort, meant in efforts.items():
        assert f"Reasoning: {meant}<" in render("question", reasoning_effort=effort)
    with pytest.raises(RequestError, match="choose from none, minimal, low"):
        FORMAT.template_arguments({"reasoning_effort": "much"})
    assert FORMAT.template_arguments({"reasoning_effort": None, "a": 1}) == {"a": 1}


def test_turns_end_with_a_call_or_a_return() -> None:
    template = ChatTemplate({"default": TEMPLATE}, {}, "tiny")
    assert end_of_turn_ids(template, TOKENIZER) == tuple(TOKENIZER.encode_chat("<|return|><|call|>"))
    assert len(REFERENCE["ends"]) == 2


# ---- Grammars ----


def compiled(kind: str, text: str, *, has_header: bool, prompt: str = "<|start|>assistant") -> Grammar:
    prefix = FORMAT.prefix(prompt, TOKENIZER, has_header=has_header)
    return compile_grammar(GrammarSpec(kind, text, prefix=prefix), VOCABULARY)


def accepts(grammar: Grammar, text: str) -> bool:
    """Whether `text` is allowed and complete."""
    matcher = grammar.matcher()
    ids = encode(TOKENIZER, text)
    return all(map(matcher.accept, ids)) and (matcher.is_finished or matcher.accept(min(VOCABULARY_ENDS)))


VOCABULARY_ENDS = TOKENIZER.encode_chat("<|return|>")
THOUGHT = "«channel»analysis«message»{}? Hm.«end»«start»assistant"


def test_a_document_is_in_the_final_channel_after_any_reasoning() -> None:
    grammar = compiled("json_schema", '{"type": "integer"}', has_header=False)
    final = "«channel»final«message»"
    assert accepts(grammar, f"{final}17") and accepts(grammar, f"{THOUGHT}{THOUGHT}{final}17")
    assert not accepts(grammar, "17") and not accepts(grammar, f"{final}x") and not accepts(grammar, THOUGHT)
    assert not accepts(grammar, "«channel»commentary«message»17")
    opened = compiled("regex", "1+", has_header=False, prompt=f"<|start|>assistant{'<|channel|>final<|message|>'}")
    assert accepts(opened, "11") and not accepts(opened, f"{final}11")
    inside = "<|start|>assistant<|channel|>analysis<|message|>"
    inside_grammar = compiled("choice", '["a"]', has_header=False, prompt=inside)
    assert accepts(inside_grammar, f"Hm.«end»«start»assistant{final}a") and not accepts(inside_grammar, f"{final}a")


def test_a_forced_call_follows_reasoning_and_has_its_schema() -> None:
    grammar = compiled("lark", FORMAT.forced_grammar([WEATHER], TOKENIZER, is_parallel=True), has_header=True)
    call = "«channel»commentary to=functions.get_weather «constrain»json«message»"
    written_call = f'{THOUGHT}{call}{{"city":"Rom","days":[1]}}'
    assert accepts(grammar, written_call) and read([written(written_call)])[2] == [
        ["get_weather", '{"city":"Rom","days":[1]}']
    ]
    assert not accepts(grammar, f'{call}{{"unit": "C"}}') and not accepts(grammar, "«channel»final«message»No.")


def test_a_strict_tool_is_called_by_its_schema_or_not_at_all() -> None:
    tools = [Tool("get_weather", parameters=WEATHER.parameters, is_strict=True), Tool("time-now")]
    grammar = compiled("lark", FORMAT.free_grammar(tools, TOKENIZER), has_header=True)
    call = "«channel»commentary to=functions.{} «constrain»json«message»"
    assert accepts(grammar, f"{THOUGHT}«channel»final«message»No.")
    preamble = "«channel»commentary«message»First this.«end»«start»assistant"
    assert accepts(grammar, f'{preamble}{call.format("get_weather")}{{"city": "Rom"}}')
    assert accepts(grammar, f'{call.format("time-now")}{{"x": 1}}'), "not strict, so any object will do"
    assert not accepts(grammar, f'{call.format("get_weather")}{{"town": "Rom"}}')
