"""Metrics of the tiers below the KV pool, with vLLM's names where it has them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from tinyvllm.engine.async_engine import StepStats

LABELS = ("model_name", "engine")

_COUNTERS = (
    (
        "vllm:external_prefix_cache_queries",
        "Prompt tokens that the KV pool did not have, looked up in host memory and on disk.",
        ("tier_queries",),
    ),
    (
        "vllm:external_prefix_cache_hits",
        "Tokens whose keys and values were copied from host memory, those from disk included.",
        ("tier_host_hits", "tier_disk_hits"),
    ),
    ("tinyvllm:kv_tier_skipped_blocks", "KV blocks not kept, because memory or disk was busy.", ("tier_skipped",)),
    (
        "tinyvllm:kv_tier_declined_lookups",
        "Prefixes in host memory or on disk that were computed, because copying would have taken longer.",
        ("tier_declined",),
    ),
    (
        "tinyvllm:kv_tier_failures",
        "Copies of KV blocks that failed, and files that could not be read or written or were damaged.",
        ("tier_failures",),
    ),
)
# name, description, the label, and by its values what is counted
_LABELED = (
    (
        "tinyvllm:kv_tier_hits",
        "Tokens whose keys and values were copied from a tier.",
        "tier",
        {"host": "tier_host_hits", "disk": "tier_disk_hits"},
    ),
    (
        "vllm:kv_offload_total_bytes",
        "Bytes of KV blocks copied between the device and host memory.",
        "transfer_type",
        {"CPU_to_GPU": "tier_load_bytes", "GPU_to_CPU": "tier_store_bytes"},
    ),
    (
        "vllm:kv_offload_total_time",
        "Seconds of these copies.",
        "transfer_type",
        {"CPU_to_GPU": "tier_load_s", "GPU_to_CPU": "tier_store_s"},
    ),
    (
        "tinyvllm:kv_disk_bytes",
        "Bytes of KV blocks read from disk and written to it.",
        "transfer_type",
        {"read": "tier_read_bytes", "write": "tier_written_bytes"},
    ),
)
_READ_S = ("tinyvllm:kv_disk_read_seconds", "Seconds that requests waited for KV blocks from disk.", "tier_read_s")
_HELD = {"host": "tier_host_held", "disk": "tier_disk_held"}


def tier_metrics(each: Sequence[tuple[tuple[str, str], StepStats]]) -> Iterator[Metric]:
    """each: of every engine the values of LABELS, and its stats."""
    for name, text, counted in (*_COUNTERS, (*_READ_S[:2], _READ_S[2:])):
        counter = CounterMetricFamily(name, text, labels=LABELS)
        for values, stats in each:
            counter.add_metric(values, sum(stats.extra.get(one, 0) for one in counted))
        yield counter
    for name, text, label, by_value in _LABELED:
        counter = CounterMetricFamily(name, text, labels=(*LABELS, label))
        for values, stats in each:
            for value, one in by_value.items():
                counter.add_metric((*values, value), stats.extra.get(one, 0))
        yield counter
    held = GaugeMetricFamily(
        "tinyvllm:kv_tier_bytes",
        "Bytes of KV blocks in a tier; on disk, of all that share the folder.",
        labels=(*LABELS, "tier"),
    )
    for values, stats in each:
        for value, one in _HELD.items():
            held.add_metric((*values, value), stats.extra.get(one, 0))
    yield held
