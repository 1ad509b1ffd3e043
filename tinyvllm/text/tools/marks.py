"""Find marks in a text that arrives character by character."""

from __future__ import annotations


class MarkFinder:
    """Finds the first of some marks. Owns the characters that may be the start of one. No proper suffix of a mark may
    be a prefix of one, and no mark the beginning of another."""

    def __init__(self, *marks: str) -> None:
        suffixes = {mark[start:] for mark in marks for start in range(1, len(mark))}
        assert not any(mark.startswith(suffix) for mark in marks for suffix in suffixes), marks
        self._marks = marks
        self.held = ""

    def read(self, character: str) -> tuple[str, bool]:
        """(text that cannot be part of a mark any more, whether a mark is complete)."""
        held = self.held + character
        if held in self._marks:
            self.held = ""
            return "", True
        begins = (start for start in range(len(held) + 1) if any(mark.startswith(held[start:]) for mark in self._marks))
        start = next(begins)
        self.held = held[start:]
        return held[:start], False
