"""The engine's latest steps, for the page, the metrics and the watchdog."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tinyvllm.engine.async_engine import StepStats

NUM_STEPS = 120  # how many are kept


@dataclass(frozen=True)
class CompletedStep:
    """A step that has ended, and when."""

    number: int  # counted from the engine's start
    end_s: float  # monotonic clock
    stats: StepStats


class StepHistory:
    """Owns the latest steps. Written on the engine's thread, read on the server's event loop."""

    def __init__(self) -> None:
        self.observe_tokens: Callable[[float], None] = lambda num_tokens: None
        self._steps: deque[CompletedStep] = deque(maxlen=NUM_STEPS)
        self._number = 0.0

    def add(self, stats: StepStats) -> None:
        """Record the step that `stats` reports. Does nothing if that step has been added: a turn may end no step."""
        number = stats.extra.get("num_steps", self._number + 1)
        if number == self._number:
            return
        self._number = number
        self._steps.append(CompletedStep(number=int(number), end_s=time.monotonic(), stats=stats))
        self.observe_tokens(stats.num_tokens)

    def latest(self) -> list[CompletedStep]:
        """The steps, oldest first. A copy, made by one C call, which no other thread can interrupt."""
        return list(self._steps)

    @property
    def last_end_s(self) -> float:
        """When the latest step ended, on the monotonic clock; 0 before the first."""
        try:
            return self._steps[-1].end_s
        except IndexError:
            return 0.0
