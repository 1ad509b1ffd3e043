"""The engines' own metrics, with vLLM's names where it has them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from tinyvllm.engine.async_engine import STEP_SIZES, StepStats
from tinyvllm.server.memory import memory_by_kind
from tinyvllm.server.tier_metrics import tier_metrics

if TYPE_CHECKING:
    from tinyvllm.engine.async_engine import AdapterUse, AsyncEngine

LABELS = ("model_name", "engine")

Measure = tuple[str, str, Callable[[StepStats], float]]  # name, description, and the value
Each = list[tuple[tuple[str, str], StepStats]]  # the values of LABELS, and the stats, of each engine

_GAUGES: tuple[Measure, ...] = (
    ("vllm:num_requests_running", "Requests in the running batch.", lambda stats: stats.num_running),
    ("vllm:num_requests_waiting", "Requests in the queue.", lambda stats: stats.num_waiting),
    (
        "tinyvllm:graphs_to_capture",
        "Graphs still to be captured between steps. Until it is 0, steps may be slower than later.",
        lambda stats: stats.num_captures_to_come,
    ),
    (
        "tinyvllm:general_operations",
        "Operations, of all layers, in the general kernels because no fused kernel covers them.",
        lambda stats: stats.num_general_operations,
    ),
)
_COUNTERS: tuple[Measure, ...] = (
    ("vllm:num_preemptions", "Requests preempted for lack of KV blocks.", lambda stats: stats.num_preemptions),
    ("vllm:prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", lambda stats: stats.prefix_queries),
    ("vllm:prefix_cache_hits", "Prompt tokens found in the prefix cache.", lambda stats: stats.prefix_hits),
    (
        "tinyvllm:checkpoint_hits",
        "Sequences that resumed from a checkpoint of their recurrent state.",
        lambda stats: stats.num_checkpoint_hits,
    ),
    (
        "tinyvllm:checkpoint_evictions",
        "Checkpoints of recurrent states dropped for lack of slots, or with their KV blocks.",
        lambda stats: stats.num_checkpoint_evictions,
    ),
    (
        "tinyvllm:graph_captures",
        "Graphs captured since start. Constant once tinyvllm:graphs_to_capture is 0.",
        lambda stats: stats.num_captures,
    ),
    (
        "tinyvllm:failed_graph_captures",
        "Graphs that could not be captured between steps. Larger ones take their place.",
        lambda stats: stats.num_failed_captures,
    ),
    (
        "tinyvllm:computed_tokens",
        "Tokens that steps computed.",
        lambda stats: stats.extra.get("num_computed_tokens", 0),
    ),
    (
        "tinyvllm:padded_rows",
        "Padding: rows of graphs without a token.",
        lambda stats: stats.extra.get("num_padded_rows", 0),
    ),
    (
        "tinyvllm:failed_steps",
        "Steps that raised an error.",
        lambda stats: stats.extra.get("num_failed_steps", 0),
    ),
)
_DRAFT_COUNTERS: tuple[Measure, ...] = (
    ("vllm:spec_decode_num_drafts", "Drafts verified.", lambda stats: stats.num_drafts),
    ("vllm:spec_decode_num_draft_tokens", "Tokens of the drafts verified.", lambda stats: stats.num_draft_tokens),
    ("vllm:spec_decode_num_accepted_tokens", "Draft tokens accepted.", lambda stats: stats.num_accepted_tokens),
)
_SLEEP_STATES = (("awake", 1), ("weights_offloaded", 0), ("discard_all", 0))


class EngineCollector(Collector):
    """The engines' own counts, read at each scrape: a series for each engine. Empty until one is ready."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self.adapter_uses: list[list[AdapterUse]] = []  # of each engine, when it was last asked

    def describe(self) -> Iterable[Metric]:
        return ()  # registration must not ask an engine that is still loading

    def collect(self) -> Iterator[Metric]:
        if not self._engine.is_ready:
            return
        name = self._engine.served_model_name
        each = [((name, str(number)), stats) for number, stats in enumerate(self._engine.engine_stats())]
        usage = ("vllm:kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1.", self._usage)
        for name, text, value_of in (*_GAUGES, usage):
            gauge = GaugeMetricFamily(name, text, labels=LABELS)
            for values, stats in each:
                gauge.add_metric(values, value_of(stats))
            yield gauge
        for name, text, value_of in _COUNTERS:
            counter = CounterMetricFamily(name, text, labels=LABELS)
            for values, stats in each:
                counter.add_metric(values, value_of(stats))
            yield counter
        yield from self._drafts(each)
        if self._engine.config.has_kv_tiers:
            yield from tier_metrics(each)
        yield from self._labeled_gauges(each)
        yield self._step_sizes(each)
        yield self._cache_config()
        if self._engine.config.enable_lora:
            yield self._adapters()

    def _usage(self, stats: StepStats) -> float:
        return 1.0 - stats.num_free_blocks / (self._engine.capacity.num_blocks - 1)  # block 0 is for padding

    def _labeled_gauges(self, each: Each) -> Iterator[Metric]:
        """Gauges with a label more."""
        waiting = GaugeMetricFamily(
            "vllm:num_requests_waiting_by_reason", "Requests in the queue, by reason.", labels=(*LABELS, "reason")
        )
        awake = GaugeMetricFamily(
            "vllm:engine_sleep_state", "1 for the current state of the engine, else 0.", labels=(*LABELS, "sleep_state")
        )
        memory = GaugeMetricFamily("tinyvllm:memory_bytes", "Device memory by kind.", labels=(*LABELS, "kind"))
        for values, stats in each:
            for kind, num_bytes in memory_by_kind(self._engine.capacity, stats).items():
                memory.add_metric((*values, kind), num_bytes)
            for reason, value in (("capacity", stats.num_waiting), ("deferred", 0)):
                waiting.add_metric((*values, reason), value)
            for state, value in _SLEEP_STATES:
                awake.add_metric((*values, state), value)
        yield memory
        yield waiting
        yield awake

    def _drafts(self, each: Each) -> Iterator[Metric]:
        """Counters of speculative decoding; none without it, as in vLLM."""
        speculative = self._engine.config.speculative_config
        if speculative is None:
            return
        for name, text, value_of in _DRAFT_COUNTERS:
            counter = CounterMetricFamily(name, text, labels=LABELS)
            for values, stats in each:
                counter.add_metric(values, value_of(stats))
            yield counter
        by_position = CounterMetricFamily(
            "vllm:spec_decode_num_accepted_tokens_per_pos",
            "Accepted draft tokens by their position in the draft.",
            labels=(*LABELS, "position"),
        )
        for values, stats in each:
            for position, count in enumerate(stats.accepted_per_position[: speculative.num_drafts]):
                by_position.add_metric((*values, str(position)), count)
        yield by_position

    def _step_sizes(self, each: Each) -> Metric:
        """A histogram of the steps' tokens."""
        steps = HistogramMetricFamily("vllm:iteration_tokens_total", "Tokens of a step.", labels=LABELS)
        bounds = [*map(float, STEP_SIZES), "+Inf"]
        for values, stats in each:
            buckets = [(str(bound), count) for bound, count in zip(bounds, accumulate(stats.step_sizes), strict=True)]
            steps.add_metric(values, buckets, stats.extra.get("num_computed_tokens", 0))
        return steps

    def _adapters(self) -> Metric:
        """vLLM's gauge of the time, whose labels name the adapters of running and of waiting requests."""
        uses = [use for one in self.adapter_uses for use in one]
        running = dict.fromkeys(use.info.name for use in uses if use.num_running)
        waiting = dict.fromkeys(use.info.name for use in uses if use.num_waiting)
        labels = {
            "max_lora": str(self._engine.config.max_loras),
            "waiting_lora_adapters": ",".join(waiting),
            "running_lora_adapters": ",".join(running),
        }
        info = GaugeMetricFamily("vllm:lora_requests_info", "Adapters of the requests.", labels=tuple(labels))
        info.add_metric(list(labels.values()), time.time())
        return info

    def _cache_config(self) -> Metric:
        """A gauge of 1 with the settings as its labels, as in vLLM."""
        config, capacity = self._engine.config, self._engine.capacity
        labels = {
            "block_size": capacity.block_size,
            "cache_dtype": capacity.kv_cache_dtype,
            "enable_prefix_caching": config.enable_prefix_caching,
            "engine": 0,
            "gpu_memory_utilization": config.gpu_memory_utilization,
            "num_gpu_blocks": capacity.num_blocks,
            "num_gpu_blocks_override": config.num_gpu_blocks_override,
        }
        info = GaugeMetricFamily("vllm:cache_config_info", "Settings of the KV cache.", labels=tuple(labels))
        for engine in range(self._engine.num_engines):
            info.add_metric([str(value) for value in (labels | {"engine": engine}).values()], 1)
        return info
