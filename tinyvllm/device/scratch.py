"""Shared memory for the intermediate values of all steps, since steps never run at the same time."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from tinygrad import dtypes
from tinygrad.device import Buffer

from tinyvllm.device.memory_plan import aligned
from tinyvllm.device.recording import Call, RecordedStep, view_of
from tinyvllm.faults import reach


class Scratch:
    """Owns one arena per device (per core of a CPU), which every step placed in it overwrites.

    Place the largest step first: a larger one gets a new arena, while earlier steps keep the old one.
    """

    def __init__(self) -> None:
        self._arenas: dict[str, Buffer] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of the current arenas."""
        return sum(arena.nbytes for arena in self._arenas.values())

    def place(self, first: RecordedStep, *later: RecordedStep) -> list[RecordedStep]:
        """Move these steps from memory of their own to the arenas. The later ones do not overwrite what `first` keeps,
        and may read it; everything else shares the same memory."""
        places: dict[int, tuple[str, int]] = {}
        kept_ends: dict[str, int] = {}
        _append(first.kept, places, kept_ends)
        sizes = dict(kept_ends)
        for step in (first, *later):
            ends = dict(kept_ends)
            _append(_scratch_of(step), places, ends)
            sizes |= {device: max(end, sizes.get(device, 0)) for device, end in ends.items()}
        for device, size in sizes.items():
            if device not in self._arenas or self._arenas[device].nbytes < size:
                reach("device.allocate")
                self._arenas[device] = Buffer(device, size, dtypes.uint8).allocate()
        return [self._moved(step, places) for step in (first, *later)]

    def _moved(self, step: RecordedStep, places: dict[int, tuple[str, int]]) -> RecordedStep:
        def move(buffer: Buffer) -> Buffer:
            place = places.get(id(buffer.base))
            if place is None:
                return buffer
            device, start = place
            return view_of(self._arenas[device], start + buffer.offset, buffer.size, buffer.dtype)

        return replace(
            step,
            calls=tuple(Call(call.target, tuple(map(move, call.buffers))) for call in step.calls),
            borrowed=tuple(map(move, step.borrowed)),
            kept=tuple(move(base).ensure_allocated() for base in step.kept),  # which the host reads
        )


def own_bytes(*steps: RecordedStep) -> int:
    """Bytes of the intermediate values of steps with memory of their own."""
    return sum(base.nbytes for base in {id(base): base for step in steps for base in _scratch_of(step)}.values())


def _scratch_of(step: RecordedStep) -> Iterable[Buffer]:
    """The step's own memory, except its output."""
    others = {id(base) for base in (*step.borrowed, step.output.uop.base.buffer.base)}
    bases = {id(buffer.base): buffer.base for call in step.calls for buffer in call.buffers}
    return [base for key, base in bases.items() if key not in others]


def _append(bases: Iterable[Buffer], places: dict[int, tuple[str, int]], ends: dict[str, int]) -> None:
    """Give each buffer without a place the one at its device's end, and move the end."""
    for base in bases:
        if id(base) not in places:
            start = ends.get(base.device, 0)
            places[id(base)] = base.device, start
            ends[base.device] = start + aligned(base.nbytes)
