"""Read the tokenizer of a directory in Hugging Face format: tokenizer.json and its settings."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from operator import itemgetter
from pathlib import Path
from typing import Any

import tokenizers

from tinyvllm.errors import ModelError, UnsupportedModelError
from tinyvllm.storage.strict_json import read_json, read_json_if_present
from tinyvllm.storage.values import Values
from tinyvllm.text.tokenizer_spec import SPACE_MARK, ToBytes, TokenizerSpec, byte_level_bytes, sentencepiece_bytes

logger = logging.getLogger(__name__)

MAX_TOKENIZER_BYTES = 1 << 28  # of tokenizer.json; the largest known have 35 MB
SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")


def read_hf_tokenizer(directory: Path) -> TokenizerSpec:
    """Read a tokenizer. Raises ModelError for a missing or broken file, UnsupportedModelError for an unknown kind."""
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise ModelError(
            f"{directory} has no tokenizer.json, which is the only supported format: "
            "save the tokenizer again with transformers' AutoTokenizer.save_pretrained"
        )
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise ModelError(f"{path} is not a valid tokenizer: {error}") from error
    backend.no_truncation()  # files may silently truncate or pad every text
    backend.no_padding()

    texts = read_special_texts(directory)
    settings = read_json_if_present(directory / "tokenizer_config.json")
    add_decoder_tokens(backend, settings.get("added_tokens_decoder") or {}, directory / "tokenizer_config.json")
    add_special_texts(backend, texts)
    bos_id, eos_id = (token_id_of(backend, texts.get(name)) for name in ("bos_token", "eos_token"))
    prefix_ids, suffix_ids = find_added_ids(backend, path)
    to_bytes, strips_leading_space = read_decoder(backend, path)
    return TokenizerSpec(
        backend=backend,
        to_bytes=to_bytes,
        bos_id=bos_id,
        eos_id=eos_id,
        eos_ids=read_eos_ids(directory) | ({eos_id} if eos_id is not None else set()),
        prefix_ids=apply_flag(prefix_ids, bos_id, settings.get("add_bos_token")),
        suffix_ids=apply_flag(suffix_ids, eos_id, settings.get("add_eos_token")),
        strips_leading_space=strips_leading_space,
    )


def read_special_texts(directory: Path) -> dict[str, str]:
    """Texts of bos_token, eos_token, unk_token and pad_token, if the files name them."""
    named = read_json_if_present(directory / "special_tokens_map.json") | read_json_if_present(
        directory / "tokenizer_config.json"
    )
    values = {name: named.get(name) for name in SPECIAL_NAMES}
    # a token is its text, or an object with the text and how to match it
    texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in values.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def read_token_texts(directory: Path) -> list[str]:
    """Texts of the vocabulary, if tokenizer.json has it as an object, and of the added tokens; without ids."""
    path = directory / "tokenizer.json"
    stored = Values(path, read_json(path, MAX_TOKENIZER_BYTES))
    model = stored.inner("model") or Values(path, {})
    words = model.get("vocab")  # a list for some kinds, whose marks are added tokens
    added = [token.text("content") for token in stored.inners("added_tokens")]
    return [*(words if isinstance(words, dict) else ()), *added]


def read_eos_ids(directory: Path) -> frozenset[int]:
    """eos_token_id, one id or several, from generation_config.json or else from config.json."""
    for name in ("generation_config.json", "config.json"):
        value = read_json_if_present(directory / name).get("eos_token_id")
        if value is not None:
            return frozenset(value if isinstance(value, list) else [value])
    return frozenset()


def add_decoder_tokens(backend: tokenizers.Tokenizer, listed: Any, path: Path) -> None:
    """Add the tokens of `added_tokens_decoder` (id -> token) that tokenizer.json lacks, in the order of their ids.

    As transformers does: the library chooses a new token's id, which is the next free one. A different id in the file
    is logged, because the model was trained with that one. Raises ModelError for malformed entries.
    """
    if not isinstance(listed, dict):
        raise ModelError(f"{path}: added_tokens_decoder is a {type(listed).__name__}, but must be an object")
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    for token_id, entry in sorted(
        ((read_added_id(key, path), value) for key, value in listed.items()), key=itemgetter(0)
    ):
        token = read_added_token(entry, token_id, path)
        if token.content in known:
            continue
        backend.add_tokens([token])
        found = backend.token_to_id(token.content)
        if found != token_id:
            logger.warning(
                "%s: added token %r gets the id %s, because tokenizer.json ends there, but the file states %d",
                path, token.content, found, token_id,
            )  # fmt: skip


def read_added_id(key: str, path: Path) -> int:
    if not key.isdecimal():
        raise ModelError(f"{path}: added_tokens_decoder has the key {key!r}, which is not a token id")
    return int(key)


def read_added_token(entry: Any, token_id: int, path: Path) -> tokenizers.AddedToken:
    """The token of an entry: an object with its text and how it is matched."""
    if not isinstance(entry, dict) or not isinstance(entry.get("content"), str) or not entry["content"]:
        raise ModelError(f"{path}: added_tokens_decoder[{token_id}] is {entry!r}, but must be an object with content")
    flags = {
        name: bool(entry[name])
        for name in ("single_word", "lstrip", "rstrip", "normalized", "special")
        if name in entry
    }
    return tokenizers.AddedToken(entry["content"], **flags)


def add_special_texts(backend: tokenizers.Tokenizer, texts: Mapping[str, str]) -> None:
    """Mark the named tokens as special if tokenizer.json does not, as transformers does. Adds no new tokens."""
    special = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    missing = [text for text in texts.values() if text not in special and backend.token_to_id(text) is not None]
    backend.add_tokens([tokenizers.AddedToken(text, special=True, normalized=False) for text in missing])


def token_id_of(backend: tokenizers.Tokenizer, text: str | None) -> int | None:
    return None if text is None else backend.token_to_id(text)


def find_added_ids(backend: tokenizers.Tokenizer, path: Path) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids that the file's post-processor adds before and after a text, found by encoding one."""
    plain = backend.encode("a", add_special_tokens=False).ids
    whole = backend.encode("a", add_special_tokens=True).ids
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return tuple(whole[:start]), tuple(whole[start + len(plain) :])
    raise UnsupportedModelError(f"{path}: its post_processor changes the text's own tokens, from {plain} to {whole}")


def apply_flag(added_ids: tuple[int, ...], token_id: int | None, flag: bool | None) -> tuple[int, ...]:
    """add_bos_token and add_eos_token, if set, override the post-processor, as in transformers."""
    if flag is None or token_id is None:
        return added_ids
    others = tuple(added_id for added_id in added_ids if added_id != token_id)
    return (token_id, *others) if flag else others


def read_decoder(backend: tokenizers.Tokenizer, path: Path) -> tuple[ToBytes, bool]:
    """(how tokens map to bytes, whether decoding removes a leading space), from the file's decoder."""
    # a decoder's fields are accessible through its pickled state only, which is JSON
    state = json.loads(backend.decoder.__getstate__()) if backend.decoder is not None else {"type": "none"}
    steps = {step["type"]: step for step in state.get("decoders", [state])}
    if "ByteLevel" in steps:
        return byte_level_bytes, False
    if steps.get("Metaspace", {}).get("replacement") == SPACE_MARK:
        return sentencepiece_bytes, steps["Metaspace"].get("prepend_scheme", "always") != "never"
    if steps.get("Replace", {}).get("pattern") == {"String": SPACE_MARK}:
        return sentencepiece_bytes, steps.get("Strip", {}).get("start", 0) > 0
    raise UnsupportedModelError(
        f"{path}: unknown decoder {' + '.join(steps)}: ByteLevel, Metaspace and Replace of {SPACE_MARK} are supported"
    )
