"""The engine's status line in the log, in vLLM's format."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING

from tinyvllm.engine.async_engine import StepStats

if TYPE_CHECKING:
    from tinyvllm.engine.async_engine import AsyncEngine
    from tinyvllm.server.metrics import Metrics

log = logging.getLogger(__name__)


async def log_status(engine: AsyncEngine, metrics: Metrics, interval_s: float) -> None:
    """Log the engine's status every `interval_s` seconds, except while it is idle. Runs until it is canceled."""
    reporter = StatusReporter(engine, metrics)
    while True:
        await asyncio.sleep(interval_s)
        line = reporter.line()
        if line is not None:
            log.info(line)
        drafts = reporter.drafts()
        if drafts is not None:
            log.info(drafts)


class StatusReporter:
    """Builds status lines, with rates measured since the previous one."""

    def __init__(self, engine: AsyncEngine, metrics: Metrics) -> None:
        self._engine = engine
        self._metrics = metrics
        self._was_active = False
        self._last_s = time.monotonic()
        self._num_prompt = self._num_output = 0
        self._queries = self._hits = 0
        self._hit_rate = 0.0
        self._tier_queries = self._tier_hits = 0.0
        self._tier_rate = 0.0
        self._drafts_s, self._drafts = self._last_s, StepStats()  # when `drafts` was last asked, and the stats then

    def line(self) -> str | None:
        """The next status line, or None while the engine loads or stays idle. The first idle line is returned."""
        if not self._engine.is_ready:
            return None
        now_s, totals, stats = time.monotonic(), self._metrics.totals, self._engine.stats()
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
        num_engines = self._engine.num_engines
        usage = 1.0 - stats.num_free_blocks / (num_engines * (self._engine.capacity.num_blocks - 1))  # 0 is for padding
        name = "Engine 000" if num_engines == 1 else f"{num_engines} Engines Aggregated"  # as vLLM says
        return (
            f"{name}: Avg prompt throughput: {prompt_rate:.1f} tokens/s, "
            f"Avg generation throughput: {output_rate:.1f} tokens/s, "
            f"Running: {stats.num_running} reqs, Waiting: {stats.num_waiting} reqs, "
            f"GPU KV cache usage: {100 * usage:.1f}%, Prefix cache hit rate: {100 * self._hit_rate:.1f}%"
            f"{self._tiers(stats)}"
        )

    def _tiers(self, stats: StepStats) -> str:
        """The hit rate of the tiers below the pool since the previous line, as vLLM says it; "" without tiers."""
        if not self._engine.config.has_kv_tiers:
            return ""
        queries, hits = (stats.extra.get(name, 0) for name in ("tier_queries", "tier_host_hits"))
        hits += stats.extra.get("tier_disk_hits", 0)
        if queries > self._tier_queries:
            self._tier_rate = (hits - self._tier_hits) / (queries - self._tier_queries)
        self._tier_queries, self._tier_hits = queries, hits
        return f", External prefix cache hit rate: {100 * self._tier_rate:.1f}%"

    def drafts(self) -> str | None:
        """What became of the drafts since the previous call; None without any. As vLLM says it."""
        if not self._engine.is_ready:
            return None
        now_s, stats, before = time.monotonic(), self._engine.stats(), self._drafts
        passed_s = now_s - self._drafts_s
        self._drafts_s, self._drafts = now_s, stats
        num_drafts = stats.num_drafts - before.num_drafts
        if num_drafts <= 0:
            return None
        drafted = stats.num_draft_tokens - before.num_draft_tokens
        accepted = stats.num_accepted_tokens - before.num_accepted_tokens
        speculative = self._engine.config.speculative_config
        most = 0 if speculative is None else speculative.num_drafts
        pairs = zip(stats.accepted_per_position[:most], before.accepted_per_position[:most], strict=True)
        rates = ", ".join(f"{(count - earlier) / num_drafts:.3f}" for count, earlier in pairs)
        return (
            f"SpecDecoding metrics: Mean acceptance length: {1 + accepted / num_drafts:.2f}, "
            f"Accepted throughput: {accepted / passed_s:.2f} tokens/s, "
            f"Drafted throughput: {drafted / passed_s:.2f} tokens/s, "
            f"Accepted: {accepted} tokens, Drafted: {drafted} tokens, "
            f"Per-position acceptance rate: {rates}, "
            f"Avg Draft acceptance rate: {100 * accepted / drafted:.1f}%"
        )
