"""Whether the figures that a verdict uses agree: those that should be equal, and parts with their whole.

On a busy machine, each figure is measured beside other work. A verdict from such figures would name a false cause, so
it is withheld, and the figures that disagree are named instead.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

LIMIT = 0.25  # by which two figures may differ, as a share of the smaller
SLACK_S = 5e-5  # this difference is always allowed: clocks and calls


@dataclass(frozen=True)
class Figure:
    """A time in seconds, and what it is, such as "the step as served"."""

    name: str
    seconds: float

    def __str__(self) -> str:
        return f"{self.name} {self.seconds * 1e3:,.3f} ms"


@dataclass(frozen=True)
class Disagreement:
    """Two figures that should be equal, or of which the first should be at most the second."""

    one: Figure
    other: Figure

    def __str__(self) -> str:
        change = self.other.seconds / self.one.seconds - 1 if self.one.seconds else 0.0
        return f"{self.one}, {self.other} ({change:+.0%})"

    def as_json(self) -> dict[str, object]:
        return {
            "one": self.one.name,
            "one_s": self.one.seconds,
            "other": self.other.name,
            "other_s": self.other.seconds,
        }


def must_equal(one: Figure, other: Figure) -> Disagreement | None:
    """None if the figures are equal within LIMIT."""
    return Disagreement(one, other) if max(_excess(one, other), _excess(other, one)) > 0 else None


def must_fit(part: Figure, whole: Figure) -> Disagreement | None:
    """None if the part is at most as long as the whole, within LIMIT."""
    return Disagreement(whole, part) if _excess(part, whole) > 0 else None


def found(checks: Iterable[Disagreement | None]) -> tuple[Disagreement, ...]:
    return tuple(check for check in checks if check is not None)


def _excess(one: Figure, other: Figure) -> float:
    """Seconds by which the first is longer than the second allows."""
    return one.seconds - (other.seconds + max(SLACK_S, LIMIT * other.seconds))
