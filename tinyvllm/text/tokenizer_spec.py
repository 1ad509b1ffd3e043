"""A tokenizer as read from a model's files of any format, and how the tokens of a vocabulary map to bytes."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import tokenizers

SPACE_MARK = "▁"  # U+2581: a space, in SentencePiece vocabularies
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")

# (the token's text, whether it is an added token) -> its bytes
ToBytes = Callable[[str, bool], bytes]


@dataclass(frozen=True)
class TokenizerSpec:
    """A tokenizer as its model's files describe it. `Tokenizer` is built from this."""

    backend: tokenizers.Tokenizer  # text -> ids, without prefix_ids and suffix_ids
    to_bytes: ToBytes
    bos_id: int | None
    eos_id: int | None
    eos_ids: frozenset[int]  # all ids that end a text or a turn, eos_id included
    prefix_ids: tuple[int, ...]  # inserted before a text by add_special_tokens: BOS, or nothing
    suffix_ids: tuple[int, ...]  # appended after it
    strips_leading_space: bool  # encoding prepends a space to a text, so decoding removes one
    fim_ids: Mapping[str, int] = field(default_factory=dict)  # see text/fim.py, if the files name them
    doubled: Mapping[int, str] = field(default_factory=dict)  # texts of ids that share them with another id


def byte_level_bytes(text: str, is_added: bool) -> bytes:
    """Bytes of a byte-level token. Added tokens, and tokens with characters outside the alphabet, are plain text."""
    alphabet = byte_of_character()
    if is_added or any(character not in alphabet for character in text):
        return text.encode()
    return bytes(alphabet[character] for character in text)


def sentencepiece_bytes(text: str, is_added: bool) -> bytes:
    """Bytes of a SentencePiece token: `<0x0A>` is a single byte; `▁` is a space, in added tokens too."""
    match = None if is_added else BYTE_TOKEN.fullmatch(text)
    return bytes([int(match[1], 16)]) if match else text.replace(SPACE_MARK, " ").encode()


@functools.cache
def byte_of_character() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 characters stand for themselves, other bytes are U+0100 onwards, in order.

    https://github.com/openai/gpt-2/blob/1b8a0187d70a2dbe4de8322598496d476e069f4c/src/encoder.py
    """
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(0x100 + index): byte for index, byte in enumerate(hidden)}
