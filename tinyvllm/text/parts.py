"""What a tokenizer is made of, whichever file it came from, and how the texts of a vocabulary spell bytes."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass

import tokenizers

SPACE_MARK = "▁"  # U+2581: a space, in SentencePiece vocabularies
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")

# (token's text, whether it is an added token) -> the bytes it stands for
Spelling = Callable[[str, bool], bytes]


@dataclass(frozen=True)
class TokenizerParts:
    """A tokenizer as its model's files describe it; `Tokenizer` gives it behaviour."""

    backend: tokenizers.Tokenizer  # text -> ids, without the ids below
    spelling: Spelling
    bos_id: int | None
    eos_id: int | None
    eos_ids: frozenset[int]  # all ids that end a text or a turn, eos_id among them
    prefix_ids: tuple[int, ...]  # what add_special_tokens puts before a text: BOS, if anything
    suffix_ids: tuple[int, ...]  # and after it
    strips_leading_space: bool  # encoding puts a space before a text, so decoding takes one away


def byte_level_bytes(text: str, is_added: bool) -> bytes:
    """Bytes of a byte-level token. Added tokens are plain text; so are tokens with a character outside the alphabet."""
    alphabet = byte_of_character()
    if is_added or any(character not in alphabet for character in text):
        return text.encode()
    return bytes(alphabet[character] for character in text)


def sentencepiece_bytes(text: str, is_added: bool) -> bytes:
    """Bytes of a SentencePiece token: `<0x0A>` is one byte, `▁` is a space, in added tokens too."""
    match = None if is_added else BYTE_TOKEN.fullmatch(text)
    return bytes([int(match[1], 16)]) if match else text.replace(SPACE_MARK, " ").encode()


@functools.cache
def byte_of_character() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 characters are themselves, the other bytes follow from U+0100, in order.

    https://github.com/openai/gpt-2/blob/1b8a0187d70a2dbe4de8322598496d476e069f4c/src/encoder.py
    """
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(0x100 + index): byte for index, byte in enumerate(hidden)}
