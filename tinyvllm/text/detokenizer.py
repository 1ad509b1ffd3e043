"""Incremental detokenization: emit only text that later tokens cannot change."""

from __future__ import annotations

import codecs

from tinyvllm.text.tokenizer import Tokenizer


class Detokenizer:
    """The text of one sequence, piece by piece. Owns the bytes of an incomplete character: at most three.

    The results of push and flush, joined, equal `tokenizer.decode(ids, ...)` with the same settings. Each push takes
    time proportional to its own token. By default the sequence continues a prompt, so a leading space is kept.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True, *, is_continuation: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._strips_space = tokenizer.strips_leading_space and not is_continuation

    def push(self, token_id: int) -> str:
        """Text that is now final; empty while a character is incomplete."""
        if token_id in self._skipped:
            return ""
        return self._strip(self._decoder.decode(self._tokenizer.token_bytes(token_id)))

    def flush(self) -> str:
        """The rest, when no more tokens follow: U+FFFD for an incomplete character."""
        return self._strip(self._decoder.decode(b"", final=True))

    def _strip(self, text: str) -> str:
        if self._strips_space and text:
            self._strips_space = False
            return text.removeprefix(" ")
        return text
