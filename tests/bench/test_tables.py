"""Rows as JSON and as tables."""

from __future__ import annotations

import json

from rich.console import Console, RenderableType

from tests.bench.fakes import FakeRunner, make_machine
from tinyvllm.bench.latency import Case, LatencyWork, measure_latency
from tinyvllm.bench.rows import Row
from tinyvllm.bench.spread import Spread
from tinyvllm.bench.tables import latency_table, markdown_table, throughput_table
from tinyvllm.bench.throughput import ThroughputWork, measure_throughput


def make_row(bandwidth_gbps: float | None = 0.002) -> Row:
    return Row(
        test="tg32 @ d128",
        phase="decode",
        batch=1,
        context=128,
        num_tokens=32,
        machine=make_machine(bandwidth_gbps),
        tok_s=Spread.of([99.0, 101.0]),
        step_ms=Spread.of([10.0, 10.0, 13.0]),
        bucket="decode 1",
        kernels=15,
        nbytes=10_000,
        weight_bytes=9_000,
        kv_read_bytes=900,
        kv_written_bytes=100,
        moved_bytes=10_400,
    )


def render(table: RenderableType) -> str:
    console = Console(width=140, color_system=None)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_json_has_the_fields_that_are_promised() -> None:
    row = json.loads(json.dumps(make_row().as_json()))
    assert {
        *("phase", "batch", "context", "tok_s", "step_ms_median", "step_ms_std", "kernels", "bytes", "bytes_ratio"),
        *("floor_ms", "device", "model", "dtype", "environment", "tok_s_std", "step_ms_mean", "step_ms_min"),
        *("step_ms_p95", "step_ms_p99", "repeats", "steps", "floor_share", "bandwidth_gbps", "test"),
    } <= set(row)
    assert (row["tok_s"], row["step_ms_median"], row["kernels"], row["bytes"]) == (100.0, 10.0, 15, 10_000)
    assert (row["floor_ms"], row["floor_share"]) == (5.0, 0.5)
    assert row["bytes_ratio"] == 1.04


def test_spreads_of_one_benchmark_are_objects_in_json() -> None:
    work = ThroughputWork(num_requests=2, input_len=4, output_len=3, num_repeats=1)
    row = measure_throughput(FakeRunner(), make_machine(None), work, lambda stage, done, total: None).as_json()
    assert set(row["ttft_ms"]) == {"count", "mean", "std", "median", "min", "p95", "p99"}
    assert row["floor_ms"] is None and row["bytes"] is None and row["bytes_ratio"] is None


def test_markdown_has_llama_benchs_columns() -> None:
    head, rule, line = markdown_table([make_row()]).splitlines()
    assert head == "| model | size | params | backend | test | t/s |"
    assert rule.count("|") == head.count("|")
    assert line == "| tiny Q4_0 | 3.00 MiB | 2.00 M | CPU | tg32 @ d128 | 100.00 ± 1.41 |"


def test_table_shows_the_share_of_the_floor() -> None:
    text = render(latency_table([make_row()]))
    assert "tg32 @ d128" in text and "50%" in text and "1.04 x" in text and "100.0 ± 1.41" in text


def test_table_without_a_bandwidth_has_no_floor() -> None:
    assert "%" not in render(latency_table([make_row(None)]))


def test_tables_hold_every_row_of_a_run() -> None:
    work = LatencyWork((Case("prefill", 1, 32), Case("decode", 4, 16)), num_repeats=1)
    rows = measure_latency(FakeRunner(), make_machine(), work, lambda stage, done, total: None)
    text = render(latency_table(rows))
    assert "pp32" in text and "tg32 @ d16, batch 4" in text
    load = ThroughputWork(num_requests=2, input_len=4, output_len=3, num_repeats=1)
    row = measure_throughput(FakeRunner(), make_machine(None), load, lambda stage, done, total: None)
    assert "time to first token" in render(throughput_table(row))
