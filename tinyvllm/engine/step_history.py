"""The engine's latest steps, for the page and for people who look for a slow one."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass

from tinyvllm.scheduling.plan import StepStats

NUM_STEPS = 120  # how many are kept


@dataclass(frozen=True)
class CompletedStep:
    """A step that has ended, and when."""

    number: int  # counted from the engine's start
    end_s: float  # monotonic clock
    stats: StepStats


class StepHistory:
    """Owns the latest steps. Used on the step loop's thread only."""

    def __init__(self) -> None:
        self._steps: deque[CompletedStep] = deque(maxlen=NUM_STEPS)
        self._number = 0.0

    def add(self, stats: StepStats) -> None:
        """Record the step that `stats` reports. Does nothing if that step has been added: a turn may end no step."""
        number = stats.extra.get("num_steps", self._number + 1)
        if number == self._number:
            return
        self._number = number
        self._steps.append(CompletedStep(number=int(number), end_s=stats.end_s or time.monotonic(), stats=stats))

    def latest(self) -> list[CompletedStep]:
        """The steps, oldest first."""
        return list(self._steps)
