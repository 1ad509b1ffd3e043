"""Calls as the families write them: read the same however the text is cut, and written so that they can be read."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from typing import Any

import hypothesis
import jsonschema
import pytest
from hypothesis import strategies as st

from tests.builders import byte_vocabulary, is_special
from tests.sweeps import examples
from tests.text.test_grammar import TOKENIZERS, VOCABULARIES, walk
from tests.text.vocabularies import make_byte_level
from tinyvllm.config import GrammarSpec
from tinyvllm.errors import RequestError, TinyvllmError
from tinyvllm.text.grammar import Vocabulary, compile_grammar
from tinyvllm.text.tools import FAMILIES, find_tool_format, load_tool_format
from tinyvllm.text.tools.argument_types import property_schema, typed
from tinyvllm.text.tools.base import Tool, ToolFormat
from tinyvllm.text.tools.events import CallArguments, CallBegin, Text, joined

WEATHER = Tool(
    "get_weather",
    "The weather of a place.",
    {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 6}, "days": {"type": "integer", "minimum": 1}},
        "required": ["city", "days"],
        "additionalProperties": False,
    },
)
TIME = Tool("time-now")
TOOLS = {tool.name: tool for tool in (WEATHER, TIME)}
FORMATS = {name: load_tool_format(name) for name in FAMILIES}

Calls = list[tuple[str, str]]


def read(family: str, pieces: Iterable[str]) -> tuple[str, Calls]:
    """(text, calls) of a message that comes in pieces; checks the events' order on the way."""
    parser = FORMATS[family].parser(TOOLS)
    events = [event for piece in pieces for event in parser.push(piece)] + parser.flush()
    text, calls = "", list[Any]()
    for event in joined(events):
        match event:
            case Text():
                text += event.text
            case CallBegin():
                assert event.index == len(calls)
                calls.append([event.name, ""])
            case CallArguments():
                assert event.index == len(calls) - 1 and event.text
                calls[-1][1] += event.text
    assert parser.num_calls == len(calls)
    return text, [(name, arguments) for name, arguments in calls]


CASES: list[tuple[str, str, str, Calls]] = [
    # hermes
    ("hermes", "Just words, with < and <tool.", "Just words, with < and <tool.", []),
    ("hermes", "  two\n\nlines \n", "  two\n\nlines \n", []),
    (
        "hermes",
        'Let me see.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rom", "days": 2}}\n</tool_call>\n',
        "Let me see.",
        [("get_weather", '{"city": "Rom", "days": 2}')],
    ),
    (
        "hermes",
        '<tool_call>{"name": "a", "arguments": {}}</tool_call>\n<tool_call>\n{"name": "b"}\n</tool_call> Done. ',
        "Done. ",
        [("a", "{}"), ("b", "{}")],
    ),
    (
        "hermes",
        '<tool_call>[{"name": "a"}, {"name": "b", "arguments": null}]</tool_call>',
        "",
        [("a", "{}"), ("b", "{}")],
    ),
    (
        "hermes",
        '<tool_call>{"arguments": {"x": "</tool_call> }\\" {"}, "name": "a"}</tool_call>',
        "",
        [("a", '{"x": "</tool_call> }\\" {"}')],
    ),
    ("hermes", '<tool_call>{"name": "a", "arguments": "{\\"x\\": 1}"}</tool_call>', "", [("a", '{"x": 1}')]),
    ("hermes", "<tool_call>\nnot JSON\n</tool_call>.", "<tool_call>\nnot JSON\n</tool_call>.", []),
    ("hermes", "<tool_call></tool_call>", "<tool_call></tool_call>", []),
    ("hermes", '<tool_call>{"nam', '<tool_call>{"nam', []),
    ("hermes", '<tool_call>{"name": "a", "arguments": {"x": 1}</tool_call> end', "end", [("a", '{"x": 1}')]),
    ("hermes", '<tool_call>{"name": "a", "arguments": {"x": 1}}}</tool_call> end', "end", [("a", '{"x": 1}')]),
    ("hermes", '<tool_call>{"name": "a", "arguments": {"x": [1, 2', "", [("a", '{"x": [1, 2')]),
    ("hermes", '<tool_call>{"city": "Rom"}</tool_call>', '<tool_call>{"city": "Rom"}</tool_call>', []),
    # llama
    ("llama3_json", '{"name": "get_weather", "parameters": {"city": "Rom"}}', "", [("get_weather", '{"city": "Rom"}')]),
    (
        "llama3_json",
        '<|python_tag|>{"type": "function", "name": "time-now", "parameters": {}}; {"name": "get_weather"}',
        "",
        [("time-now", "{}"), ("get_weather", "{}")],
    ),
    ("llama3_json", '{"city": "Rom"}', '{"city": "Rom"}', []),
    ("llama3_json", '{"name": "Rosa", "age": 3}', '{"name": "Rosa", "age": 3}', []),
    ("llama3_json", "Words first. {}", "Words first. {}", []),
    ("llama3_json", '{"name": "time-now"} and so on', "and so on", [("time-now", "{}")]),
    ("llama3_json", "<|python_tag|>print(1)", "print(1)", []),
    ("llama3_json", "<|py", "<|py", []),
    ("llama3_json", " <|pyt {", " <|pyt {", []),
    ("llama3_json", '{"na', '{"na', []),
    ("llama3_json", "", "", []),
    # mistral
    (
        "mistral",
        '[TOOL_CALLS] [{"name": "a", "arguments": {"x": 1}}, {"name": "b"}]',
        "",
        [("a", '{"x": 1}'), ("b", "{}")],
    ),
    ("mistral", 'Yes: [TOOL_CALLS]a[ARGS]{"x": "}"}[TOOL_CALLS]b{}', "Yes:", [("a", '{"x": "}"}'), ("b", "{}")]),
    ("mistral", '[TOOL_CALLS]a[CALL_ID]12345abcd[ARGS]{"x": 1}', "", [("a", '{"x": 1}')]),
    ("mistral", "[TOOL_CALL] [] {}", "[TOOL_CALL] [] {}", []),
    ("mistral", "[TOOL_CALLS]", "[TOOL_CALLS]", []),
    ("mistral", "[TOOL_CALLS]two words{}", "[TOOL_CALLS]two words{}", []),
    ("mistral", "[TOOL_CALLS][3]", "[TOOL_CALLS][3]", []),
    # generic
    ("json", '{"name": "time-now", "arguments": {}}', "", [("time-now", "{}")]),
    (
        "json",
        '[{"name": "time-now"}, {"name": "get_weather", "arguments": {"a": 1}}]',
        "",
        [("time-now", "{}"), ("get_weather", '{"a": 1}')],
    ),
    ("json", '\n{"function": {"name": "time-now", "arguments": {"a": 1}}}', "", [("time-now", '{"a": 1}')]),
    ("json", '{"name": "unknown", "arguments": {}}', '{"name": "unknown", "arguments": {}}', []),
    ("json", "[1, 2]", "[1, 2]", []),
    ("json", "Hello {name}.", "Hello {name}.", []),
    # granite
    (
        "granite",
        '<|tool_call|>[{"name": "a", "arguments": {"x": 1}}, {"name": "b"}]',
        "",
        [("a", '{"x": 1}'), ("b", "{}")],
    ),
    ("granite", 'Yes: <tool_call>[{"name": "a"}] Done.', "Yes:Done.", [("a", "{}")]),
    ("granite", '<|tool_call|>{"name": "a"}', "", [("a", "{}")]),
    ("granite", "<|tool_call|>[]", "<|tool_call|>[]", []),
    ("granite", "<|tool_call|>no", "<|tool_call|>no", []),
    ("granite", "a <|tool <tool", "a <|tool <tool", []),
    # phi
    ("phi4_mini_json", '<|tool_call|>[{"name": "a"}]<|/tool_call|>', "", [("a", "{}")]),
    ("phi4_mini_json", '<|tool_call|>{"name": "a"}<|/tool_call|> end', "end", [("a", "{}")]),
    ("phi4_mini_json", 'Well. functools[{"name": "a", "arguments": {"x": [1]}}]', "Well.", [("a", '{"x": [1]}')]),
    ("phi4_mini_json", "the functools module, <|tofunctools", "the functools module, <|tofunctools", []),
    ("phi4_mini_json", '<|tool_call|>[{"name": "a"}] <|/tool', "<|/tool", [("a", "{}")]),
    # olmo
    (
        "olmo3",
        '<function_calls>\nget_weather(city="Rom", days=2)\ntime-now()\n</function_calls>',
        "",
        [("get_weather", '{"city": "Rom", "days": 2}'), ("time-now", "{}")],
    ),
    (
        "olmo3",
        "Let me see. <function_calls>f(a=true, b=None, c='(\"', d=[1, {\"e\": -2.5}])</function_calls>",
        "Let me see.",
        [("f", '{"a": true, "b": null, "c": "(\\"", "d": [1, {"e": -2.5}]}')],
    ),
    ("olmo3", "<function_calls>f(x=1)", "", [("f", '{"x": 1}')]),
    ("olmo3", "<function_calls>f(1)</function_calls>", "<function_calls>f(1)</function_calls>", []),
    ("olmo3", "<function_calls>f(x=g())</function_calls>", "<function_calls>f(x=g())</function_calls>", []),
    ("olmo3", "<function_calls></function", "<function_calls></function", []),
    # gemma
    (
        "gemma4",
        'Hm. <|tool_call>call:get_weather{city:<|"|>Rom, {x}<|"|>,days:2}<tool_call|>',
        "Hm.",
        [("get_weather", '{"city": "Rom, {x}", "days": 2}')],
    ),
    (
        "gemma4",
        '<|tool_call>call:a{x:[1,<|"|>b<|"|>,{<|"|>k<|"|>:true}],y:null}<tool_call|><|tool_call>call:b{}<tool_call|>',
        "",
        [("a", '{"x": [1, "b", {"k": true}], "y": null}'), ("b", "{}")],
    ),
    ("gemma4", "<|tool_call>call:a{x:1}", "", [("a", '{"x": 1}')]),
    ("gemma4", "<|tool_call>call:a{x:bare}<tool_call|>", "<|tool_call>call:a{x:bare}<tool_call|>", []),
    ("gemma4", "<|tool_call>call:a{x:1", "<|tool_call>call:a{x:1", []),
    # harmony; more in test_harmony.py
    ("harmony", "Just words, with < and <|tool.", "Just words, with < and <|tool.", []),
    (
        "harmony",
        '<|channel|>commentary<|message|>Let me see.<|end|><|start|>assistant<|channel|>commentary '
        'to=functions.get_weather <|constrain|>json<|message|>{"city": "Rom"}<|call|>',
        "Let me see.",
        [("get_weather", '{"city": "Rom"}')],
    ),
    ("harmony", " to=time-now<|channel|>commentary<|message|>", "", [("time-now", "{}")]),
    # qwen3_coder
    (
        "qwen3_coder",
        "Let me see.\n\n<tool_call>\n<function=get_weather>\n<parameter=city>\nRom \"x\"\n\n</parameter>\n"
        "<parameter=days>\n2\n</parameter>\n</function>\n</tool_call>\n",
        "Let me see.",
        [("get_weather", '{"city": "Rom \\"x\\"\\n", "days": 2}')],
    ),
    (
        "qwen3_coder",
        "<tool_call>\n<function=time-now>\n</function>\n</tool_call>\n<tool_call>\n<function=get_weather>\n"
        "<parameter=city>\n2\n</parameter>\n<parameter=more>\n[1, {}]\n</parameter>\n</function>\n</tool_call>",
        "",
        [("time-now", "{}"), ("get_weather", '{"city": "2", "more": [1, {}]}')],
    ),
    (
        "qwen3_coder",
        "<function=get_weather><parameter=days>many</parameter><parameter=x>True</parameter></function> Done.",
        "Done.",
        [("get_weather", '{"days": "many", "x": true}')],
    ),
    (
        "qwen3_coder",
        "<tool_call>\n<function=get_weather>\n<parameter=city>\nRo",
        "",
        [("get_weather", '{"city": "Ro"}')],
    ),
    ("qwen3_coder", '<tool_call>{"name": "a"}</tool_call>', '<tool_call>{"name": "a"}</tool_call>', []),
    ("qwen3_coder", "a <functions are <tool", "a <functions are <tool", []),
    # glm45
    (
        "glm45",
        "Hm.<tool_call>get_weather<arg_key>city</arg_key><arg_value>5</arg_value><arg_key>days</arg_key>"
        "<arg_value>2</arg_value></tool_call><tool_call>time-now</tool_call>",
        "Hm.",
        [("get_weather", '{"city": "5", "days": 2}'), ("time-now", "{}")],
    ),
    (
        "glm45",
        "\n<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>\nRom</arg_value>\n</tool_call>\nDone",
        "Done",
        [("get_weather", '{"city": "\\nRom"}')],
    ),
    ("glm45", "<tool_call>two words</tool_call>", "<tool_call>two words</tool_call>", []),
    ("glm45", "<tool_call>get_weather<arg_key>city</arg_key></tool_call>", "", [("get_weather", "{}")]),
    ("glm45", "<tool_call></tool_call>", "<tool_call></tool_call>", []),
    # glm
    ("glm4", 'get_weather\n{"city": "Rom"}', "", [("get_weather", '{"city": "Rom"}')]),
    (
        "glm4",
        'Let me see.\ntime-now\n{}\nget_weather\n{"city": "}"}\nDone.',
        "Let me see.Done.",
        [("time-now", "{}"), ("get_weather", '{"city": "}"}')],
    ),
    ("glm4", "get_weather is a function", "get_weather is a function", []),
    ("glm4", "get_weather\nsays so", "get_weather\nsays so", []),
    ("glm4", "get_wea", "get_wea", []),
    ("glm4", 'Call get_weather\n{"city": 1}', 'Call get_weather\n{"city": 1}', []),
]  # fmt: skip


@pytest.mark.parametrize(("family", "message", "text", "calls"), CASES)
def test_text_and_calls_are_told_apart(family: str, message: str, text: str, calls: Calls) -> None:
    assert read(family, [message]) == (text, calls)


@pytest.mark.parametrize(("family", "message", "text", "calls"), CASES)
def test_single_characters_say_the_same(family: str, message: str, text: str, calls: Calls) -> None:
    assert read(family, message) == (text, calls)


FRAGMENTS = [
    "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>", '{"name": "time-now"', ', "arguments": ',
    "<|tool_call|>", "functools", "<function_calls>", "</function_calls>", "f(x=1)", "<|tool_call>", "call:a{",
    "}<tool_call|>", '<|"|>', "time-now\n",
    "<function=get_weather>", "<parameter=city>", "</parameter>", "</function>", "<arg_key>", "</arg_key>",
    "<arg_value>", "</arg_value>", "get_weather",
    "<|start|>assistant", "<|channel|>commentary to=functions.f", "<|message|>", "<|end|>",
    '"parameters": ', "{", "}", "[", "]", '"', "\\", ",", ";", ":", " ", "\n", "x", "1", "null", "<tool", "[TOOL", "é",
]  # fmt: skip


@st.composite
def cut_messages(draw: st.DrawFn) -> tuple[str, list[str]]:
    """A message, and the same in pieces."""
    message = draw(
        st.one_of(
            st.sampled_from([case[1] for case in CASES]), st.lists(st.sampled_from(FRAGMENTS), max_size=25).map("".join)
        )
    )
    cuts = sorted(draw(st.sets(st.integers(0, len(message)), max_size=10)) | {0, len(message)})
    return message, [message[start:end] for start, end in itertools.pairwise(cuts)]


@pytest.mark.parametrize("family", FORMATS)
@examples(25, 300)
@hypothesis.given(cut_messages())
def test_every_cut_gives_the_same_calls(family: str, cut: tuple[str, list[str]]) -> None:
    message, pieces = cut
    assert read(family, pieces) == read(family, [message])


@pytest.mark.parametrize("family", FORMATS)
@examples(20, 200)
@hypothesis.given(st.text(alphabet='abc{}[]"<>:,\\ \n|_', max_size=60))
def test_no_word_of_a_message_without_calls_is_lost(family: str, message: str) -> None:
    text, calls = read(family, [message])
    assert calls == [] and text == message


def test_arguments_come_in_pieces_and_the_name_before_them() -> None:
    parser = FORMATS["hermes"].parser(TOOLS)
    assert parser.push('<tool_call>\n{"name": "get_wea') == []
    assert parser.push('ther", ') == [CallBegin(0, "get_weather")]
    assert parser.push('"arguments": {"ci') == [CallArguments(0, '{"ci')]
    assert parser.push('ty": "R') == [CallArguments(0, 'ty": "R')]


def test_strings_between_tags_come_in_pieces() -> None:
    parser = FORMATS["qwen3_coder"].parser(TOOLS)
    assert parser.push("<tool_call>\n<function=get_weather>\n<parameter=city>\n") == [
        CallBegin(0, "get_weather"),
        CallArguments(0, '{"city": "'),
    ]
    assert parser.push('a "b"\n') == [CallArguments(0, 'a \\"b\\"')]
    assert parser.push("c</par") == [CallArguments(0, "\\nc")]
    assert parser.push("ameter>") == [CallArguments(0, '"')]
    assert parser.push("<parameter=days>1") == [CallArguments(0, ', "days": ')] and parser.push("7") == []
    assert parser.push("</parameter>") == [CallArguments(0, "17")]


REFERRED = {"$defs": {"unit": {"enum": ["C", 3, None]}}, "properties": {"u": {"$ref": "#/$defs/unit"}}}


@pytest.mark.parametrize(
    ("text", "schema", "value"),
    [
        ("5", {"type": "string"}, "5"),
        ("null", {"type": "string"}, "null"),
        ("null", {"type": ["string", "null"]}, None),
        ("5", {"anyOf": [{"type": "string"}, {"type": "integer"}]}, "5"),
        ("5", {"type": "integer"}, 5),
        ("five", {"type": "integer"}, "five"),
        ("True", {"type": "boolean"}, True),
        ('{"a": [1.5]}', {"type": "object"}, {"a": [1.5]}),
        ("[1", {"type": "array"}, "[1"),
        ("NaN", {"type": "number"}, "NaN"),
        ("[1]", {}, [1]),
        ("words", {}, "words"),
        ("3", {"enum": ["3", 3]}, "3"),
        ("3", property_schema(Tool("f", parameters=REFERRED), "u"), 3),
        ("D", {"enum": ["C", 3]}, "D"),
    ],
)
def test_values_between_tags_are_typed_by_the_schema(text: str, schema: dict[str, Any], value: Any) -> None:
    found = typed(text, schema)
    assert found == value and type(found) is type(value)


def test_text_is_not_held_longer_than_it_may_be_a_mark() -> None:
    parser = FORMATS["hermes"].parser(TOOLS)
    assert parser.push("a < b") == [Text("a < b")]
    assert parser.push(" <tool") == []
    assert parser.push("box>") == [Text(" <toolbox>")]


# ---- Grammars ----


def lark(text: str) -> GrammarSpec:
    return GrammarSpec("lark", text)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("family", FORMATS)
@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_forced_call_can_be_read_and_is_of_its_schema(family: str, name: str, seed: int) -> None:
    format = FORMATS[family]
    text = format.forced_grammar([WEATHER, TIME], TOKENIZERS[name], is_parallel=seed % 2 == 1)
    written = walk(compile_grammar(lark(text), VOCABULARIES[name]), name, seed)
    rest, calls = read(family, [written])
    assert rest == "" and calls and (seed % 2 == 1 or len(calls) == 1), written
    for called, arguments in calls:
        schema = {tool.name: tool.parameters for tool in (WEATHER, TIME)}[called]
        jsonschema.validate(json.loads(arguments), schema or {"type": "object", "maxProperties": 0})


@pytest.mark.parametrize("family", FORMATS)
def test_a_free_answer_may_be_text_or_calls(family: str) -> None:
    format, tokenizer = FORMATS[family], TOKENIZERS["byte-level"]
    strict = Tool("get_weather", "", WEATHER.parameters, is_strict=True)
    grammar = compile_grammar(lark(format.free_grammar([strict, TIME], tokenizer)), VOCABULARIES["byte-level"])

    def accepts(message: str) -> bool:
        matcher = grammar.matcher()
        return all(matcher.accept(token_id) for token_id in tokenizer.encode(message, add_special_tokens=False))

    def call(name: str, **arguments: Any) -> str:
        return format.write([{"name": name, "arguments": arguments}])

    header = "<|channel|>final<|message|>" if family == "harmony" else ""
    assert accepts(f"{header}No call at all. <tool [TOOL") and accepts(call("get_weather", city="Rom", days=1))
    assert accepts(call("time-now", x=1)), "not strict, so any object will do"
    assert not accepts(call("get_weather", town="Rom"))
    assert not accepts(call("unknown")) or family == "glm4", "without marks, an unknown function's name is text"
    if family not in ("llama3_json", "json", "glm4", "harmony"):
        assert accepts("Words " + call("get_weather", city="Rom", days=1))


@pytest.mark.parametrize("family", ["qwen3_coder", "glm45"])
def test_tags_may_be_special_tokens(family: str) -> None:
    format = FORMATS[family]
    tags = ["<tool_call>", "</tool_call>", "</parameter>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"]
    tokens = [*byte_vocabulary(), *tags]
    types = [3 if is_special(index) or token in tags else 1 for index, token in enumerate(tokens)]
    tokenizer = make_byte_level(tokens=tokens, token_type=types)
    vocabulary = Vocabulary(tokenizer, tokenizer.vocab_size, tokenizer.eos_ids)
    grammar = compile_grammar(lark(format.forced_grammar([WEATHER], tokenizer, is_parallel=False)), vocabulary)

    def accepts(**arguments: Any) -> bool:
        ids = tokenizer.encode(format.write([{"name": "get_weather", "arguments": arguments}]))
        assert {*ids} & tokenizer.special_ids and format.shows_special_tokens(tokenizer)
        matcher = grammar.matcher()
        return all(map(matcher.accept, ids))

    assert accepts(city="Rom", days=2)
    assert not accepts(city="Rom", days=0) and not accepts(days=2) and not accepts(city="Constantinople", days=1)


@pytest.mark.parametrize("family", FORMATS)
@pytest.mark.parametrize("num_calls", [1, 3])
def test_what_a_format_writes_it_reads(family: str, num_calls: int) -> None:
    calls = [{"name": "get_weather", "arguments": {"city": "Köln", "days": n}} for n in range(num_calls)]
    text, found = read(family, [FORMATS[family].write(calls)])
    assert text == ""
    assert [{"name": name, "arguments": json.loads(arguments)} for name, arguments in found] == calls


def test_a_schema_that_cannot_be_enforced_is_refused_where_it_stands() -> None:
    tool = Tool("f", "", {"type": "object", "properties": {"a": {"not": {}}}}, param="tools.3.function.parameters")
    with pytest.raises(RequestError) as error:
        FORMATS["hermes"].forced_grammar([tool], TOKENIZERS["byte-level"], is_parallel=True)
    assert error.value.param == "tools.3.function.parameters.properties.a.not"


# ---- Choosing ----


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("{{ '<tool_call>' }}", "hermes"),
        ("{% if role == 'ipython' %}", "llama3_json"),
        ("[AVAILABLE_TOOLS]", "mistral"),
        ("[AVAILABLE_TOOLS] [TOOL_CALLS] [ARGS]", "mistral_args"),
        ("{{ '<|tool|>' ~ tool ~ '<|/tool|>' }}", "phi4_mini_json"),
        ("respond only with <|tool_call|> followed by a JSON list", "granite"),
        ("<function_calls>", "olmo3"),
        ("{{ '<|tool_call>call:' }}", "gemma4"),
        ("<|observation|>", "glm4"),
        ("<tool_call> <|observation|> <arg_key>", "glm45"),
        ("<tool_call> <function= <parameter=", "qwen3_coder"),
        ("<|start|>assistant<|channel|>analysis<|message|>", "harmony"),
        ("{{ messages }}", "json"),
        ("", "json"),
    ],
)
def test_the_template_names_the_format(source: str, name: str) -> None:
    assert find_tool_format(None, source) is FORMATS[name]


def test_a_name_goes_before_the_template() -> None:
    assert find_tool_format("mistral", "<tool_call>") is FORMATS["mistral"]
    with pytest.raises(TinyvllmError, match="hermes"):
        find_tool_format("hermse", "")


def test_ids_are_of_the_family() -> None:
    assert len(FORMATS["mistral"].make_id()) == 9 and FORMATS["mistral"].make_id().isalnum()
    assert FORMATS["hermes"].make_id().startswith("call_")
    assert len({FORMATS["hermes"].make_id() for _ in range(100)}) == 100


# ---- The generic format's messages ----

HISTORY: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Weather?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "1", "function": {"name": "get_weather", "arguments": {"city": "Rom"}}}],
    },
    {"role": "tool", "tool_call_id": "1", "content": "sunny"},
]


@pytest.mark.parametrize("format", FORMATS.values())
def test_every_format_describes_tools_by_an_example_of_its_own(format: ToolFormat) -> None:
    [system, _] = format.prepare(HISTORY[1:2], [WEATHER], has_template=False)
    assert format.write([{"name": "function name", "arguments": {"argument": "value"}}]) in system["content"]


def test_tools_are_described_to_a_template_that_knows_none() -> None:
    messages = FORMATS["json"].prepare(HISTORY, [WEATHER], has_template=False)
    assert messages[0]["content"].startswith("Be brief.\n\n") and "get_weather" in messages[0]["content"]
    assert messages[2]["content"] == '{"name": "get_weather", "arguments": {"city": "Rom"}}'
    assert "tool_calls" not in messages[2]
    assert messages[3] == {"role": "user", "content": "Result of the call get_weather: sunny"}
    alone = FORMATS["json"].prepare(HISTORY[1:2], [WEATHER], has_template=False)
    assert [message["role"] for message in alone] == ["system", "user"]


@pytest.mark.parametrize("format", FORMATS.values())
def test_every_format_writes_calls_whose_arguments_are_no_object(format: ToolFormat) -> None:
    for given, shown in (('{"city": "Rom"}', "Rom"), ("Rom{", "Rom{"), ("[1]", "[1]"), (None, "")):
        call = {"id": "1", "function": {"name": "get_weather", "arguments": given}}
        [message] = format.prepare([{"role": "assistant", "content": "", "tool_calls": [call]}], [], has_template=False)
        assert "get_weather" in message["content"] and shown in message["content"]


def test_a_template_that_knows_tools_gets_the_messages_as_they_are() -> None:
    for name, format in FORMATS.items():
        if name not in ("gemma4", "harmony"):
            assert format.prepare(HISTORY, [WEATHER], has_template=True) == HISTORY


def test_gemma4_gets_results_with_the_calls_that_they_answer() -> None:
    more = [{"role": "tool", "tool_call_id": "2", "content": '{"degrees": 21}'}, {"role": "user", "content": "And?"}]
    *_, last, user = FORMATS["gemma4"].prepare([*HISTORY, *more], [WEATHER], has_template=True)
    assert last["tool_responses"] == [
        {"name": "get_weather", "response": "sunny"},
        {"name": "unknown", "response": {"degrees": 21}},
    ]
    assert last["tool_calls"] == HISTORY[2]["tool_calls"] and user == more[1]


SCHEMA = {
    "type": "object",
    "$defs": {
        "tree": {"type": "object", "properties": {"left": {"$ref": "#/$defs/tree"}}, "additionalProperties": False}
    },
    "properties": {
        "unit": {"enum": ["C", "F", 3, None]},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 3}},
        "tree": {"$ref": "#/$defs/tree"},
        "size": {"anyOf": [{"type": "integer", "minimum": 2, "maximum": 40}, {"type": "boolean"}]},
        "note": {"type": ["string", "null"], "minLength": 1, "maxLength": 5},
    },
    "required": ["unit"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("family", ["gemma4", "olmo3", "qwen3_coder", "glm45"])
def test_notations_that_are_not_json_keep_to_schemas(family: str, seed: int) -> None:
    text = FORMATS[family].forced_grammar([Tool("f", "", SCHEMA)], TOKENIZERS["byte-level"], is_parallel=False)
    written = walk(compile_grammar(lark(text), VOCABULARIES["byte-level"]), "byte-level", seed)
    _, [(_, arguments)] = read(family, [written])
    jsonschema.validate(json.loads(arguments), SCHEMA)
