from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.builders import IM_END_ID
from tests.sweeps import examples
from tests.text.vocabularies import HARD_TEXTS, make_byte_level, make_spm
from tinyvllm.config import ModelFiles
from tinyvllm.text.detokenizer import Detokenizer
from tinyvllm.text.tokenizer import Tokenizer, load_tokenizer

BYTE_LEVEL, SPM = make_byte_level(), make_spm()
BOTH = pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, SPM], ids=["byte-level", "sentencepiece"])
FLAGS = [(skip, continues) for skip in (True, False) for continues in (True, False)]


def check_equals_whole(tokenizer: Tokenizer, ids: list[int]) -> None:
    """Pieces joined are the whole decode, whatever the settings; and no prefix has said what the whole does not."""
    for skip, continues in FLAGS:
        whole = tokenizer.decode(ids, skip_special_tokens=skip, is_continuation=continues)
        detokenizer = Detokenizer(tokenizer, skip, is_continuation=continues)
        so_far = ""
        for token_id in ids:
            so_far += detokenizer.push(token_id)
            assert whole.startswith(so_far)
        assert so_far + detokenizer.flush() == whole


@BOTH
@given(data=st.data())
def test_pieces_equal_the_whole_for_any_ids(tokenizer: Tokenizer, data: st.DataObject) -> None:
    ids = st.lists(st.integers(0, tokenizer.vocab_size + 1), max_size=40)
    check_equals_whole(tokenizer, data.draw(ids))


@given(st.lists(st.sampled_from([0xF0, 0x9F, 0x98, 0x80, 0xE2, 0x82, 0xAC, 0xC3, 0xED, 0xA0, 0x20, 0x61, IM_END_ID])))
def test_pieces_equal_the_whole_for_broken_characters(ids: list[int]) -> None:
    check_equals_whole(BYTE_LEVEL, ids)


@BOTH
@examples(40, 100)
@given(text=st.text())
def test_pieces_equal_the_whole_for_any_text(tokenizer: Tokenizer, text: str) -> None:
    check_equals_whole(tokenizer, tokenizer.encode(text))


@BOTH
@pytest.mark.parametrize("text", HARD_TEXTS)
def test_every_character_comes_once_and_whole(tokenizer: Tokenizer, text: str) -> None:
    detokenizer = Detokenizer(tokenizer, is_continuation=False)
    pieces = [detokenizer.push(token_id) for token_id in tokenizer.encode(text)]
    assert "".join(pieces) == text
    assert detokenizer.flush() == ""


@pytest.mark.model
def test_pieces_equal_the_whole_for_the_default_model(smollm2_files: ModelFiles) -> None:
    tokenizer = load_tokenizer(smollm2_files)
    for text in HARD_TEXTS:
        check_equals_whole(tokenizer, tokenizer.encode(text))


def test_incomplete_character_waits_and_is_replaced_at_the_end() -> None:
    detokenizer = Detokenizer(BYTE_LEVEL)
    assert [detokenizer.push(byte) for byte in "€".encode()] == ["", "", "€"]
    assert [detokenizer.push(byte) for byte in (0xF0, 0x9F)] == ["", ""]
    assert detokenizer.flush() == "\ufffd"


def test_invalid_byte_is_replaced_as_soon_as_it_is_certain() -> None:
    detokenizer = Detokenizer(BYTE_LEVEL)
    assert [detokenizer.push(byte) for byte in (0xFF, 0xE2, ord("a"))] == ["\ufffd", "", "\ufffda"]


def test_leading_space_of_an_answer_is_kept() -> None:
    ids = SPM.encode("hello", add_special_tokens=False)
    assert [Detokenizer(SPM).push(token_id) for token_id in ids] == [" hello"]
    assert [Detokenizer(SPM, is_continuation=False).push(token_id) for token_id in ids] == ["hello"]
