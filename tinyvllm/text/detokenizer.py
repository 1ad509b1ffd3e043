"""Incremental detokenization: emit only text that later tokens cannot change."""

from __future__ import annotations

import codecs
from collections.abc import Iterable

from tinyvllm.faults import reach
from tinyvllm.text.tokenizer import Tokenizer

# Precedes the text of each special token if the output's reader has to tell `<|end|>` the token from the same
# characters as ordinary text. A noncharacter of Unicode, which becomes U+FFFD in ordinary text.
SPECIAL_MARK = "\ufdd0"


class Detokenizer:
    """The text of one sequence, piece by piece. Owns the bytes of an incomplete character: at most three.

    The results of push and flush, joined, equal `tokenizer.decode(ids, ...)` with the same settings. Each push takes
    time proportional to its own token. By default the sequence continues a prompt, so a leading space is kept.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        skip_special_tokens: bool = True,
        *,
        mark_special_tokens: bool = False,
        is_continuation: bool = True,
    ) -> None:
        """mark_special_tokens: SPECIAL_MARK precedes those that are not skipped."""
        self._tokenizer = tokenizer
        self._marked = tokenizer.special_ids if mark_special_tokens else frozenset()
        self._marks = mark_special_tokens
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._strips_space = tokenizer.strips_leading_space and not is_continuation

    def push(self, token_id: int) -> str:
        """Text that is now final; empty while a character is incomplete."""
        reach("text.detokenize")
        if token_id in self._skipped:
            return ""
        data = self._tokenizer.token_bytes(token_id)
        if token_id in self._marked:
            return self._strip(self._decoder.decode(SPECIAL_MARK.encode() + data))
        text = self._decoder.decode(data)
        return self._strip(text.replace(SPECIAL_MARK, "\ufffd") if self._marks else text)

    def flush(self) -> str:
        """The rest, when no more tokens follow: U+FFFD for an incomplete character."""
        return self._strip(self._decoder.decode(b"", final=True))

    def _strip(self, text: str) -> str:
        if self._strips_space and text:
            self._strips_space = False
            return text.removeprefix(" ")
        return text


def detokenize(
    tokenizer: Tokenizer, ids: Iterable[int], *, skip_special_tokens: bool, mark_special_tokens: bool
) -> str:
    """The text of ids that continue a prompt."""
    detokenizer = Detokenizer(tokenizer, skip_special_tokens, mark_special_tokens=mark_special_tokens)
    return "".join(map(detokenizer.push, ids)) + detokenizer.flush()
