from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, processors

from tests.builders import ENDOFTEXT_ID, IM_END_ID, IM_START_ID, make_byte_tokenizer, write_byte_tokenizer, write_json
from tests.text.vocabularies import HARD_TEXTS, spm_metadata
from tinyvllm.config import ModelFiles
from tinyvllm.errors import ModelError, UnsupportedModelError
from tinyvllm.text.gguf_tokenizer import rank_merges
from tinyvllm.text.tokenizer import Tokenizer, load_tokenizer


def load(directory: Path) -> Tokenizer:
    return load_tokenizer(ModelFiles("hf", directory, "tiny"))


def edit_json(path: Path, **changes: Any) -> None:
    value = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    write_json(path, value | changes)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Only the tokenizer's files, with no word about ends but eos_token."""
    write_byte_tokenizer(tmp_path)
    return tmp_path


def test_both_formats_of_a_model_have_the_same_tokenizer(
    tiny_hf_files: ModelFiles, tiny_gguf_files: ModelFiles
) -> None:
    one, other = load_tokenizer(tiny_hf_files), load_tokenizer(tiny_gguf_files)
    for name in ("bos_id", "eos_id", "eos_ids", "special_ids", "vocab_size", "strips_leading_space"):
        assert getattr(one, name) == getattr(other, name), name
    for text in [*HARD_TEXTS, "<|im_start|>user\nhi<|im_end|>"]:
        for parse_special in (True, False):
            ids = one.encode(text, parse_special=parse_special)
            assert ids == other.encode(text, parse_special=parse_special)
            assert one.decode(ids, skip_special_tokens=False) == other.decode(ids, skip_special_tokens=False) == text


def test_eos_ids_come_from_generation_config_then_config(directory: Path) -> None:
    assert load(directory).eos_ids == {IM_END_ID}
    edit_json(directory / "config.json", eos_token_id=[7, 8])
    assert load(directory).eos_ids == {IM_END_ID, 7, 8}
    edit_json(directory / "generation_config.json", eos_token_id=ENDOFTEXT_ID)
    assert load(directory).eos_ids == {IM_END_ID, ENDOFTEXT_ID}


def test_post_processor_says_what_is_added(directory: Path) -> None:
    backend = make_byte_tokenizer()
    backend.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A <|im_end|>",
        special_tokens=[("<|im_start|>", IM_START_ID), ("<|im_end|>", IM_END_ID)],
    )
    backend.save(str(directory / "tokenizer.json"))
    write_json(directory / "tokenizer_config.json", {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"})
    assert load(directory).encode("a") == [IM_START_ID, ord("a"), IM_END_ID]
    assert load(directory).encode("a", add_special_tokens=False) == [ord("a")]
    edit_json(directory / "tokenizer_config.json", add_bos_token=False, add_eos_token=False)
    assert load(directory).encode("a") == [ord("a")]


def test_add_bos_token_adds_what_the_post_processor_does_not(directory: Path) -> None:
    edit_json(directory / "tokenizer_config.json", add_bos_token=True)
    assert load(directory).encode("a") == [IM_START_ID, ord("a")]


def test_special_token_may_be_an_object(directory: Path) -> None:
    edit_json(directory / "tokenizer_config.json", eos_token={"content": "<|endoftext|>", "lstrip": False})
    assert load(directory).eos_id == ENDOFTEXT_ID


def test_named_token_is_special_even_if_tokenizer_json_forgot(directory: Path) -> None:
    edit_json(directory / "tokenizer_config.json", eos_token="a")
    assert ord("a") in load(directory).special_ids


def test_truncation_and_padding_of_the_file_are_not_applied(directory: Path) -> None:
    backend = make_byte_tokenizer()
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    backend.save(str(directory / "tokenizer.json"))
    assert len(load(directory).encode("a" * 10)) == 10


def test_ids_of_added_tokens_are_kept_when_special_tokens_are_text(directory: Path) -> None:
    backend = make_byte_tokenizer()
    backend.add_tokens([tokenizers.AddedToken("<tool>", normalized=False)])
    backend.add_special_tokens([tokenizers.AddedToken("<|late|>", normalized=False)])
    backend.save(str(directory / "tokenizer.json"))
    tokenizer = load(directory)
    assert tokenizer.encode("<tool><|late|>") == [260, 261]
    assert tokenizer.encode("<tool><|late|>", parse_special=False) == [260, *b"<|late|>"]
    assert tokenizer.vocab_size == 262


# --- SentencePiece, in the two forms that are about -------------------------------------------------------


def write_spm(directory: Path, decoder: decoders.Decoder) -> Tokenizer:
    metadata = spm_metadata()
    tokens, scores = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"]
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    merges = rank_merges(dict(zip(tokens[259:], scores[259:], strict=True)))
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoder
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.save(str(directory / "tokenizer.json"))
    return load(directory)


@pytest.mark.parametrize(
    ("decoder", "strips"),
    [
        (decoders.Metaspace(), True),
        (decoders.Metaspace(prepend_scheme="never"), False),
        (decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]), False),
        (
            decoders.Sequence(
                [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
            ),
            True,
        ),
    ],
)
def test_sentencepiece_decoder_says_whether_a_space_is_stripped(
    tmp_path: Path, decoder: decoders.Decoder, strips: bool
) -> None:
    tokenizer = write_spm(tmp_path, decoder)
    ids = tokenizer.encode("hello 日本\n there", add_special_tokens=False)
    text = "hello 日本\n there" if strips else " hello 日本\n there"
    assert tokenizer.strips_leading_space is strips
    assert tokenizer.decode(ids) == text


# --- Broken directories -----------------------------------------------------------------------------------


def test_missing_tokenizer_json_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no tokenizer.json.*save_pretrained"):
        load(tmp_path)


def test_broken_tokenizer_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{", encoding="utf-8")
    with pytest.raises(ModelError, match=r"tokenizer.json is not a valid tokenizer"):
        load(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]"])
def test_broken_settings_are_named(directory: Path, text: str) -> None:
    (directory / "generation_config.json").write_text(text, encoding="utf-8")
    with pytest.raises(ModelError, match=r"generation_config\.json"):
        load(directory)


def test_unknown_decoder_lists_the_known(directory: Path) -> None:
    backend = make_byte_tokenizer()
    backend.decoder = decoders.WordPiece()
    backend.save(str(directory / "tokenizer.json"))
    with pytest.raises(UnsupportedModelError, match=r"WordPiece.*ByteLevel"):
        load(directory)


# --- Added tokens of tokenizer_config.json --------------------------------------------------------------------------


def token(content: str, **flags: bool) -> dict[str, Any]:
    return {"content": content, "special": True, "normalized": False, "lstrip": False, "rstrip": False} | flags


def test_tokens_that_only_the_settings_list_are_one_id_each(directory: Path) -> None:
    size = load(directory).vocab_size
    listed = {
        str(size + 1): token("<tool>", special=False),
        str(size): token("<|tool|>"),
        str(IM_END_ID): token("<|im_end|>"),
    }
    edit_json(directory / "tokenizer_config.json", added_tokens_decoder=listed)
    tokenizer = load(directory)
    assert tokenizer.encode("a<|tool|>b<tool>") == [ord("a"), size, ord("b"), size + 1]
    assert tokenizer.special_ids >= {size, IM_END_ID} and size + 1 not in tokenizer.special_ids
    assert tokenizer.decode([ord("a"), size, size + 1]) == "a<tool>"
    assert len(tokenizer.encode("<|tool|>", parse_special=False)) == len("<|tool|>")


def test_id_that_the_library_cannot_give_is_logged(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    size = load(directory).vocab_size
    edit_json(directory / "tokenizer_config.json", added_tokens_decoder={str(size + 5): token("<|late|>")})
    assert load(directory).encode("<|late|>") == [size]
    assert f"'<|late|>' gets the id {size}" in caplog.text and f"the file states {size + 5}" in caplog.text


@pytest.mark.parametrize(
    ("listed", "message"),
    [
        ([], r"added_tokens_decoder is \[1\]: it must be an object"),
        ({"a": token("x")}, "key 'a'"),
        ({"300": "x"}, r"added_tokens_decoder\.300 is 'x'"),
        ({"300": {"content": ""}}, r"added_tokens_decoder\.300 is"),
    ],
)
def test_malformed_lists_of_added_tokens_are_named(directory: Path, listed: Any, message: str) -> None:
    edit_json(directory / "tokenizer_config.json", added_tokens_decoder=listed or [1])
    with pytest.raises(ModelError, match=message):
        load(directory)


def test_a_letter_that_becomes_many_tokens_is_refused(directory: Path) -> None:
    """Looking for it among what a post-processor adds would take a time of the product of both."""
    path = directory / "tokenizer.json"
    edit_json(path, normalizer={"type": "Replace", "pattern": {"String": "a"}, "content": "b" * 65})
    with pytest.raises(UnsupportedModelError, match="encodes the letter 'a' as 65 tokens: at most 64"):
        load(directory)
    pieces = [{"SpecialToken": {"id": "<|im_end|>", "type_id": 0}}] * 64
    template = {"type": "TemplateProcessing", "single": [*pieces, {"Sequence": {"id": "A", "type_id": 0}}], "pair": []}
    tokens = {"<|im_end|>": {"id": "<|im_end|>", "ids": [IM_END_ID], "tokens": ["<|im_end|>"]}}
    edit_json(path, normalizer=None, post_processor=template | {"special_tokens": tokens})
    with pytest.raises(UnsupportedModelError, match="makes 65 tokens of the letter 'a': at most 64"):
        load(directory)
