from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.text.vocabularies import (
    byte_level_metadata,
    make_byte_level,
    make_spm,
    prefix_keys,
    read_reference,
    spm_metadata,
)
from tinyvllm.config import ModelFiles
from tinyvllm.errors import ModelError, UnsupportedModelError
from tinyvllm.storage.gguf_file import GGUFFile
from tinyvllm.text import gguf_tokenizer
from tinyvllm.text.gguf_tokenizer import read_gguf_tokenizer
from tinyvllm.text.pre_tokenizers import PRE_TOKENIZERS
from tinyvllm.text.tokenizer import Tokenizer, load_tokenizer

# --- The default model, against llama.cpp -----------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2(smollm2_files: ModelFiles) -> Tokenizer:
    return load_tokenizer(smollm2_files)


@pytest.mark.model
@pytest.mark.parametrize("case", read_reference()["cases"], ids=lambda case: repr(case[0]))
def test_default_model_encodes_as_llama_cpp(smollm2: Tokenizer, case: list[Any]) -> None:
    text, ids, plain_ids = case
    assert smollm2.encode(text) == ids  # the model's files ask for no BOS
    assert smollm2.encode(text, parse_special=False) == plain_ids


@pytest.mark.model
@pytest.mark.parametrize("case", read_reference()["cases"], ids=lambda case: repr(case[0]))
def test_default_model_decodes_what_it_encodes(smollm2: Tokenizer, case: list[Any]) -> None:
    text, ids, plain_ids = case
    assert smollm2.decode(ids, skip_special_tokens=False) == text
    assert smollm2.decode(plain_ids) == text


@pytest.mark.model
@pytest.mark.parametrize("case", read_reference()["pre_cases"], ids=lambda case: case[0])
def test_every_pre_tokenizer_cuts_as_llama_cpp(smollm2_files: ModelFiles, case: list[Any]) -> None:
    pre, expected = case
    metadata = GGUFFile(smollm2_files.path).metadata | {"tokenizer.ggml.pre": pre}
    tokenizer = Tokenizer(read_gguf_tokenizer(metadata))
    for (text, *_), ids in zip(read_reference()["cases"], expected, strict=True):
        assert tokenizer.encode(text, add_special_tokens=False) == ids, repr(text)


@pytest.mark.model
def test_default_model_ends_at_both_of_its_ends(smollm2: Tokenizer) -> None:
    assert smollm2.eos_id == 2
    assert {smollm2.token_text(token_id) for token_id in smollm2.eos_ids} == {"<|endoftext|>", "<|im_end|>"}


@pytest.mark.model
def test_default_model_drops_bytes_that_its_vocabulary_lacks(smollm2: Tokenizer) -> None:
    """A known trap: SmolLM2 has no token for some control characters, and its own tokenizer is silent about it too."""
    assert smollm2.decode(smollm2.encode("a\x04b\x1dc")) == "abc"


# --- Byte-level BPE ---------------------------------------------------------------------------------------


def test_unknown_pre_tokenizer_lists_the_known() -> None:
    with pytest.raises(UnsupportedModelError, match=r"tokenizer.ggml.pre is 'novel'.*llama-bpe.*smollm"):
        make_byte_level(pre="novel")


def test_missing_pre_tokenizer_means_default() -> None:
    metadata = byte_level_metadata()
    del metadata["tokenizer.ggml.pre"]
    tokens = read_gguf_tokenizer(metadata).backend.encode("a.b 1234", add_special_tokens=False).tokens
    assert "".join(tokens) == "a.bĠ1234"


@pytest.mark.parametrize("name", sorted(PRE_TOKENIZERS))
def test_every_pre_tokenizer_keeps_every_character(name: str) -> None:
    tokenizer = make_byte_level(pre=name)
    text = "I'll say 12345, «naïve»\r\n\t日本 x\u0301  !!  \n"
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_digits_are_cut_one_by_one_for_smollm_and_by_three_for_llama3() -> None:
    def words(name: str) -> list[str]:
        return [word for word, _ in PRE_TOKENIZERS[name].build().pre_tokenize_str("in 12345")]

    assert words("smollm") == ["in", "Ġ", "1", "2", "3", "4", "5"]
    assert words("llama-bpe") == ["in", "Ġ", "123", "45"]
    assert words("gpt-2") == ["in", "Ġ12345"]
    assert words("qwen2") == ["in", "Ġ", "1", "2", "3", "4", "5"]


def test_whole_words_go_before_merges_where_the_pre_tokenizer_says_so() -> None:
    tokens = [*byte_level_metadata()["tokenizer.ggml.tokens"], "abc"]
    tweaks: dict[str, Any] = {"tokens": tokens, "token_type": [1] * len(tokens), "add_bos_token": False}
    assert make_byte_level(pre="llama-bpe", **tweaks).encode("abc") == [tokens.index("abc")]
    assert make_byte_level(pre="gpt-2", **tweaks).encode("abc") == list(b"abc")


def test_bos_follows_the_pre_tokenizer_unless_stated() -> None:
    bos_id = make_byte_level().bos_id
    assert make_byte_level().encode("a") == [ord("a")]
    assert make_byte_level(pre="llama-bpe").encode("a") == [bos_id, ord("a")]
    assert make_byte_level(pre="llama-bpe", add_bos_token=False).encode("a") == [ord("a")]
    assert make_byte_level(add_bos_token=True).encode("a", add_special_tokens=False) == [ord("a")]


def test_eos_is_added_where_stated() -> None:
    tokenizer = make_byte_level(add_eos_token=True)
    assert tokenizer.encode("a") == [ord("a"), tokenizer.eos_id]


def test_user_defined_tokens_are_matched_but_are_not_special() -> None:
    tokens = [*byte_level_metadata()["tokenizer.ggml.tokens"], "<tool call>"]
    types = [*byte_level_metadata()["tokenizer.ggml.token_type"], 4]
    tokenizer = make_byte_level(tokens=tokens, token_type=types)
    token_id = tokens.index("<tool call>")
    for parse_special in (True, False):
        assert tokenizer.encode("a<tool call>", parse_special=parse_special) == [ord("a"), token_id]
    assert token_id not in tokenizer.special_ids
    assert tokenizer.decode([token_id]) == "<tool call>"


def test_special_tokens_of_phi3_take_the_blanks_after_them() -> None:
    metadata = byte_level_metadata()
    tokens, types = [*metadata["tokenizer.ggml.tokens"], "<|user|>"], [*metadata["tokenizer.ggml.token_type"], 3]
    changed = metadata | {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    for name, blanks in (("Phi 3", [10]), ("Phi-3 mini", [])):
        tokenizer = Tokenizer(read_gguf_tokenizer(changed | {"general.name": name}))
        assert tokenizer.encode("<|user|>\na") == [260, *blanks, ord("a")]


# --- Ends -------------------------------------------------------------------------------------------------


def with_tokens(*texts: str, token_type: int = 3, **tweaks: Any) -> Tokenizer:
    """The byte tokenizer with further tokens, ids from 260."""
    metadata = byte_level_metadata()
    tokens = [*metadata["tokenizer.ggml.tokens"], *texts]
    types = [*metadata["tokenizer.ggml.token_type"], *[token_type] * len(texts)]
    return make_byte_level(tokens=tokens, token_type=types, **tweaks)


def test_ends_are_those_stated_and_the_well_known() -> None:
    assert with_tokens("<|eot_id|>", "<|eom_id|>", "<|start|>").eos_ids == {256, 258, 260, 261}
    assert with_tokens("[turn]", "[more]", eot_token_id=260, eom_token_id=261).eos_ids == {256, 258, 260, 261}


def test_well_known_end_of_type_normal_is_special_all_the_same() -> None:
    """Converters have typed <|im_end|> as ordinary: prompts spelled it out, and answers never ended."""
    tokenizer = with_tokens("<|eot_id|>", token_type=1)
    assert tokenizer.eos_ids == {256, 258, 260}
    assert tokenizer.encode("a<|eot_id|>") == [ord("a"), 260]
    assert 260 not in tokenizer.encode("a<|eot_id|>", parse_special=False)


def test_markup_that_looks_like_an_end_is_none() -> None:
    for text in ("</s>", "<eos>"):
        assert with_tokens(text, token_type=1).eos_ids == {256, 258}
        assert with_tokens(text, token_type=3).eos_ids == {256, 258, 260}


def test_gemma4_ends_at_its_turns_and_at_the_results_of_its_calls_but_not_at_markup() -> None:
    tokenizer = with_tokens("<turn|>", "<|tool_response>", "</s>")
    assert tokenizer.eos_ids == {256, 258, 260, 261}


def test_user_defined_end_becomes_special() -> None:
    tokenizer = with_tokens("<end_of_turn>", token_type=4)
    assert 260 in tokenizer.eos_ids
    assert 260 in tokenizer.special_ids


def test_end_of_a_message_is_no_end_of_a_turn_in_harmony_format() -> None:
    assert with_tokens("<|end|>").eos_ids == {256, 258, 260}
    assert with_tokens("<|end|>", "<|return|>", "<|call|>").eos_ids == {256, 258, 261, 262}


def test_id_outside_the_vocabulary_counts_as_not_stated() -> None:
    tokenizer = make_byte_level(eos_token_id=9999, bos_token_id=9999)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (None, None)
    assert tokenizer.eos_ids == {256, 258}


# --- SentencePiece ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", read_reference()["spm_cases"], ids=lambda case: repr(case[0]))
def test_score_merges_equal_llama_cpp(case: list[Any]) -> None:
    text, ids, plain_ids = case
    tokenizer = make_spm()
    assert tokenizer.encode(text) == ids
    assert tokenizer.encode(text, parse_special=False) == plain_ids


def merge_by_score(text: str, metadata: dict[str, Any]) -> list[int]:
    """SentencePiece's BPE as plainly as it can be said: merge the best pair of neighbors, the leftmost of equals."""
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    scores: list[float] = metadata["tokenizer.ggml.scores"]
    ids = {token: token_id for token_id, token in enumerate(tokens)}
    symbols = list("▁" + text.replace(" ", "▁")) if text else []
    while True:
        joint = [left + right for left, right in itertools.pairwise(symbols)]
        found = [(-scores[ids[piece]], index) for index, piece in enumerate(joint) if piece in ids]
        if not found:
            break
        _, index = min(found)
        symbols[index : index + 2] = [joint[index]]
    return [
        token_id
        for symbol in symbols
        for token_id in ([ids[symbol]] if symbol in ids else [ids[f"<0x{byte:02X}>"] for byte in symbol.encode()])
    ]


@given(st.text(alphabet=" abehlnot'.,1▁é日\n", max_size=40))
def test_score_merges_equal_the_plain_reference(text: str) -> None:
    assert SPM.encode(text, add_special_tokens=False, parse_special=False) == merge_by_score(text, spm_metadata())


@given(
    st.lists(st.sampled_from(["the", "thing", " ", "  ", "hello", "aaa", "ab", "ba", "n't", "78", "!"]), max_size=12)
)
def test_score_merges_of_words_equal_the_plain_reference(parts: list[str]) -> None:
    text = "".join(parts)
    assert SPM.encode(text, add_special_tokens=False, parse_special=False) == merge_by_score(text, spm_metadata())


SPM = make_spm()


def test_space_goes_before_every_stretch_of_text_unless_stated() -> None:
    mark = SPM.encode("a", add_special_tokens=False)
    assert SPM.encode("a</s>a") == [1, *mark, 2, *mark]
    without = make_spm(add_space_prefix=False)
    assert without.token_text(without.encode("a", add_special_tokens=False)[0]) == "a"


def test_spm_defaults_are_those_of_llama() -> None:
    assert (SPM.bos_id, SPM.eos_id, set(SPM.eos_ids)) == (1, 2, {2})
    assert SPM.special_ids == {0, 1, 2}
    assert SPM.encode("") == [1]
    assert SPM.encode("", add_special_tokens=False) == []


def test_text_cannot_spell_a_control_token() -> None:
    """Even where pieces could merge into one: here `</` and `s>` would, by score."""
    metadata = spm_metadata()
    tokens = [*metadata["tokenizer.ggml.tokens"], "<", "/", ">", "</", "s>"]
    tokenizer = make_spm(
        tokens=tokens,
        scores=[*metadata["tokenizer.ggml.scores"], *[-1.0] * 5],
        token_type=[*metadata["tokenizer.ggml.token_type"], *[1] * 5],
    )
    ids = tokenizer.encode("</s>", add_special_tokens=False, parse_special=False)
    assert tokenizer.eos_id not in ids
    assert tokenizer.decode(ids) == "</s>"


# --- Broken files -----------------------------------------------------------------------------------------


def test_unknown_model_lists_the_known() -> None:
    with pytest.raises(UnsupportedModelError, match=r"'t5'.*gpt2.*llama"):
        make_byte_level(model="t5")


@pytest.mark.parametrize("key", ["model", "tokens", "merges"])
def test_missing_key_is_named(key: str) -> None:
    metadata = byte_level_metadata()
    del metadata[f"tokenizer.ggml.{key}"]
    with pytest.raises(ModelError, match=f"tokenizer.ggml.{key}"):
        read_gguf_tokenizer(metadata)


def test_missing_scores_are_named() -> None:
    metadata = spm_metadata()
    del metadata["tokenizer.ggml.scores"]
    with pytest.raises(ModelError, match=r"tokenizer\.ggml\.scores"):
        read_gguf_tokenizer(metadata)


@pytest.mark.parametrize(
    ("tweaks", "message"),
    [
        ({"token_type": [1, 1]}, r"token_type has 2 entries, but tokenizer.ggml.tokens has 260"),
        ({"merges": ["a b"]}, r"merges\[0\] is 'a b'"),
        ({"merges": ["ab"]}, r"merges\[0\] is 'ab'"),
        ({"tokens": ["a", "b", "a"], "token_type": [1, 1, 1]}, r"contains 'a' more than once"),
        ({"bos_token_id": 9999, "add_bos_token": True}, r"bos_token_id"),
    ],
)
def test_broken_metadata_says_what_is_wrong(tweaks: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        make_byte_level(**tweaks)


NAN = float("nan")
LIES: list[tuple[dict[str, Any], str]] = [
    ({"model": 7}, r"model is 7, which is not supported; known: gpt2"),
    ({"pre": ["gpt-2"]}, r"pre is \['gpt-2'\], which is not supported"),
    ({"tokens": 3}, r"tokens is 3: it must be a list of texts"),
    ({"tokens": []}, r"tokens is \[\]: it must be a list of texts, one for each token"),
    ({"tokens": [1, 2]}, r"tokens is \[1, 2\]"),
    ({"merges": 1.5}, r"merges is 1\.5: it must be a list of texts"),
    ({"merges": [1]}, r"merges is \[1\]: it must be a list of texts"),
    ({"token_type": 1}, r"token_type is 1: it must be a list of whole numbers"),
    ({"token_type": ["1"] * 260}, r"token_type is \['1'.*: it must be a list of whole numbers"),
    ({"bos_token_id": -1}, r"bos_token_id is -1: it must be a whole number of at least 0"),
    ({"bos_token_id": NAN}, r"bos_token_id is nan: it must be a whole number"),
    ({"eos_token_id": [2]}, r"eos_token_id is \[2\]: it must be a whole number"),
    ({"eot_token_id": True}, r"eot_token_id is True: it must be a whole number"),
    ({"fim_pre_token_id": "5"}, r"fim_pre_token_id is '5': it must be a whole number"),
    ({"add_bos_token": "yes"}, r"add_bos_token is 'yes': it must be true or false"),
]


@pytest.mark.parametrize(("tweaks", "message"), LIES, ids=[f"{number}" for number in range(len(LIES))])
def test_metadata_of_another_type_is_refused_by_name(tweaks: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=rf"m\.gguf: tokenizer\.ggml\.{message}"):
        read_gguf_tokenizer(byte_level_metadata(**tweaks), Path("m.gguf"))


def test_scores_that_are_no_numbers_are_refused_by_name() -> None:
    scores = spm_metadata()["tokenizer.ggml.scores"]
    for odd, message in (
        (None, r"scores is \[None.*a list of numbers"),
        (NAN, r"scores\[0\] is nan"),
        (-1 / 1e-320, r"scores\[0\] is -inf: it must be a finite number"),
    ):
        with pytest.raises(ModelError, match=message):
            make_spm(scores=[odd, *scores[1:]])
    with pytest.raises(ModelError, match=r"scores is 0\.5"):
        make_spm(scores=0.5)


def test_a_scored_token_of_a_megabyte_is_refused() -> None:
    """Each of its cuts would be tried: hours."""
    tokens = spm_metadata()["tokenizer.ggml.tokens"]
    with pytest.raises(ModelError, match=r"tokens\[\d+\] has 1000000 characters.*at most 1024"):
        make_spm(tokens=[*tokens[:-1], "a" * 1_000_000])


def test_tokens_with_damaged_characters_are_not_duplicates() -> None:
    tokens = [*byte_level_metadata()["tokenizer.ggml.tokens"], "\ufffd", "a\ufffd", "\ufffd"]
    tokenizer = make_byte_level(tokens=tokens, token_type=[1] * len(tokens))
    assert tokenizer.vocab_size == len(tokens)
    assert [tokenizer.token_text(token_id) for token_id in (260, 262)] == ["\ufffd", "\ufffd"]


def test_pieces_that_form_one_another_in_too_many_ways_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_tokenizer, "MAX_MERGES", 100)
    with pytest.raises(ModelError, match=r"form one another in more than 100 ways"):
        make_spm()


def test_empty_token_text_is_no_obstacle() -> None:
    metadata = byte_level_metadata() | prefix_keys({"merges": []})
    metadata["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"], ""]
    metadata["tokenizer.ggml.token_type"] = [*metadata["tokenizer.ggml.token_type"], 5]
    assert Tokenizer(read_gguf_tokenizer(metadata)).vocab_size == 261


# --- SentencePiece with merges ----------------------------------------------------------------------------


def make_merged(**tweaks: Any) -> Tokenizer:
    """A vocabulary as Gemma 4's files have it: pieces and merges, bytes, and two tokens with the same text."""
    pieces = ["<unk>", "<bos>", "<eos>", "<turn|>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["#", "a", "b", "▁", "\n", "ab", "▁ab", "\n\n", "#"]
    types = [2, 3, 3, 3, *[6] * 256, *[1] * 9]
    metadata = {
        "model": "gemma4",
        "tokens": pieces,
        "token_type": types,
        "merges": ["a b", "▁ ab", "\n \n"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }
    return Tokenizer(
        read_gguf_tokenizer({f"tokenizer.ggml.{key}": value for key, value in (metadata | tweaks).items()})
    )


def test_merges_join_pieces_within_lines() -> None:
    tokenizer = make_merged()
    texts = [tokenizer.token_text(token_id) for token_id in tokenizer.encode("ab ab\n\n\nab")]
    assert texts == ["<bos>", "ab", " ab", "\n\n", "\n", "ab"]
    assert tokenizer.decode(tokenizer.encode("é ab<turn|>", add_special_tokens=False)) == "é ab"


def test_tokens_with_the_same_text_both_have_it_and_the_later_one_is_written() -> None:
    tokenizer = make_merged()
    first, second = 260, 268
    assert tokenizer.encode("#", add_special_tokens=False) == [second]
    assert tokenizer.decode([first, second]) == "##"
