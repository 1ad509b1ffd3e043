"""Tokenizers for the tests of this room, made in memory: a byte-level one and a SentencePiece-style one."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from tests.builders import IM_END_ID, IM_START_ID, byte_vocabulary, is_special
from tinyvllm.text.gguf_tokenizer import read_gguf_tokenizer
from tinyvllm.text.tokenizer import Tokenizer

REFERENCE = Path(__file__).parent / "data" / "tokenizer_reference.json"

# What one line of code, one loop or one wrong assumption about characters would break.
HARD_TEXTS = [
    "tabs\tand\r\nlines\n\n  end ",
    "12345 67 8.9e10",
    "👨‍👩‍👧‍👦 👍🏽 🇩🇪",
    "日本語、中文。한국어",
    "مرحبا שלום",
    "e\u0301 n\u0303 हिन्दी",
    "\x00\x01\x7f\u200b\u2028\ufeff\ufffd",
    "   leading and trailing   ",
    "",
]


@functools.cache
def read_reference() -> dict[str, Any]:
    """llama.cpp's ids; scripts/make_tokenizer_reference.py wrote the file, which names its fields."""
    reference: dict[str, Any] = json.loads(REFERENCE.read_text(encoding="utf-8"))
    return reference


def byte_level_metadata(**tweaks: Any) -> dict[str, Any]:
    """The byte tokenizer of tests.builders as GGUF metadata; `tweaks` replace keys under tokenizer.ggml."""
    tokens = byte_vocabulary()
    values = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": tokens,
        "token_type": [3 if is_special(token_id) else 1 for token_id in range(len(tokens))],
        "merges": [f"{tokens[0]} {tokens[0]}"],
        "bos_token_id": IM_START_ID,
        "eos_token_id": IM_END_ID,
    }
    return prefix_keys(values | tweaks)


def spm_metadata(**tweaks: Any) -> dict[str, Any]:
    """The reference's SentencePiece-style vocabulary: <unk>, <s>, </s>, 256 bytes, then pieces by falling score."""
    metadata: dict[str, Any] = read_reference()["spm_metadata"]
    return metadata | prefix_keys(tweaks)


def prefix_keys(values: dict[str, Any]) -> dict[str, Any]:
    return {f"tokenizer.ggml.{key}": value for key, value in values.items()}


def make_byte_level(**tweaks: Any) -> Tokenizer:
    return Tokenizer(read_gguf_tokenizer(byte_level_metadata(**tweaks)))


def make_spm(**tweaks: Any) -> Tokenizer:
    return Tokenizer(read_gguf_tokenizer(spm_metadata(**tweaks)))
