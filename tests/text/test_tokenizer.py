from __future__ import annotations

import pytest

from tests.builders import IM_END_ID, IM_START_ID
from tests.text.vocabularies import HARD_TEXTS, make_byte_level, make_spm
from tinyvllm.errors import RequestError
from tinyvllm.text.tokenizer import Tokenizer

BYTE_LEVEL, SPM = make_byte_level(), make_spm()
BOTH = pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, SPM], ids=["byte-level", "sentencepiece"])


@BOTH
@pytest.mark.parametrize("text", HARD_TEXTS)
def test_decode_undoes_encode(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@BOTH
@pytest.mark.parametrize("text", HARD_TEXTS)
def test_bytes_of_tokens_joined_are_the_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    joined = b"".join(tokenizer.token_bytes(token_id) for token_id in ids)
    assert joined == ((" " if tokenizer.strips_leading_space and text else "") + text).encode()


def test_every_byte_has_its_token() -> None:
    assert [BYTE_LEVEL.token_bytes(byte) for byte in range(256)] == [bytes([byte]) for byte in range(256)]
    assert [SPM.token_bytes(3 + byte) for byte in range(256)] == [bytes([byte]) for byte in range(256)]


def test_bytes_that_are_no_character_become_replacement_characters() -> None:
    assert BYTE_LEVEL.decode([0xE2, 0x82, ord("a"), 0xFF]) == "\ufffda\ufffd"
    assert BYTE_LEVEL.token_text(0xE2) == "\ufffd"


def test_special_tokens_in_text_are_tokens_or_text() -> None:
    assert BYTE_LEVEL.encode("a<|im_end|>") == [ord("a"), IM_END_ID]
    assert BYTE_LEVEL.encode("a<|im_end|>", parse_special=False) == list(b"a<|im_end|>")


def test_special_tokens_are_decoded_if_asked() -> None:
    ids = [IM_START_ID, ord("a"), IM_END_ID]
    assert BYTE_LEVEL.decode(ids) == "a"
    assert BYTE_LEVEL.decode(ids, skip_special_tokens=False) == "<|im_start|>a<|im_end|>"
    assert BYTE_LEVEL.token_text(IM_END_ID) == "<|im_end|>"


def test_added_token_outside_the_byte_alphabet_is_plain_text() -> None:
    tokens = ["a", "<｜end▁of▁sentence｜>"]
    tokenizer = make_byte_level(tokens=tokens, token_type=[1, 3], merges=[], bos_token_id=1, eos_token_id=1)
    assert tokenizer.token_text(1) == tokens[1]
    assert tokenizer.encode("a" + tokens[1]) == [0, 1]


def test_ids_without_a_token_have_no_bytes() -> None:
    """Embedding tables have more rows than the vocabulary has tokens."""
    assert BYTE_LEVEL.token_bytes(BYTE_LEVEL.vocab_size) == b""
    assert BYTE_LEVEL.token_bytes(-1) == b""
    assert BYTE_LEVEL.decode([ord("a"), 10**6]) == "a"


def test_continuation_keeps_its_leading_space() -> None:
    prompt, output = SPM.encode("hello"), SPM.encode("there", add_special_tokens=False)
    assert SPM.decode(prompt) + SPM.decode(output, is_continuation=True) == SPM.decode(prompt + output) == "hello there"


def test_only_one_leading_space_is_stripped() -> None:
    assert SPM.decode(SPM.encode("  two")) == "  two"


def test_chat_text_gets_no_second_bos() -> None:
    assert SPM.encode_chat("<s>a") == SPM.encode("a")
    assert SPM.encode("<s>a")[:2] == [SPM.bos_id, SPM.bos_id]  # what encode_chat is for


@pytest.mark.parametrize(("text", "index"), [("\ud83d", 0), ("ab\udc00c", 2)])
def test_lone_surrogate_is_refused_with_its_place(text: str, index: int) -> None:
    with pytest.raises(RequestError, match=rf"prompt has the lone surrogate U\+D[8C]\w\w at index {index}") as caught:
        BYTE_LEVEL.encode(text)
    assert caught.value.param == "prompt"
    with pytest.raises(RequestError, match="messages has") as caught:
        BYTE_LEVEL.encode_chat(text)
    assert caught.value.param == "messages"


def test_encoding_special_tokens_as_text_leaves_no_trace() -> None:
    tokenizer = make_byte_level()
    tokenizer.encode("<|im_end|>", parse_special=False)
    assert tokenizer.encode("<|im_end|>") == [IM_END_ID]
