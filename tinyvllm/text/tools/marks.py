"""Marks in a text that comes character by character."""

from __future__ import annotations


class MarkFinder:
    """Finds a mark. Owns the characters that may begin it. A mark must not contain its own beginning again."""

    def __init__(self, mark: str) -> None:
        assert all(not mark.startswith(mark[start:]) for start in range(1, len(mark))), mark
        self._mark = mark
        self.held = ""

    def read(self, character: str) -> tuple[str, bool]:
        """(text that cannot belong to the mark any more, whether the mark was completed)."""
        held = self.held + character
        if held == self._mark:
            self.held = ""
            return "", True
        start = next(start for start in range(len(held) + 1) if self._mark.startswith(held[start:]))
        self.held = held[start:]
        return held[:start], False
