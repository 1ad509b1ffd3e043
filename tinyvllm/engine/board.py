"""An engine's stats in memory that other processes map: written at every step, read without asking the engine."""

from __future__ import annotations

import mmap
import struct
from dataclasses import fields
from pathlib import Path

from tinyvllm.engine.core import COUNTERS
from tinyvllm.scheduling.plan import STEP_SIZES, StepStats

_NUMBERS = tuple(one.name for one in fields(StepStats) if one.name not in ("step_sizes", "extra"))
_NUM_SIZES = len(STEP_SIZES) + 1
_ROW = struct.Struct(f"={len(_NUMBERS) + _NUM_SIZES + len(COUNTERS)}d")  # float64 counts exactly up to 2**53
_WHOLE = tuple(isinstance(getattr(StepStats(), name), int) for name in _NUMBERS)


class StatsRow:
    """One engine's stats in a file of their own. One process writes, any number read.

    A reader may find some numbers of the step before: each is right by itself, which is all that gauges need.
    """

    def __init__(self, path: Path) -> None:
        """Map the file, which is created if it is missing."""
        with open(path, "a+b") as file:
            if file.seek(0, 2) < _ROW.size:
                file.truncate(_ROW.size)
            self._memory = mmap.mmap(file.fileno(), _ROW.size)

    def write(self, stats: StepStats) -> None:
        numbers = [getattr(stats, name) for name in _NUMBERS]
        counters = [stats.extra.get(name, 0) for name in COUNTERS]
        _ROW.pack_into(self._memory, 0, *numbers, *stats.step_sizes, *counters)

    def read(self) -> StepStats:
        values = _ROW.unpack_from(self._memory, 0)
        numbers = [int(value) if whole else value for value, whole in zip(values, _WHOLE, strict=False)]
        sizes = tuple(int(value) for value in values[len(_NUMBERS) : len(_NUMBERS) + _NUM_SIZES])
        counters = dict(zip(COUNTERS, values[len(_NUMBERS) + _NUM_SIZES :], strict=True))
        return StepStats(**dict(zip(_NUMBERS, numbers, strict=True)), step_sizes=sizes, extra=counters)
