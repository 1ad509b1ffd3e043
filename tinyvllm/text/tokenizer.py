"""Text to token ids and back, the same for every file kind."""

from __future__ import annotations

from collections.abc import Iterable

import tokenizers

from tinyvllm.config import ModelFiles
from tinyvllm.errors import RequestError
from tinyvllm.storage.gguf_file import GGUFFile
from tinyvllm.text.gguf_tokenizer import read_gguf_tokenizer
from tinyvllm.text.hf_tokenizer import read_hf_tokenizer
from tinyvllm.text.parts import TokenizerParts


def load_tokenizer(files: ModelFiles) -> Tokenizer:
    """Read a model's tokenizer. Raises ModelError (UnsupportedModelError) that names what is missing or unknown."""
    if files.kind == "gguf":
        return Tokenizer(read_gguf_tokenizer(GGUFFile(files.path).metadata))
    return Tokenizer(read_hf_tokenizer(files.path))


class Tokenizer:
    """A model's tokenizer. Safe to use from several threads: nothing changes after it is made, but a cache."""

    def __init__(self, parts: TokenizerParts) -> None:
        self._parts = parts
        self._backend = parts.backend
        added = parts.backend.get_added_tokens_decoder()
        self._plain_backend = make_plain_backend(parts.backend)
        self._added_ids = frozenset(added)
        self._bytes: dict[int, bytes] = {}
        self.bos_id = parts.bos_id
        self.eos_id = parts.eos_id
        self.eos_ids = parts.eos_ids
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self.strips_leading_space = parts.strips_leading_space
        self.vocab_size = 1 + max(parts.backend.get_vocab().values(), default=-1)  # ids may have holes

    def encode(self, text: str, *, add_special_tokens: bool = True, parse_special: bool = True) -> list[int]:
        """Token ids of `text`.

        add_special_tokens: put BOS before and EOS after it, where the model's files say so. parse_special: special
        tokens that are written in the text become their ids; else they are text like any other.
        Raises RequestError(param="prompt") for a lone surrogate, which is no character.
        """
        check_characters(text, "prompt")
        backend = self._backend if parse_special else self._plain_backend
        ids = backend.encode(text, add_special_tokens=False).ids
        return [*self._parts.prefix_ids, *ids, *self._parts.suffix_ids] if add_special_tokens else ids

    def encode_chat(self, text: str) -> list[int]:
        """Token ids of a rendered chat. Nothing is added: the template itself writes BOS where the model wants it."""
        check_characters(text, "messages")
        return self.encode(text, add_special_tokens=False)

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True, is_continuation: bool = False) -> str:
        """The text of `ids`: their bytes in a row, read as UTF-8, U+FFFD for what is none.

        is_continuation: the ids follow others, so that a leading space belongs to the text. It is taken away else,
        where encoding puts one (`strips_leading_space`).
        """
        skipped = self.special_ids if skip_special_tokens else frozenset()
        kept = (self.token_bytes(token_id) for token_id in ids if token_id not in skipped)
        text = b"".join(kept).decode(errors="replace")
        return text.removeprefix(" ") if self.strips_leading_space and not is_continuation else text

    def token_bytes(self, token_id: int) -> bytes:
        """The exact bytes of a token, which may be a part of a character; empty for an id that has no token.

        Embedding tables are often padded to more rows than there are tokens, so that such ids can be sampled.
        """
        if token_id not in self._bytes:
            text = self._backend.id_to_token(token_id) if 0 <= token_id < self.vocab_size else None
            is_added = token_id in self._added_ids
            self._bytes[token_id] = b"" if text is None else self._parts.spelling(text, is_added)
        return self._bytes[token_id]

    def token_text(self, token_id: int) -> str:
        """A token's bytes as text, for people: U+FFFD stands for parts of characters."""
        return self.token_bytes(token_id).decode(errors="replace")


def make_plain_backend(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """A twin that takes special tokens in a text for text. It shares the model: only the added tokens are copied."""
    twin = tokenizers.Tokenizer(backend.model)
    if backend.normalizer is not None:
        twin.normalizer = backend.normalizer
    if backend.pre_tokenizer is not None:
        twin.pre_tokenizer = backend.pre_tokenizer
    added = backend.get_added_tokens_decoder()
    twin.add_tokens([added[token_id] for token_id in sorted(added)])  # ids are given out in this order
    twin.encode_special_tokens = True
    same = all(twin.token_to_id(token.content) == token_id for token_id, token in added.items())
    assert same, "added tokens have other ids in the twin"
    return twin


def check_characters(text: str, param: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise RequestError(
            f"{param} has the lone surrogate U+{code:04X} at index {error.start}, which is half a character: "
            "send whole characters (in JSON, both halves of an escaped pair)",
            param=param,
        ) from None
