"""Grammars against random walks: whatever the mask allows makes an output that is as it was asked for."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import hypothesis
import jsonschema
import numpy as np
import pytest
from hypothesis import strategies as st

from tests.sweeps import examples
from tests.text.vocabularies import byte_level_metadata, make_byte_level, make_spm
from tinyvllm.config import GRAMMAR_TOO_COMPLEX, GrammarSpec
from tinyvllm.errors import RequestError
from tinyvllm.text.grammar import Grammar, GrammarLimits, Matcher, Vocabulary, compile_grammar
from tinyvllm.text.reasoning import FORMATS
from tinyvllm.text.tokenizer import Tokenizer

THINK = FORMATS["think"]
NUM_PADDED = 37  # rows of the logits that no token has
TOKENIZERS = {"byte-level": make_byte_level(), "sentencepiece": make_spm()}
VOCABULARIES = {
    name: Vocabulary(tokenizer, tokenizer.vocab_size + NUM_PADDED, tokenizer.eos_ids)
    for name, tokenizer in TOKENIZERS.items()
}


def compiled(kind: str, value: Any = "", vocabulary: str = "byte-level", **limits: Any) -> Grammar:
    text = value if isinstance(value, str) else json.dumps(value)
    return compile_grammar(GrammarSpec(kind, text), VOCABULARIES[vocabulary], GrammarLimits(**limits))


def allowed(matcher: Matcher, vocab_size: int) -> np.ndarray:
    """The ids that may come next."""
    mask = np.zeros(-(-vocab_size // 32), np.int32)
    matcher.fill_mask(mask)
    bits = np.unpackbits(mask.view(np.uint8), bitorder="little")
    assert matcher.error or not bits[vocab_size:].any(), "ids beyond the vocabulary are allowed"
    return np.flatnonzero(bits[:vocab_size])


def walk(
    grammar: Grammar, name: str = "byte-level", seed: int = 0, max_tokens: int = 3000, end_early: bool = True
) -> str:
    """Tokens at random, of those that the mask allows, until the grammar is finished; as text."""
    tokenizer, matcher, rng = TOKENIZERS[name], grammar.matcher(), random.Random(seed)
    vocab_size, ids = VOCABULARIES[name].vocab_size, []
    for _ in range(max_tokens):
        choices = allowed(matcher, vocab_size)
        ends = sorted(tokenizer.eos_ids & {*map(int, choices)})
        token_id = ends[0] if ends and end_early else steer(rng, choices, tokenizer)
        assert token_id not in tokenizer.special_ids - tokenizer.eos_ids
        assert matcher.accept(token_id), matcher.error
        if token_id in tokenizer.eos_ids:
            assert matcher.is_finished
            break
        ids.append(token_id)
        if matcher.is_finished:
            break
    assert matcher.is_finished and matcher.error is None
    return tokenizer.decode(ids, is_continuation=True)


def steer(rng: random.Random, choices: np.ndarray, tokenizer: Tokenizer) -> int:
    """One of `choices`: often one that closes something, so that a document ends."""
    closing = [int(c) for c in choices if tokenizer.token_bytes(int(c))[:1] in (b'"', b"]", b"}")]
    return rng.choice(closing) if closing and rng.random() < 0.5 else int(rng.choice(choices))


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 2, "maxLength": 9, "title": "Name"},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 1, "maxItems": 3},
        "next": {"anyOf": [{"$ref": "#/$defs/Leaf"}, {"type": "null"}]},
        "day": {"type": "string", "format": "date"},
    },
    "required": ["name", "age", "tags", "next", "day"],
    "additionalProperties": False,
    "$defs": {"Leaf": {"type": "object", "properties": {"x": {"type": "boolean"}}, "required": ["x"]}},
}


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("seed", range(5))
def test_documents_are_of_their_schema(name: str, seed: int) -> None:
    document = json.loads(walk(compiled("json_schema", SCHEMA, name), name, seed))
    jsonschema.validate(document, SCHEMA, format_checker=jsonschema.FormatChecker())


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("seed", range(5))
def test_json_object_is_an_object(name: str, seed: int) -> None:
    assert isinstance(json.loads(walk(compiled("json_object", vocabulary=name), name, seed)), dict)


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("seed", range(5))
def test_an_expression_matches_the_whole_output(name: str, seed: int) -> None:
    pattern = r"(ab|c)[0-9]{2,4}( é| 日本)*x?"
    assert re.fullmatch(pattern, walk(compiled("regex", pattern, name), name, seed, end_early=False))


@pytest.mark.parametrize("name", TOKENIZERS)
def test_every_choice_can_be_made_and_no_other(name: str) -> None:
    choices = ["yes", "no", 'né "\n\\', "no way", "/[a]+/", "日本"]
    made = {walk(compiled("choice", choices, name), name, seed, end_early=seed % 2 == 0) for seed in range(60)}
    assert made == set(choices)


@pytest.mark.parametrize(
    "text",
    ['root ::= ("a" | "b")+ "!"', 'start: ("a" | "b")+ "!"', "start: AB+ /!/\nAB: /[ab]/"],
    ids=["gbnf", "lark", "lark with a terminal"],
)
def test_grammars_of_both_notations(text: str) -> None:
    for seed in range(5):
        assert re.fullmatch("[ab]+!", walk(compiled("grammar", text), seed=seed))


def test_the_end_is_allowed_only_where_the_output_is_complete() -> None:
    tokenizer, vocabulary = TOKENIZERS["byte-level"], VOCABULARIES["byte-level"]
    matcher = compiled("regex", "ab(cd)?").matcher()
    complete = []
    for character in "abcd":
        complete.append(bool(tokenizer.eos_ids & {*map(int, allowed(matcher, vocabulary.vocab_size))}))
        assert not matcher.is_finished and matcher.accept(tokenizer.encode(character, add_special_tokens=False)[0])
    assert complete == [False, False, True, False]
    assert matcher.is_finished, "nothing can follow, so no step is needed to sample the end"
    assert tokenizer.eos_ids <= {*map(int, allowed(matcher, vocabulary.vocab_size))}


def test_a_token_that_is_not_allowed_is_refused_with_a_reason() -> None:
    matcher = compiled("regex", "ab").matcher()
    assert not matcher.accept(TOKENIZERS["byte-level"].encode("b", add_special_tokens=False)[0])
    assert matcher.error is not None and "grammar" in matcher.error and not matcher.is_finished
    mask = np.zeros(-(-VOCABULARIES["byte-level"].vocab_size // 32), np.int32)
    matcher.fill_mask(mask)  # does not raise
    assert not matcher.accept(1)


def test_matchers_of_one_grammar_know_nothing_of_each_other() -> None:
    grammar, tokenizer = compiled("regex", "abc"), TOKENIZERS["byte-level"]
    first, second = grammar.matcher(), grammar.matcher()
    assert first.accept(tokenizer.encode("a", add_special_tokens=False)[0])
    assert not first.accept(tokenizer.encode("a", add_special_tokens=False)[0])
    assert second.accept(tokenizer.encode("a", add_special_tokens=False)[0]) and second.error is None


def test_blanks_come_to_an_end() -> None:
    """A model that wants nothing but blanks has to continue."""
    tokenizer, vocabulary = TOKENIZERS["byte-level"], VOCABULARIES["byte-level"]
    matcher = compiled("json_object").matcher()
    assert matcher.accept(tokenizer.encode("{", add_special_tokens=False)[0])
    num_blanks = 0
    while num_blanks < 40:
        blanks = [c for c in allowed(matcher, vocabulary.vocab_size) if tokenizer.token_bytes(int(c)).isspace()]
        if not blanks:
            break
        assert matcher.accept(int(blanks[0]))
        num_blanks += 1
    assert 0 < num_blanks <= 34


# ---- Schemas at random ----

SCALARS = st.one_of(
    st.fixed_dictionaries({"type": st.just("integer")}, optional={"minimum": st.integers(-9, 9)}),
    st.fixed_dictionaries(
        {"type": st.just("string")}, optional={"maxLength": st.integers(0, 5), "description": st.text(max_size=3)}
    ),
    st.fixed_dictionaries({"enum": st.lists(st.sampled_from([1, "x", None, True]), min_size=1, max_size=3)}),
    st.just({"type": ["boolean", "null"]}),
    st.fixed_dictionaries({"type": st.just("string"), "format": st.sampled_from(["date", "ipv4", "uuid"])}),
)


def deeper(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    properties = st.dictionaries(st.sampled_from(["a", "b", "ç d", '"']), inner, min_size=1, max_size=3)
    return st.one_of(
        st.builds(lambda items, count: {"type": "array", "items": items, "maxItems": count}, inner, st.integers(0, 3)),
        st.builds(lambda options: {"anyOf": options}, st.lists(inner, min_size=1, max_size=3)),
        st.builds(
            lambda values: {
                "type": "object", "properties": values, "required": sorted(values), "additionalProperties": False
            },
            properties,
        ),
    )  # fmt: skip


@examples(20, 60)
@hypothesis.given(st.recursive(SCALARS, deeper, max_leaves=8), st.integers(0, 3))
def test_what_random_schemas_allow_is_valid(schema: dict[str, Any], seed: int) -> None:
    document = json.loads(walk(compiled("json_schema", schema), seed=seed))
    jsonschema.validate(document, schema, format_checker=jsonschema.FormatChecker())


# ---- Refusals ----


@pytest.mark.parametrize(
    ("schema", "path", "word"),
    [
        ({"properties": {"a": {"not": {}}}}, ".properties.a.not", "enforced"),
        ({"type": "object", "propertyNames": {"pattern": "a"}}, ".propertyNames", "enforced"),
        ({"$defs": {"D": {"if": {}, "then": {}}}, "$ref": "#/$defs/D"}, ".$defs.D.if", "enforced"),
        ({"items": {"type": "strnig"}}, ".items.type", "string"),
        ({"type": "string", "format": "postcode"}, ".format", "date-time"),
        ({"type": "array", "uniqueItems": True}, ".uniqueItems", "enforced"),
        ({"type": "string", "nullable": True}, ".nullable", "enforced"),
        ({"typo": 1}, ".typo", "enforced"),
        ({"x-guidance": {"lenient": True}}, ".x-guidance", "enforced"),
        ({"properties": {"a": {"items": {"pattern": "(?=b)"}}}}, ".properties.a.items", "look-ahead"),
        ({"properties": {"a": {}, "b": {"$ref": "#/$defs/X"}}}, ".properties.b", "does not exist"),
        ({"$defs": {"D": {"pattern": "["}}, "properties": {"a": {"$ref": "#/$defs/D"}}}, ".properties.a", "unclosed"),
        ({"enum": []}, "", "empty"),
        ([], "", "list"),
        (False, "", "false"),
        ({"properties": 3}, "", "object"),
    ],
)  # fmt: skip
def test_what_cannot_be_enforced_is_refused_by_name(schema: Any, path: str, word: str) -> None:
    with pytest.raises(RequestError) as error:
        compiled("json_schema", schema)
    assert error.value.param == "structured_outputs" + path
    assert word in str(error.value)


@pytest.mark.parametrize(
    ("schema", "is_closed"),
    [
        ({"type": "object", "properties": {"a": {}}}, True),
        ({"type": "object", "properties": {"a": {}}, "additionalProperties": {}}, False),
        ({"type": "object"}, False),
        ({"type": "object", "properties": {"a": {}}, "required": ["b"]}, False),
        ({"type": "object", "properties": {"b": {}}, "required": ["b"], "minProperties": 2}, False),
        ({"allOf": [{"type": "object", "properties": {"a": {}}}, {"properties": {"b": {}}}]}, False),
        ({"$defs": {"D": {"properties": {"b": {}}}}, "$ref": "#/$defs/D", "properties": {"a": {}}}, False),
    ],
)
def test_objects_get_the_properties_that_are_listed(schema: Any, is_closed: bool) -> None:
    """And others only if the schema asks for them or has to allow them."""
    tokenizer, matcher = TOKENIZERS["byte-level"], compiled("json_schema", schema).matcher()
    ids = tokenizer.encode('{"b": 1', add_special_tokens=False)
    assert all(matcher.accept(token_id) for token_id in ids) != is_closed


def test_an_alternative_that_nothing_matches_leaves_the_others() -> None:
    nothing = {"minItems": 3, "maxItems": 1, "type": "array"}
    assert json.loads(walk(compiled("json_schema", {"anyOf": [{"type": "null"}, nothing]}))) is None


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "maxLength": 1, "x-order": 1, "nullable": False, "uniqueItems": False, "deprecated": True},
        {"type": "array", "maxItems": 0, "uniqueItems": False, "discriminator": {"propertyName": "a"}},
    ],
)
def test_annotations_are_accepted(schema: Any) -> None:
    jsonschema.validate(json.loads(walk(compiled("json_schema", schema))), schema)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("json_schema", "{"),
        ("json_schema", "[" * 100_000),
        ("regex", ""),
        ("regex", "["),
        ("regex", "(?=a)b"),
        ("regex", r"(a)\1"),
        ("choice", "[]"),
        ("choice", '["a", ""]'),
        ("choice", '"a"'),
        ("choice", json.dumps([str(n) for n in range(1001)])),
        ("grammar", " "),
        ("grammar", "root ::= foo"),
        ("grammar", 'root ::= "a'),
        ("grammar", "start: foo"),
        ("grammar", "nonsense"),
        ("grammar", "root ::= " + "(" * 5000),
        ("lark", "start[temperature=0.5]: /a/"),
    ],
)
def test_what_does_not_parse_is_refused(kind: str, text: str) -> None:
    with pytest.raises(RequestError) as error:
        compiled(kind, text)
    assert error.value.param == "structured_outputs" and len(str(error.value)) < 700


def test_a_schema_that_is_nested_too_deeply_is_refused() -> None:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(70):
        schema = {"type": "object", "properties": {"a": schema}}
    with pytest.raises(RequestError, match="nested more than 64"):
        compiled("json_schema", schema)


def test_a_grammar_that_is_too_large_is_refused_before_it_is_read() -> None:
    with pytest.raises(RequestError, match="has 300 characters, but the limit is 100"):
        compiled("regex", "a" * 300, max_chars=100)


def test_a_grammar_that_explodes_at_its_first_token_is_called_too_complex() -> None:
    matcher = compiled("regex", "(a?){5000}a{5000}").matcher()
    assert not matcher.accept(TOKENIZERS["byte-level"].encode("a", add_special_tokens=False)[0])
    assert matcher.error is not None and matcher.error.startswith(GRAMMAR_TOO_COMPLEX)


@pytest.mark.parametrize("pattern", ["((.{1,9}a){1,90}){1,90}", "(.*){1,1000}x(.*){500}"])
def test_an_expression_that_explodes_hits_a_limit_and_says_so(pattern: str) -> None:
    """Here at the twentieth part of the usual limits. Before the first token it is a refusal, afterwards an error."""
    try:
        matcher = compiled(
            "regex", pattern, lexer_fuel=50_000, step_fuel=1000, step_items=1000, lexer_states=500
        ).matcher()
    except RequestError as error:
        assert error.param == "structured_outputs"
        return
    rng = random.Random(0)
    for _ in range(300):
        choices = allowed(matcher, VOCABULARIES["byte-level"].vocab_size)
        if not matcher.accept(int(rng.choice(choices))):
            break
    assert not matcher.accept(0)
    assert matcher.error is not None and matcher.error.startswith(GRAMMAR_TOO_COMPLEX)


@pytest.mark.parametrize(
    ("kind", "value", "reason"),
    [
        ("json_schema", {"$ref": "#"}, "no output matches it"),
        ("json_schema", {"anyOf": [{"$ref": "#"}]}, "no output matches it"),
        ("json_schema", {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}, "no output matches it"),
        ("lark", "start: start", "no output matches it"),
        ("regex", "a{1000000}", "1000000 characters with its repetitions written out"),
        ("regex", "(((a{100}){100}){100}){100}", "100000000 characters"),
        ("regex", r"([\]a]{2,100}|\{\d{3}){1000}", "104000 characters"),
        ("lark", "start: /x{60000}/", "60000 characters"),
        ("json_schema", {"type": "string", "pattern": "a{1000000}"}, "pattern has 1000000 characters"),
        ("json_schema", {"type": "object", "patternProperties": {"a{1000000}": {}}}, "has 1000000 characters"),
        ("regex", "\ud800", "lone surrogate"),
    ],
)
def test_what_no_step_could_follow_is_refused_when_it_is_compiled(kind: str, value: Any, reason: str) -> None:
    with pytest.raises(RequestError, match=reason):
        compiled(kind, value)


def test_a_long_forced_text_is_encoded_a_piece_at_a_time() -> None:
    lengths: list[int] = []

    class Counting:
        def __getattr__(self, name: str) -> Any:
            return getattr(TOKENIZERS["byte-level"], name)

        def encode(self, text: str, **settings: Any) -> list[int]:
            lengths.append(len(text))
            return TOKENIZERS["byte-level"].encode(text, **settings)

    tokenizer: Any = Counting()
    vocabulary = Vocabulary(tokenizer, tokenizer.vocab_size, tokenizer.eos_ids)
    matcher = compile_grammar(GrammarSpec("regex", "a{20000}"), vocabulary).matcher()
    for _ in range(5):
        assert matcher.accept(int(allowed(matcher, vocabulary.vocab_size)[0])), matcher.error
    assert 1000 < max(lengths) < 2000


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(RequestError, match="json_schema"):
        GrammarSpec("xml", "")


def test_a_token_that_is_too_long_for_the_library_is_never_allowed() -> None:
    tokens = [*byte_level_metadata()["tokenizer.ggml.tokens"], "a" * 1024, "a" * 1025]
    tokenizer = make_byte_level(tokens=tokens, token_type=[1] * len(tokens))
    vocabulary = Vocabulary(tokenizer, tokenizer.vocab_size, tokenizer.eos_ids)
    matcher = compile_grammar(GrammarSpec("regex", "a+"), vocabulary).matcher()
    assert {260} == {*allowed(matcher, vocabulary.vocab_size)} & {260, 261}


def test_a_model_without_an_end_cannot_be_constrained() -> None:
    with pytest.raises(RequestError, match="no EOS token"):
        Vocabulary(TOKENIZERS["byte-level"], 300, frozenset())


# ---- After reasoning ----


@pytest.mark.parametrize("kind", ["json_schema", "regex", "choice", "grammar"])
@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("prompt", ["", "<think>\n", "<think></think>"])
def test_an_answer_after_reasoning_is_bound_and_the_reasoning_is_not(kind: str, name: str, prompt: str) -> None:
    text = {"json_schema": '{"enum": [7]}', "regex": "7", "choice": '["7"]', "grammar": 'root ::= "7"'}[kind]
    prefix = THINK.prefix(prompt, TOKENIZERS[name])
    grammar = compile_grammar(GrammarSpec(kind, text, prefix), VOCABULARIES[name])

    def accepts(message: str) -> bool:
        matcher, tokenizer = grammar.matcher(), TOKENIZERS[name]
        marked = tokenizer.encode("\n" + message, add_special_tokens=False)
        ids = marked[len(tokenizer.encode("\n", add_special_tokens=False)) :]
        return all(matcher.accept(token_id) for token_id in ids) and matcher.is_finished

    begin = "" if prompt == "<think>\n" else "<think>"
    assert accepts(f"{begin}8 or 9?\n</think>\n\n7") == (prompt != "<think></think>")
    assert not accepts(f"{begin}hm</think>8")
    assert accepts("7") == (prompt != "<think>\n")
