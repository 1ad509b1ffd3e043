"""Find stop strings in a text that arrives in pieces."""

from __future__ import annotations

import functools
from collections.abc import Sequence


class StopChecker:
    """Finds the first stop string to be completed; if one character completes several, the longest.

    The result does not depend on how the text is split. Owns the text that it holds back: the longest suffix that could
    be the start of a stop string. Each stop string is matched by the Knuth-Morris-Pratt automaton (SIAM J. Comput. 6,
    1977), so each character costs amortized constant time per stop string, whatever its length.
    """

    def __init__(self, stop: tuple[str, ...], include: bool) -> None:
        """include: the stop string is part of the text."""
        self._stop = sorted(stop, key=len, reverse=True)
        self._fallbacks = [make_fallbacks(pattern) for pattern in self._stop]
        self._matched = [0] * len(stop)  # how many characters of each stop string the text ends with
        self._include = include
        self._held = ""
        self._found: str | None = None

    def push(self, text: str) -> tuple[str, str | None]:
        """(text that is safe to emit, the stop string found, or None). After a match, no more text is emitted."""
        if self._found is not None or not self._stop:
            return ("" if self._found is not None else text), self._found
        start = len(self._held)
        buffer = self._held + text
        for index in range(start, len(buffer)):
            for which, pattern in enumerate(self._stop):
                if self._advance(which, buffer[index]) == len(pattern):
                    return self._finish(buffer[: index + 1], pattern)
        safe = len(buffer) - max(self._matched)
        self._held = buffer[safe:]
        return buffer[:safe], None

    def flush(self) -> str:
        """The text that was held back, when no more follows."""
        held, self._held = self._held, ""
        return held

    def _advance(self, which: int, character: str) -> int:
        pattern, fallbacks, matched = self._stop[which], self._fallbacks[which], self._matched[which]
        while matched and pattern[matched] != character:
            matched = fallbacks[matched]
        self._matched[which] = matched + (pattern[matched] == character)
        return self._matched[which]

    def _finish(self, text: str, pattern: str) -> tuple[str, str]:
        self._found, self._held = pattern, ""
        return (text if self._include else text[: -len(pattern)]), pattern


@functools.lru_cache(maxsize=64)  # the choices of a request have the same stop strings
def make_fallbacks(pattern: str) -> Sequence[int]:
    """For each length, the length of the longest proper suffix of pattern[:length] that is also a prefix of it."""
    fallbacks = [0, 0]
    for character in pattern[1:]:
        length = fallbacks[-1]
        while length and pattern[length] != character:
            length = fallbacks[length]
        fallbacks.append(length + (pattern[length] == character))
    return fallbacks
