"""Find marks in a text that arrives character by character."""

from __future__ import annotations


class MarkFinder:
    """Finds a mark. Owns the characters that may be its start. No proper suffix of a mark may be a prefix of it."""

    def __init__(self, mark: str) -> None:
        assert all(not mark.startswith(mark[start:]) for start in range(1, len(mark))), mark
        self._mark = mark
        self.held = ""

    def read(self, character: str) -> tuple[str, bool]:
        """(text that cannot be part of the mark any more, whether the mark is complete)."""
        held = self.held + character
        if held == self._mark:
            self.held = ""
            return "", True
        start = next(start for start in range(len(held) + 1) if self._mark.startswith(held[start:]))
        self.held = held[start:]
        return held[:start], False
