"""Stop strings in a text that comes in pieces."""

from __future__ import annotations


class StopChecker:
    """Finds the first stop string to be completed; of several completed by one character, the longest.

    The answer is the same however the text is cut into pieces. Owns the text that it holds back: the longest suffix
    that begins a stop string, and no more. Each stop string is matched by Knuth, Morris and Pratt's automaton (SIAM
    J. Comput. 6, 1977), so a character costs amortised constant time a stop string, however long they are.
    """

    def __init__(self, stop: tuple[str, ...], include: bool) -> None:
        """include: the stop string itself belongs to the text."""
        self._stop = sorted(stop, key=len, reverse=True)
        self._fallbacks = [make_fallbacks(pattern) for pattern in self._stop]
        self._matched = [0] * len(stop)  # characters of each stop string that the text now ends with
        self._include = include
        self._held = ""
        self._found: str | None = None

    def push(self, text: str) -> tuple[str, str | None]:
        """(text that is safe to emit, the stop string that was found or None). After a find nothing more comes out."""
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
        """The text that was held back, once no more follows."""
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


def make_fallbacks(pattern: str) -> list[int]:
    """For each length: that of the longest proper suffix of pattern[:length] that is a prefix of pattern too."""
    fallbacks = [0, 0]
    for character in pattern[1:]:
        length = fallbacks[-1]
        while length and pattern[length] != character:
            length = fallbacks[length]
        fallbacks.append(length + (pattern[length] == character))
    return fallbacks
