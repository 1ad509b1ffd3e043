"""GET /metrics: Prometheus text under vLLM's names, so that its dashboards work.

What requests show is counted here as their deltas pass; what the engine knows is read when somebody scrapes. Each app
has a registry of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Iterable, Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from tinyvllm.engine.async_engine import AsyncEngine
    from tinyvllm.engine.output import Delta

LABELS = ("model_name", "engine")

# Seconds; vLLM's own buckets (vllm/v1/metrics/loggers.py), so that histograms of both can be laid over each other.
# fmt: off
TTFT_BUCKETS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0,
    640.0, 2560.0,
)
ITL_BUCKETS = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)
E2E_BUCKETS = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
)
# fmt: on

FINISH_REASONS = ("stop", "length", "abort", "error")


class Metrics:
    """Owns one app's registry."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._registry = CollectorRegistry()
        values = (engine.served_model_name, "0")  # of LABELS; there is one engine in a process
        self._registry.register(_EngineCollector(engine, values))

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, text, LABELS, buckets=buckets, registry=self._registry).labels(*values)

        def counter(name: str, text: str) -> Counter:
            return Counter(name, text, LABELS, registry=self._registry).labels(*values)

        self._prompt_tokens = counter("vllm:prompt_tokens", "Prompt tokens processed.")
        self._generation_tokens = counter("vllm:generation_tokens", "Tokens generated.")
        finished = Counter(
            "vllm:request_success", "Finished choices.", (*LABELS, "finished_reason"), registry=self._registry
        )
        self._finished = {reason: finished.labels(*values, reason) for reason in FINISH_REASONS}
        self._ttft_s = histogram("vllm:time_to_first_token_seconds", "From arrival to first token.", TTFT_BUCKETS)
        self._itl_s = histogram("vllm:inter_token_latency_seconds", "Between tokens of a choice.", ITL_BUCKETS)
        self._e2e_s = histogram("vllm:e2e_request_latency_seconds", "From arrival to the last token.", E2E_BUCKETS)

    def render(self) -> bytes:
        return generate_latest(self._registry)

    async def observed(
        self, deltas: AsyncGenerator[Delta, None], *, arrival_s: float, n: int
    ) -> AsyncGenerator[Delta, None]:
        """The same deltas, counted; closing it closes them. arrival_s: perf_counter() when the request came."""
        last_s: dict[int, float] = {}  # choice -> when its last token came
        num_tokens: dict[int, int] = {}
        num_open = n
        try:
            async with contextlib.aclosing(deltas):
                async for delta in deltas:
                    now_s = time.perf_counter()
                    if not num_tokens:
                        self._prompt_tokens.inc(delta.num_prompt_tokens)
                    num_new = delta.num_output_tokens - num_tokens.get(delta.index, 0)
                    num_tokens[delta.index] = delta.num_output_tokens
                    if num_new > 0:
                        self._count_tokens(num_new, now_s, arrival_s, last_s.get(delta.index))
                        last_s[delta.index] = now_s
                    if delta.finish_reason is not None:
                        self._finished[delta.finish_reason].inc()
                        self._e2e_s.observe(now_s - arrival_s)
                        num_open -= 1
                    yield delta
        except (GeneratorExit, asyncio.CancelledError):  # the client left
            self._finished["abort"].inc(num_open)
            raise

    def _count_tokens(self, num_new: int, now_s: float, arrival_s: float, last_s: float | None) -> None:
        self._generation_tokens.inc(num_new)
        if last_s is None:
            self._ttft_s.observe(now_s - arrival_s)
            return
        for _ in range(num_new):  # tokens that came together share the time
            self._itl_s.observe((now_s - last_s) / num_new)


class _EngineCollector(Collector):
    """The engine's own counts, read at each scrape. Nothing before it is ready."""

    def __init__(self, engine: AsyncEngine, values: tuple[str, ...]) -> None:
        self._engine = engine
        self._values = values

    def describe(self) -> Iterable[Metric]:
        return ()  # registration must not ask an engine that is still loading

    def collect(self) -> Iterator[Metric]:
        if not self._engine.is_ready:
            return
        stats = self._engine.stats()
        num_blocks = self._engine.capacity.num_blocks - 1  # block 0 is a dummy
        usage = 1.0 - stats.num_free_blocks / num_blocks
        gauges = (
            ("vllm:num_requests_running", "Requests in the running batch.", stats.num_running),
            ("vllm:num_requests_waiting", "Requests in the queue.", stats.num_waiting),
            ("vllm:kv_cache_usage_perc", "Share of KV blocks in use: 1 is all.", usage),
        )
        counters = (
            ("vllm:num_preemptions", "Requests set back to the queue for lack of blocks.", stats.num_preemptions),
            ("vllm:prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", stats.prefix_queries),
            ("vllm:prefix_cache_hits", "Prompt tokens found in the prefix cache.", stats.prefix_hits),
            ("tinyvllm:graph_captures", "Graphs captured since start: constant while serving.", stats.num_captures),
        )
        for name, text, value in gauges:
            gauge = GaugeMetricFamily(name, text, labels=LABELS)
            gauge.add_metric(self._values, value)
            yield gauge
        for name, text, value in counters:
            counter = CounterMetricFamily(name, text, labels=LABELS)
            counter.add_metric(self._values, value)
            yield counter
