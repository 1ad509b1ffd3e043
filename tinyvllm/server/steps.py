"""What the engine's latest steps cost, for the page and the log, and the log's line on the engine."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tinyvllm.engine.async_engine import AsyncEngine, StepStats
    from tinyvllm.server.metrics import Metrics

log = logging.getLogger(__name__)

NUM_STEPS = 120  # kept


@dataclass(frozen=True)
class Step:
    """One step that has ended."""

    number: int  # since start
    end_s: float  # monotonic clock
    stats: StepStats


class StepHistory:
    """The latest steps. Written on the engine's thread, read on the server's event loop."""

    def __init__(self) -> None:
        self.observe_tokens: Callable[[float], None] = lambda num_tokens: None
        self._steps: deque[Step] = deque(maxlen=NUM_STEPS)
        self._number = 0.0

    def add(self, stats: StepStats) -> None:
        """`stats` after a turn of the engine's loop, which may not have ended a step."""
        number = stats.extra.get("num_steps", self._number + 1)
        if number == self._number:
            return
        self._number = number
        self._steps.append(Step(int(number), time.monotonic(), stats))
        self.observe_tokens(stats.num_tokens)

    def latest(self) -> list[Step]:
        """Oldest first. A copy, made in one call of C, which no other thread interrupts."""
        return list(self._steps)

    @property
    def last_end_s(self) -> float:
        """When the latest step ended, on the monotonic clock; 0 before the first."""
        try:
            return self._steps[-1].end_s
        except IndexError:
            return 0.0


async def log_status(engine: AsyncEngine, metrics: Metrics, interval_s: float) -> None:
    """One line every `interval_s` on what the engine does, in vLLM's words; none while it does nothing."""
    reporter = StatusReporter(engine, metrics)
    while True:
        await asyncio.sleep(interval_s)
        line = reporter.line()
        if line is not None:
            log.info(line)


class StatusReporter:
    """Makes the log's line on the engine from what has changed since the last."""

    def __init__(self, engine: AsyncEngine, metrics: Metrics) -> None:
        self._engine = engine
        self._totals = metrics.totals
        self._was_active = False
        self._last_s = time.monotonic()
        self._num_prompt = self._num_output = 0
        self._queries = self._hits = 0
        self._hit_rate = 0.0

    def line(self) -> str | None:
        """None when nothing has happened since two lines ago."""
        if not self._engine.is_ready:
            return None
        now_s, totals, stats = time.monotonic(), self._totals, self._engine.stats()
        num_prompt = totals.num_prompt_tokens - totals.num_cached_tokens
        prompt_rate = (num_prompt - self._num_prompt) / (now_s - self._last_s)
        output_rate = (totals.num_output_tokens - self._num_output) / (now_s - self._last_s)
        if stats.prefix_queries > self._queries:
            self._hit_rate = (stats.prefix_hits - self._hits) / (stats.prefix_queries - self._queries)
        self._last_s, self._num_prompt, self._num_output = now_s, num_prompt, totals.num_output_tokens
        self._queries, self._hits = stats.prefix_queries, stats.prefix_hits
        is_active = bool(prompt_rate or output_rate or stats.num_running or stats.num_waiting)
        if not is_active and not self._was_active:
            return None
        self._was_active = is_active
        usage = 1.0 - stats.num_free_blocks / (self._engine.capacity.num_blocks - 1)  # block 0 is a dummy
        return (
            f"Engine 000: Avg prompt throughput: {prompt_rate:.1f} tokens/s, "
            f"Avg generation throughput: {output_rate:.1f} tokens/s, "
            f"Running: {stats.num_running} reqs, Waiting: {stats.num_waiting} reqs, "
            f"GPU KV cache usage: {100 * usage:.1f}%, Prefix cache hit rate: {100 * self._hit_rate:.1f}%"
        )
