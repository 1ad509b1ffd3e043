"""An engine's stats in memory that other processes map: written at every step, read without asking the engine."""

from __future__ import annotations

import mmap
import struct
from dataclasses import fields
from itertools import islice
from pathlib import Path
from typing import Any

from tinyvllm.config import MAX_SPECULATIVE_TOKENS
from tinyvllm.engine.core import COUNTERS
from tinyvllm.scheduling.plan import STEP_SIZES, StepStats
from tinyvllm.scheduling.tiers import COUNTS as TIER_COUNTS

_COUNTERS = (*COUNTERS, *TIER_COUNTS)
_SEQUENCES = {"step_sizes": len(STEP_SIZES) + 1, "accepted_per_position": MAX_SPECULATIVE_TOKENS}  # name: numbers
_NUMBERS = tuple(one.name for one in fields(StepStats) if one.name not in (*_SEQUENCES, "extra"))
# float64 counts exactly up to 2**53
_ROW = struct.Struct(f"={len(_NUMBERS) + sum(_SEQUENCES.values()) + len(_COUNTERS)}d")
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
        counters = [stats.extra.get(name, 0) for name in _COUNTERS]
        _ROW.pack_into(self._memory, 0, *numbers, *stats.step_sizes, *stats.accepted_per_position, *counters)

    def read(self) -> StepStats:
        values = iter(_ROW.unpack_from(self._memory, 0))
        numbers = [int(value) if whole else value for whole, value in zip(_WHOLE, values, strict=False)]
        named: dict[str, Any] = dict(zip(_NUMBERS, numbers, strict=True))
        named |= {name: tuple(map(int, islice(values, count))) for name, count in _SEQUENCES.items()}
        return StepStats(**named, extra=dict(zip(_COUNTERS, values, strict=True)))
