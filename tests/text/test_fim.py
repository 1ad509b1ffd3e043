"""Prompts for the text between a prefix and a suffix, by what a model's vocabulary has for them."""

from __future__ import annotations

from typing import Any

import pytest

from tests.builders import byte_vocabulary
from tests.text.vocabularies import byte_level_metadata, make_byte_level, read_reference, spm_metadata
from tinyvllm.errors import RequestError
from tinyvllm.text.fim import KNOWN_MARKS, Marks
from tinyvllm.text.gguf_tokenizer import read_gguf_tokenizer
from tinyvllm.text.tokenizer import Tokenizer

NUM_BYTES = len(byte_vocabulary())


def with_tokens(*texts: str, **tweaks: Any) -> Tokenizer:
    """The byte tokenizer with further special tokens, whose ids are NUM_BYTES, NUM_BYTES + 1, ..."""
    tokens = [*byte_vocabulary(), *texts]
    types = [*byte_level_metadata()["tokenizer.ggml.token_type"], *[3] * len(texts)]
    return Tokenizer(read_gguf_tokenizer(byte_level_metadata(tokens=tokens, token_type=types, **tweaks)))


@pytest.mark.parametrize("marks", KNOWN_MARKS, ids=lambda marks: marks.prefix)
def test_parts_are_arranged_as_the_models_marks_say(marks: Marks) -> None:
    texts = [marks.prefix, marks.suffix, *([marks.middle] if marks.middle else []), "<|fim_pad|>"]
    tokenizer = with_tokens(*texts)
    prefix, suffix = NUM_BYTES, NUM_BYTES + 1
    parts = [[prefix, *b"ab"], [suffix, *b"cd"]]
    expected = [*parts[marks.is_suffix_first], *parts[not marks.is_suffix_first]]
    expected += [NUM_BYTES + 2] * (marks.middle is not None)
    assert tokenizer.encode_middle("ab", "cd") == expected
    assert tokenizer.encode_middle([97, 98], "cd") == expected
    assert tokenizer.fim is not None and tokenizer.fim.end_ids == set(range(NUM_BYTES, NUM_BYTES + len(texts)))


def test_marks_in_the_two_texts_are_text() -> None:
    tokenizer = with_tokens("<fim_prefix>", "<fim_suffix>", "<fim_middle>")
    ids = tokenizer.encode_middle("a<fim_suffix>", "<fim_middle>b")
    assert [token_id for token_id in ids if token_id >= NUM_BYTES] == [NUM_BYTES, NUM_BYTES + 1, NUM_BYTES + 2]


def test_bos_comes_first_and_eos_does_not_come_last() -> None:
    tokenizer = with_tokens(
        "<fim_prefix>", "<fim_suffix>", "<fim_middle>", bos_token_id=3, add_bos_token=True, add_eos_token=True
    )
    ids = tokenizer.encode_middle("a", "b")
    assert ids == [3, NUM_BYTES, *b"a", NUM_BYTES + 1, *b"b", NUM_BYTES + 2]
    assert tokenizer.encode_middle("a", "b", add_special_tokens=False) == ids[1:]


@pytest.mark.parametrize("keys", [("fim_pre", "fim_suf", "fim_mid"), ("prefix", "suffix", "middle")])
def test_a_gguf_file_may_name_the_ids(keys: tuple[str, str, str]) -> None:
    named = {f"{key}_token_id": NUM_BYTES + number for number, key in enumerate(keys)}
    unknown = with_tokens("<P>", "<S>", "<M>", "<R>", fim_rep_token_id=NUM_BYTES + 3, **named)
    assert unknown.encode_middle("a", "b") == [NUM_BYTES, *b"a", NUM_BYTES + 1, *b"b", NUM_BYTES + 2]
    assert unknown.fim is not None and NUM_BYTES + 3 in unknown.fim.end_ids
    suffix_first = with_tokens("<[fim-prefix]>", "<[fim-suffix]>", "<[fim-middle]>", **named)
    assert suffix_first.encode_middle("a", "b") == [NUM_BYTES + 1, *b"b", NUM_BYTES, *b"a", NUM_BYTES + 2]
    assert with_tokens("<P>", fim_pre_token_id=NUM_BYTES + 99).fim is None


def test_a_suffix_gets_no_leading_space() -> None:
    metadata = read_reference()["spm_metadata"]
    tokens, types, scores = (list(metadata[f"tokenizer.ggml.{key}"]) for key in ("tokens", "token_type", "scores"))
    first = len(tokens)
    tokens += ["▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>"]
    spm = spm_metadata(tokens=tokens, token_type=types + [3] * 4, scores=scores + [0.0] * 4)
    tokenizer = Tokenizer(read_gguf_tokenizer(spm))
    for suffix in ("ab c", " ab", "", "\n\nx", "☺☺", "日本"):
        ids = tokenizer.encode_middle("ab", suffix)
        start = ids.index(first + 1)
        assert ids[0] == tokenizer.bos_id and ids[1] == first and ids[-1] == first + 2
        assert tokenizer.decode(ids[2:start]) == "ab"
        assert tokenizer.decode(ids[start + 1 : -1], is_continuation=True) == suffix
    assert tokenizer.fim is not None and first + 3 in tokenizer.fim.end_ids


def test_a_model_without_such_tokens_is_refused_by_the_fields_name() -> None:
    for tokenizer in (make_byte_level(), with_tokens("<fim_prefix>", "<fim_suffix>")):
        with pytest.raises(RequestError, match="no tokens for filling in the middle") as caught:
            tokenizer.encode_middle("a", "b")
        assert caught.value.param == "suffix"
    with pytest.raises(RequestError, match="suffix has the lone surrogate"):
        with_tokens("<fim_prefix>", "<fim_suffix>", "<fim_middle>").encode_middle("a", "\ud800")


def test_a_prompt_that_is_cut_keeps_its_special_tokens() -> None:
    tokenizer = with_tokens("<eos>", bos_token_id=3, eos_token_id=NUM_BYTES, add_bos_token=True, add_eos_token=True)
    ids = tokenizer.encode("abcdef")
    assert ids == [3, *b"abcdef", NUM_BYTES]
    assert tokenizer.cut(ids, 8, keeps_end=True, has_special_tokens=True) == ids
    assert tokenizer.cut(ids, 4, keeps_end=True, has_special_tokens=True) == [3, *b"ef", NUM_BYTES]
    assert tokenizer.cut(ids, 4, keeps_end=False, has_special_tokens=True) == [3, *b"ab", NUM_BYTES]
    assert tokenizer.cut([*b"abc"], 2, keeps_end=True) == [*b"bc"]
    assert tokenizer.cut([*b"abc"], 2, keeps_end=False) == [*b"ab"]
    assert tokenizer.cut(ids, 1, keeps_end=True, has_special_tokens=True) == [3]
