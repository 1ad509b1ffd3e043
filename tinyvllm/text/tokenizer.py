"""Encode text to token ids and decode them, for every file format."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable

import tokenizers

from tinyvllm.config import ModelFiles
from tinyvllm.errors import ModelError, RequestError
from tinyvllm.faults import reach
from tinyvllm.storage.gguf_file import GGUFFile
from tinyvllm.text.fim import find_marks
from tinyvllm.text.gguf_tokenizer import read_gguf_tokenizer
from tinyvllm.text.hf_tokenizer import read_hf_tokenizer
from tinyvllm.text.long_texts import LONG_CHARS, LongTexts
from tinyvllm.text.tokenizer_spec import TokenizerSpec
from tinyvllm.text.tokenizers_library import failures_as

# One text at a time is encoded on its caller's thread; a pool of threads, one for each core, would only stand by.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

_QUICK_CHARS = 1000  # encoding these takes less time than releasing the interpreter lock and getting it back
_SHRINKING = 4  # how much shorter a normalizer that composes or drops characters makes a text, at the most
_MARGIN_CHARS = 4096  # kept beyond what is needed when a text is cut: a cut changes tokens within a shorter distance


def load_tokenizer(files: ModelFiles) -> Tokenizer:
    """Read a model's tokenizer. Raises ModelError (or UnsupportedModelError), naming what is missing or unknown."""
    if files.kind == "gguf":
        file = GGUFFile(files.path)
        embedding = file.tensors.get("token_embd.weight")
        spec = read_gguf_tokenizer(file.metadata, files.path, None if embedding is None else embedding.shape[0])
    else:
        spec = read_hf_tokenizer(files.path)
    with failures_as(lambda text: ModelError(f"{files.path} has a tokenizer that cannot be used: {text}")):
        return Tokenizer(spec, files)


APART = "☺"  # a character that SentencePiece vocabularies merge with no other


class Tokenizer:
    """A model's tokenizer. Thread-safe: nothing but a cache changes after construction."""

    def __init__(self, spec: TokenizerSpec, files: ModelFiles | None = None) -> None:
        """files: those that the spec was read from, for `encode_long_texts_elsewhere`."""
        self._spec = spec
        self._files = files
        self._backend = spec.backend
        added = spec.backend.get_added_tokens_decoder()
        self._plain_backend = make_plain_backend(spec.backend)
        self._added_ids = frozenset(added)
        self._bytes: dict[int, bytes] = {}
        self.bos_id = spec.bos_id
        self.eos_id = spec.eos_id
        self.eos_ids = spec.eos_ids
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self.fim = find_marks(spec.backend.token_to_id, spec.backend.id_to_token, spec.fim_ids)
        self.strips_leading_space = spec.strips_leading_space
        vocabulary = spec.backend.get_vocab()
        self.vocab_size = 1 + max(vocabulary.values(), default=-1)  # ids may have gaps
        self._longest_chars = _longest_chars(spec.backend, vocabulary)
        self._long_texts: LongTexts | None = None

    def first_difference(self, other: Tokenizer) -> int | None:
        """The first id that stands for other bytes in `other`; None: all agree. Special tokens are not compared, since
        models of one family give them different names and numbers, nor ids without a token."""
        if self._spec.backend.get_vocab() == other._spec.backend.get_vocab():
            return None
        special = self.special_ids | other.special_ids
        ordinary = (i for i in range(max(self.vocab_size, other.vocab_size)) if i not in special)
        return next((i for i in ordinary if self.token_bytes(i) != other.token_bytes(i)), None)

    def encode_long_texts_elsewhere(self) -> None:
        """Encode texts above LONG_CHARS in another process from now on, if the tokenizer was read from files."""
        if self._files is not None and self._long_texts is None:
            self._long_texts = LongTexts(self._files)

    def close(self) -> None:
        """End the process that encodes long texts, if there is one. No more of these can be encoded."""
        if self._long_texts is not None:
            self._long_texts.close()

    def encode(
        self, text: str, *, add_special_tokens: bool = True, parse_special: bool = True, param: str = "prompt"
    ) -> list[int]:
        """Token ids of `text`. Other threads may run at the same time, unless the text is short.

        add_special_tokens: add BOS and EOS where the model's files say so. parse_special: special tokens written in the
        text become their ids; otherwise they are ordinary text.
        Raises RequestError(param) for a lone surrogate, which is not a character, and for a text that takes too much
        time or memory.
        """
        check_characters(text, param)
        reach("text.encode")
        if self._long_texts is not None and len(text) > LONG_CHARS:
            ids = self._long_texts.encode(text, parse_special=parse_special, param=param)
        else:
            with failures_as(
                lambda reason: RequestError(f"the tokenizer cannot encode this text: {reason}", param=param)
            ):
                ids = self._encode_here(text, parse_special)
        return [*self._spec.prefix_ids, *ids, *self._spec.suffix_ids] if add_special_tokens else ids

    def _encode_here(self, text: str, parse_special: bool) -> list[int]:
        backend = self._backend if parse_special else self._plain_backend
        if len(text) <= _QUICK_CHARS:
            return backend.encode(text, add_special_tokens=False).ids
        # unlike `encode`, it releases the interpreter lock, and it takes 0.6 of the time
        return backend.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def least_tokens(self, text: str) -> int:
        """A lower bound of the text's tokens, from its length alone."""
        return 0 if self._longest_chars is None else len(text) // self._longest_chars

    def most_chars(self, num_tokens: int) -> int:
        """The maximum number of characters that can become `num_tokens` tokens; 0 if the vocabulary sets no limit."""
        return 0 if self._longest_chars is None else num_tokens * self._longest_chars

    def without_middle(self, text: str, num_tokens: int) -> str:
        """A text that is encoded to the same first `num_tokens` and last `num_tokens` tokens, and to more than that:
        for a text of which no more are needed. It is cut where tokens are as long as those that `least_tokens` assumes.
        """
        if self._longest_chars is None:
            return text
        kept = num_tokens * self._longest_chars + _MARGIN_CHARS
        return text if len(text) <= 2 * kept else text[:kept] + text[-kept:]

    def encode_middle(self, prefix: str | list[int], suffix: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a prompt for the text between `prefix` and `suffix`. Special tokens in the two are text.

        Raises RequestError for a model without tokens for it, and for a lone surrogate."""
        if self.fim is None:
            raise RequestError(
                "suffix is not supported: this model has no tokens for filling in the middle: leave it out",
                param="suffix",
            )
        check_characters(suffix, "suffix")
        if isinstance(prefix, str):
            prefix = self.encode(prefix, add_special_tokens=False, parse_special=False)
        ids = self.fim.arrange(prefix, self._encode_continuation(suffix))
        return [*self._spec.prefix_ids, *ids] if add_special_tokens else ids

    def _encode_continuation(self, text: str) -> list[int]:
        """Token ids of a text that follows another, so that no space is put before it."""
        if not self.strips_leading_space:
            return self.encode(text, add_special_tokens=False, parse_special=False)
        # https://github.com/meta-llama/codellama/blob/e81b597e44dbecc2a0dedb9949fdf84adfc22395/llama/tokenizer.py
        mark, ids = (self.encode(part, add_special_tokens=False, parse_special=False) for part in (APART, APART + text))
        is_apart = ids[: len(mark)] == mark
        return ids[len(mark) :] if is_apart else self.encode(text, add_special_tokens=False, parse_special=False)

    def cut(self, ids: list[int], num_tokens: int, *, keeps_end: bool, has_special_tokens: bool = False) -> list[int]:
        """At most `num_tokens` of a text's ids: the last ones, or the first ones.

        has_special_tokens: `encode` has added BOS and EOS, which stay."""
        if len(ids) <= num_tokens:
            return ids
        head, tail = (self._spec.prefix_ids, self._spec.suffix_ids) if has_special_tokens else ((), ())
        inner = ids[len(head) : len(ids) - len(tail)]
        room = max(num_tokens - len(head) - len(tail), 0)
        kept = inner[len(inner) - room :] if keeps_end else inner[:room]
        return [*head, *kept, *tail][:num_tokens]

    def encode_chat(self, text: str) -> list[int]:
        """Token ids of a rendered chat. Nothing is added: the template itself writes BOS if the model needs it."""
        return self.encode(text, add_special_tokens=False, param="messages")

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True, is_continuation: bool = False) -> str:
        """The text of `ids`: their bytes, decoded as UTF-8, with U+FFFD for invalid bytes.

        is_continuation: the ids follow others, so a leading space is part of the text. Otherwise it is removed if
        encoding adds one (`strips_leading_space`).
        """
        skipped = self.special_ids if skip_special_tokens else frozenset()
        kept = (self.token_bytes(token_id) for token_id in ids if token_id not in skipped)
        text = b"".join(kept).decode(errors="replace")
        return text.removeprefix(" ") if self.strips_leading_space and not is_continuation else text

    def token_bytes(self, token_id: int) -> bytes:
        """The exact bytes of a token, which may be part of a character; empty for an id without a token.

        Such ids can be sampled, since embedding tables are often padded to more rows than there are tokens.
        """
        if token_id not in self._bytes:
            text = self._backend.id_to_token(token_id) if 0 <= token_id < self.vocab_size else None
            text = self._spec.doubled.get(token_id, text)
            is_added = token_id in self._added_ids
            self._bytes[token_id] = b"" if text is None else self._spec.to_bytes(text, is_added)
        return self._bytes[token_id]

    def token_text(self, token_id: int) -> str:
        """A token's bytes as readable text: U+FFFD stands for an incomplete character."""
        return self.token_bytes(token_id).decode(errors="replace")


def _longest_chars(backend: tokenizers.Tokenizer, vocabulary: dict[str, int]) -> int | None:
    """The most characters of a text that become one token; None if there is no limit.

    A token of a byte-level vocabulary has a character for each byte, and others have one for each character."""
    model, normalizer = backend.model, backend.normalizer
    has_unknown = getattr(model, "unk_token", None) is not None and not getattr(model, "byte_fallback", False)
    if has_unknown or not vocabulary:  # the unknown token can stand for any number of characters
        return None
    longest = max(map(len, vocabulary))
    if normalizer is None:
        return longest
    state = json.loads(normalizer.__getstate__())
    kinds = {step["type"] for step in state.get("normalizers", [state])}
    return longest if kinds <= {"Replace", "Prepend"} else longest * _SHRINKING


def make_plain_backend(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """A copy that encodes special tokens as ordinary text. It shares the model; only the added tokens are copied."""
    twin = tokenizers.Tokenizer(backend.model)
    if backend.normalizer is not None:
        twin.normalizer = backend.normalizer
    if backend.pre_tokenizer is not None:
        twin.pre_tokenizer = backend.pre_tokenizer
    added = backend.get_added_tokens_decoder()
    twin.add_tokens([added[token_id] for token_id in sorted(added)])  # ids are assigned in this order
    twin.encode_special_tokens = True
    for token_id, token in added.items():
        if twin.token_to_id(token.content) != token_id:
            raise ModelError(
                f"the tokenizer's added token {token.content!r} has the id {token_id}, which the library gives to "
                f"{twin.id_to_token(token_id)!r}: its files contradict each other"
            )
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
