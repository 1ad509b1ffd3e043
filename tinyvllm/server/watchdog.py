"""Notices an engine whose step does not end."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tinyvllm.engine.async_engine import AsyncEngine


class Watchdog:
    """Knows since when each engine has had work. Whoever submitted it: every front-end watches the same stats."""

    def __init__(self, engine: AsyncEngine, limit_s: float | None) -> None:
        """limit_s: the longest time that a step may take; None: any."""
        self._engine = engine
        self._limit_s = limit_s
        self._busy_since_s: dict[int, float] = {}  # monotonic clock: when an engine was first seen with work

    def observe(self) -> None:
        """Look at the engines. Called often, so that an engine that was idle for long does not seem to stall."""
        now_s = time.monotonic()
        for engine, stats in enumerate(self._engine.engine_stats()):
            if stats.num_running or stats.num_waiting:
                self._busy_since_s.setdefault(engine, now_s)
            else:
                self._busy_since_s.pop(engine, None)

    @property
    def stalled_s(self) -> float | None:
        """The longest time for which an engine has had work without completing a step; None while it is allowed."""
        if self._limit_s is None:
            return None
        self.observe()
        now_s, stats = time.monotonic(), self._engine.engine_stats()
        waits_s = [now_s - max(stats[engine].end_s, since_s) for engine, since_s in self._busy_since_s.items()]
        longest_s = max(waits_s, default=0.0)
        return longest_s if longest_s > self._limit_s else None
