"""Which operations of a model run in their general form because no fused kernel covers them.

The rule is the same for every operation: if a fused kernel gives a reason why it does not cover a call,
`Coverage.take_general` logs and counts it, and the general form runs. So nothing is refused that the general form can
do, and nothing is slow without a message.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

logger = logging.getLogger(__name__)

Note = tuple[str, str, int | None]  # what takes the general form, why, and its layer


class Coverage:
    """Owns the list of the operations in the general form."""

    def __init__(self) -> None:
        self._layers: dict[str, set[int]] = {}  # layers by message; an empty set: the whole model
        self._watched: list[Note] | None = None

    def take_general(self, what: str, reason: str, layer: int | None = None) -> None:
        """Log and count that `what` takes the general kernel. Does nothing if `reason` is empty."""
        if not reason:
            return
        if self._watched is not None:
            self._watched.append((what, reason, layer))
        text = f"{what} with {reason} takes the general kernel"
        is_new = text not in self._layers
        layers = self._layers.setdefault(text, set())
        if layer is not None:
            layers.add(layer)
        if is_new:
            logger.warning(
                "%s%s; `tinyvllm doctor` lists the layers", "" if layer is None else f"layer {layer}: ", text
            )

    @contextmanager
    def watching(self) -> Iterator[list[Note]]:
        """The list of what is noted in this block. A saved step keeps it, because restoring it runs no operations."""
        notes: list[Note] = []
        self._watched = notes
        try:
            yield notes
        finally:
            self._watched = None

    def restore(self, notes: Iterable[Note]) -> None:
        """Note again what was noted when a step was traced."""
        for what, reason, layer in notes:
            self.take_general(what, reason, layer)

    @property
    def count(self) -> int:
        """Operations of all layers in the general form."""
        return sum(max(1, len(layers)) for layers in self._layers.values())

    def lines(self) -> list[str]:
        """ "layers 0-4, 6: attention with a window takes the general kernel", one line for each reason."""
        return [f"{_spans(layers)}{text}" for text, layers in self._layers.items()]

    def __repr__(self) -> str:
        return "Coverage()"  # always the same, because the name of a stored graph includes it


def in_words(names: Sequence[str]) -> str:
    """ "a, b and c"."""
    return " and ".join(part for part in (", ".join(names[:-1]), *names[-1:]) if part)


def _spans(layers: set[int]) -> str:
    if not layers:
        return ""
    spans = [str(first) if first == last else f"{first}-{last}" for first, last in _intervals(sorted(layers))]
    return f"layer{'s' if len(layers) > 1 else ''} {', '.join(spans)}: "


def _intervals(numbers: list[int]) -> Iterator[tuple[int, int]]:
    """(first, last) of each interval of consecutive numbers."""
    first = last = numbers[0]
    for number in numbers[1:]:
        if number != last + 1:
            yield first, last
            first = number
        last = number
    yield first, last
