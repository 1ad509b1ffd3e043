"""Read the tokenizer of a directory in Hugging Face format: tokenizer.json and its settings."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Mapping
from operator import itemgetter
from pathlib import Path

import tokenizers

from tinyvllm.errors import ModelError, UnsupportedModelError
from tinyvllm.storage.hf_config import text_values
from tinyvllm.storage.regular_file import is_present
from tinyvllm.storage.strict_json import read_json, read_json_if_present
from tinyvllm.storage.values import MAX_SIZE, Values
from tinyvllm.text import tokenizers_library
from tinyvllm.text.tokenizer_file import MAX_TOKEN_TEXT, MAX_TOKENIZER_BYTES, read_tokenizer_file
from tinyvllm.text.tokenizer_spec import SPACE_MARK, ToBytes, TokenizerSpec, byte_level_bytes, sentencepiece_bytes
from tinyvllm.text.tokenizers_library import failures_as

logger = logging.getLogger(__name__)

SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")
PROBE = " é\N{GRINNING FACE}a1\n"  # the library panics at an added token of which normalizing leaves nothing
SETTINGS = "tokenizer_config.json"


def read_hf_tokenizer(directory: Path) -> TokenizerSpec:
    """Read a tokenizer. Raises ModelError for a missing or broken file, UnsupportedModelError for an unknown kind."""
    path = directory / "tokenizer.json"
    if not is_present(path):
        raise ModelError(
            f"{directory} has no tokenizer.json, which is the only supported format: "
            "save the tokenizer again with transformers' AutoTokenizer.save_pretrained"
        )
    backend = tokenizers_library.load(path, read_tokenizer_file(path))
    with failures_as(lambda text: ModelError(f"{path} is not a valid tokenizer: {text}")):
        return read_backend(backend, directory, path)


def read_backend(backend: tokenizers.Tokenizer, directory: Path, path: Path) -> TokenizerSpec:
    """The tokenizer of tokenizer.json (`path`) with the settings in other files. Raises ModelError, and the library's
    errors."""
    check_vocabulary(backend, path)
    with contextlib.suppress(Exception):  # a vocabulary may lack characters; but a panic would meet every such text
        backend.encode(PROBE)
    texts = read_special_texts(directory)
    settings = read_values(directory / SETTINGS)
    add_decoder_tokens(backend, settings)
    add_special_texts(backend, texts)
    bos_id, eos_id = (token_id_of(backend, texts.get(name)) for name in ("bos_token", "eos_token"))
    prefix_ids, suffix_ids = find_added_ids(backend, path)
    vocab_size = read_vocab_size(directory)
    for token_id in (*prefix_ids, *suffix_ids, *(one for one in (bos_id, eos_id) if one is not None)):
        if vocab_size is not None and token_id >= vocab_size:
            raise ModelError(
                f"{path}: the tokenizer begins or ends texts with the id {token_id}, but config.json has a vocab_size "
                f"of {vocab_size}: the files are not of one model"
            )
    to_bytes, strips_leading_space = read_decoder(backend, path)
    return TokenizerSpec(
        backend=backend,
        to_bytes=to_bytes,
        bos_id=bos_id,
        eos_id=eos_id,
        eos_ids=read_eos_ids(directory, vocab_size) | ({eos_id} if eos_id is not None else set()),
        prefix_ids=apply_flag(prefix_ids, bos_id, optional_flag(settings, "add_bos_token")),
        suffix_ids=apply_flag(suffix_ids, eos_id, optional_flag(settings, "add_eos_token")),
        strips_leading_space=strips_leading_space,
    )


def read_values(path: Path) -> Values:
    """The settings of a file; none if there is no such file."""
    return Values(path, read_json_if_present(path))


def optional_flag(values: Values, key: str) -> bool | None:
    return None if values.get(key) is None else values.flag(key)


def check_vocabulary(backend: tokenizers.Tokenizer, path: Path) -> None:
    """Raise ModelError for ids and texts larger than any tokenizer's: other modules make arrays of that size."""
    vocabulary = backend.get_vocab()
    last = max(vocabulary.values(), default=0)
    if last >= MAX_SIZE:
        raise ModelError(f"{path} has the token id {last}: ids must be below {MAX_SIZE}")
    longest = max(map(len, vocabulary), default=0)
    if longest > MAX_TOKEN_TEXT:
        raise ModelError(f"{path} has a token of {longest} characters: tokens must have at most {MAX_TOKEN_TEXT}")


def read_special_texts(directory: Path) -> dict[str, str]:
    """Texts of bos_token, eos_token, unk_token and pad_token, if the files name them."""
    texts = {}
    for values in (read_values(directory / "special_tokens_map.json"), read_values(directory / SETTINGS)):
        for name in SPECIAL_NAMES:
            # a token is its text, or an object with the text and how to match it
            if isinstance(values.get(name), dict):
                inner = values.inner(name)
                text = None if inner is None else inner.optional_text("content")
            else:
                text = values.optional_text(name)
            if name in values.values:
                texts[name] = text
    return {name: text for name, text in texts.items() if text is not None}


def read_token_texts(directory: Path) -> list[str]:
    """Texts of the vocabulary, if tokenizer.json has it as an object, and of the added tokens; without ids."""
    path = directory / "tokenizer.json"
    stored = Values(path, read_json(path, MAX_TOKENIZER_BYTES))
    model = stored.inner("model") or Values(path, {})
    words = model.get("vocab")  # a list for some kinds, whose marks are added tokens
    added = [token.text("content") for token in stored.inners("added_tokens")]
    return [*(words if isinstance(words, dict) else ()), *added]


def read_vocab_size(directory: Path) -> int | None:
    """The width of the logits, if config.json says it."""
    return text_values(read_values(directory / "config.json")).optional_integer("vocab_size", at_most=MAX_SIZE)


def read_eos_ids(directory: Path, vocab_size: int | None) -> frozenset[int]:
    """eos_token_id, one id or several, from generation_config.json or else from config.json."""
    for name in ("generation_config.json", "config.json"):
        values = read_values(directory / name)
        if values.get("eos_token_id") is not None:
            return frozenset(values.token_ids("eos_token_id", vocab_size))
    return frozenset()


def add_decoder_tokens(backend: tokenizers.Tokenizer, settings: Values) -> None:
    """Add the tokens of `added_tokens_decoder` (id -> token) that tokenizer.json lacks, in the order of their ids.

    As transformers does: the library chooses a new token's id, which is the next free one. A different id in the file
    is logged, because the model was trained with that one. Raises ModelError for malformed entries.
    """
    listed = settings.inner("added_tokens_decoder")
    if listed is None:
        return
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    for token_id, key in sorted(((read_added_id(key, listed), key) for key in listed.values), key=itemgetter(0)):
        token = read_added_token(listed, key)
        if token.content in known:
            continue
        backend.add_tokens([token])
        found = backend.token_to_id(token.content)
        if found != token_id:
            logger.warning(
                "%s: added token %r gets the id %s, because tokenizer.json ends there, but the file states %d",
                settings.source, token.content, found, token_id,
            )  # fmt: skip


def read_added_id(key: str, listed: Values) -> int:
    if not (key.isascii() and key.isdecimal() and len(key) < len(str(MAX_SIZE)) and int(key) < MAX_SIZE):
        raise ModelError(f"{listed.source}: added_tokens_decoder has the key {key[:100]!r}, which is not a token id")
    return int(key)


def read_added_token(listed: Values, key: str) -> tokenizers.AddedToken:
    """The token of an entry: an object with its text and how it is matched."""
    entry = listed.inner(key)
    text = None if entry is None else entry.optional_text("content")
    if entry is None or not text or len(text) > MAX_TOKEN_TEXT:
        listed.refuse(key, f"an object with content, a text of 1 to {MAX_TOKEN_TEXT} characters")
    flags = {
        name: entry.flag(name)
        for name in ("single_word", "lstrip", "rstrip", "normalized", "special")
        if entry.get(name) is not None
    }
    return tokenizers.AddedToken(text, **flags)


def add_special_texts(backend: tokenizers.Tokenizer, texts: Mapping[str, str]) -> None:
    """Mark the named tokens as special if tokenizer.json does not, as transformers does. Adds no new tokens."""
    special = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    missing = [text for text in texts.values() if text not in special and backend.token_to_id(text) is not None]
    backend.add_tokens([tokenizers.AddedToken(text, special=True, normalized=False) for text in missing])


def token_id_of(backend: tokenizers.Tokenizer, text: str | None) -> int | None:
    return None if text is None else backend.token_to_id(text)


MOST_IDS = 64  # of one letter with what is added to a text: tokenizers in use have up to 5


def find_added_ids(backend: tokenizers.Tokenizer, path: Path) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids that the file's post-processor adds before and after a text, found by encoding one."""
    plain = backend.encode("a", add_special_tokens=False).ids
    if len(plain) > MOST_IDS:
        raise UnsupportedModelError(
            f"{path}: it encodes the letter 'a' as {len(plain)} tokens: at most {MOST_IDS} are right"
        )
    whole = backend.encode("a", add_special_tokens=True).ids
    if len(whole) > MOST_IDS:
        raise UnsupportedModelError(
            f"{path}: its post_processor makes {len(whole)} tokens of the letter 'a': at most {MOST_IDS} are right"
        )
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
