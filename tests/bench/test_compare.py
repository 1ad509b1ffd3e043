"""A regression in time exceeds both the limit and the noise; runs of different work are not compared."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.bench.fakes import make_machine
from tinyvllm.bench.compare import compare, notes, parse_share, regressions
from tinyvllm.bench.counts import GUARDED
from tinyvllm.bench.rows import Row
from tinyvllm.bench.runs import make_run as parse_run
from tinyvllm.bench.runs import read_run
from tinyvllm.bench.spread import Spread
from tinyvllm.cli.commands import app
from tinyvllm.errors import TinyvllmError


def spread(mean: float, std: float, count: int = 5) -> dict[str, float]:
    return {"mean": mean, "std": std, "count": count}


def make_run(wall_s: float = 1.0, std_s: float = 0.01, **counts: Any) -> dict[str, Any]:
    """One case of a breakdown's JSON, with the fields that are compared."""
    step = dict.fromkeys(GUARDED, 4) | {"sampling_kernels": 3, "details": []} | counts
    stage = {"count": 5, "total_s": 5 * wall_s, "mean_s": wall_s, "std_s": std_s}
    case = {
        "name": "512 ids, batch 1",
        "prompt_tokens": 512,
        "output_tokens": 32,
        "plain_wall_s": spread(wall_s, std_s),
        "ttft_s": spread(wall_s / 2, std_s),
        "tpot_s": spread(wall_s / 64, std_s / 64),
        "stages": {"decode": stage},
        "per_step": {"decode": step},
    }
    environment = {"commit": "abc", "date": "2026-01-01", "load_average": 0.1}
    same = {"kind": "breakdown", "model": "tiny", "dtype": "Q4_0", "device": "CPU", "prefix_caching": False}
    return {**same, "vocab_size": 1000, "cases": [case], "environment": environment}


@pytest.mark.parametrize(
    ("after", "is_worse"),
    [
        (make_run(1.0), False),
        (make_run(1.04), False),  # above the noise, within the limit
        (make_run(1.10), True),
        (make_run(1.10, std_s=0.2), False),  # above the limit, within the noise
        (make_run(0.5), False),
    ],
)
def test_slower_counts_beyond_the_limit_and_beyond_chance(after: dict[str, Any], is_worse: bool) -> None:
    found = regressions(compare(make_run(), after, 0.05))
    assert bool(found) == is_worse
    assert all("slower by" in line or "decode grew by" in line for line in found)


def test_counts_are_judged_without_a_limit_and_without_times() -> None:
    assert regressions(compare(make_run(), make_run(9.0, syncs=4), 0.05, counts_only=True)) == []
    (line,) = regressions(compare(make_run(), make_run(syncs=5), 0.05))
    assert "extra synchronization: syncs of a decode step rose from 4 to 5" in line


def test_logits_on_their_way_to_the_host_are_named() -> None:
    (line,) = regressions(compare(make_run(), make_run(bytes_d2h=2004), 0.05))
    assert "host copy of the logits" in line
    lines = regressions(compare(make_run(), make_run(bytes_d2h=2004, sampling_kernels=0), 0.05))
    assert any("sampler on the CPU: bytes_d2h" in line for line in lines)


@pytest.mark.parametrize(("text", "share"), [("5%", 0.05), ("0.1", 0.1), ("0 %", 0.0), ("12.5%", 0.125)])
def test_share_is_read_as_percent_or_number(text: str, share: float) -> None:
    assert parse_share(text) == pytest.approx(share)


def test_new_work_outside_the_graph_and_new_kernels_are_named() -> None:
    before, after = make_run(), make_run(eager_kernels=5, kernels=6, details=["copy on CPU x 1"])
    before["cases"][0]["kernels"] = [{"label": "down", "dispatches": 30}]
    after["cases"][0]["kernels"] = [{"label": "down", "dispatches": 31}, {"label": "unfuse", "dispatches": 1}]
    found = regressions(compare(before, after, 0.05, counts_only=True))
    assert any("eager_kernels of a decode step rose from 4 to 5 (copy on CPU x 1)" in line for line in found)
    assert any("kernels of a decode step rose from 4 to 6 (down 30 to 31; new: unfuse x 1)" in line for line in found)


def test_count_that_only_later_runs_know_is_guarded_from_then_on() -> None:
    old, new, more = make_run(), make_run(fences=40), make_run(fences=41, barriers=5)
    assert regressions(compare(old, new, 0.05)) == []
    barriers, fences = regressions(compare(new, more, 0.05))
    assert "extra barrier: barriers of a decode step rose from 4 to 5" in barriers
    assert "more fences: fences of a decode step rose from 40 to 41" in fences


def make_start(first_token_s: float, *, num_compiled: int = 0) -> dict[str, Any]:
    start = {"import_s": 1.0, "load_s": 2.0, "schedule_s": 1.0, "compile_s": 0.0, "capture_s": 1.0}
    whole = {"first_token_s": first_token_s, "all_graphs_s": first_token_s + 1}
    return {**start, **whole, "num_kept": 8 - num_compiled, "num_compiled": num_compiled, "buckets": []}


def test_start_has_a_limit_of_its_own() -> None:
    before = make_start(4.0)
    assert regressions(compare(before, make_start(4.6), 0.05)) == []
    first, all_graphs = regressions(compare(before, make_start(40.0), 0.05))
    assert "cold start: first_token is slower by 900.0%, from 4,000.000 to 40,000.000 ms" in first
    assert "all_graphs" in all_graphs
    with pytest.raises(TinyvllmError, match="programs from the cache"):  # compiling takes longer than reading
        compare(before, make_start(40.0, num_compiled=8), 0.05)


def make_rows(benchmark: str, step_ms: float) -> list[dict[str, Any]]:
    """The JSON of `bench latency` or `bench throughput`, by their own code."""
    spread = Spread.of([step_ms, step_ms])
    row = Row(
        test="tg32 @ d128",
        phase="decode" if benchmark == "latency" else benchmark,
        batch=1,
        context=128,
        num_tokens=32,
        machine=make_machine(),
        tok_s=Spread.of([1e3 / step_ms] * 2),
        step_ms=spread,
        kernels=15,
        more={} if benchmark == "latency" else {"ttft_ms": spread, "wall_s": spread},
    )
    return [json.loads(json.dumps(row.as_json()))]


def make_load(step_ms: float) -> list[dict[str, Any]]:
    """The JSON of `bench serve`, as far as it is compared."""
    row = {"kind": "load", "url": "http://x", "api": "chat", "model": "tiny", "rate": None, "concurrency": 4}
    times = {name: spread(step_ms, 0.1) for name in ("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms")}
    return [row | times | {"output_tok_s": 4e3 / step_ms, "requests": 8, "errors": {}, "slo_ms": None}]


def make_served(step_ms: float) -> dict[str, Any]:
    """The JSON of `bench breakdown --served`: what grows is writing each token's event to the socket."""
    rows = {"send": 0.2 + step_ms, "decode": 700.0}
    stages = {name: {"p50_ms": ms, "cpu_ms": None} for name, ms in rows.items()}
    level = {"plain": make_load(20.0)[0], "stages": stages, "delivery": {"events": 32, "send_ms": 0.1 + step_ms}}
    return {"schema": 1, "kind": "served breakdown", "model": "tiny", "api": "chat", "levels": [level]}


def make_profile(step_ms: float) -> dict[str, Any]:
    row = {"label": "down", "dispatches": 30, "total_s": step_ms / 1e3}
    step = {"bucket": "decode 1", "phase": "decode", "batch": 1, "context": 128, "model": "tiny", "device": "CPU"}
    return {
        **step,
        "step_s": step_ms / 1e3,
        "turn_s": step_ms / 1e3,
        "kernels": 30,
        "moved_bytes": 9,
        "by_operation": [row],
    }


MAKERS: dict[str, Callable[[float], Any]] = {
    "latency": lambda ms: make_rows("latency", ms),
    "throughput": lambda ms: make_rows("throughput", ms),
    "load": make_load,
    "served breakdown": make_served,
    "profile": make_profile,
}
NAMED = {
    "latency": ("tok/s is lower by 20.0%", "step is slower by 25.0%"),
    "throughput": ("tok/s is lower by 20.0%", "ttft is slower by 25.0%"),
    "load": ("output tok/s is lower by 20.0%", "ttft is slower by 25.0%"),
    "served breakdown": ("send grew by 5.000 ms a request", "every token: send grew by 5.000 ms a token"),
    "profile": ("step is slower by 25.0%", "down grew by 5.000 ms a step"),
}


@pytest.mark.parametrize("kind", MAKERS)
def test_json_of_every_benchmark_is_compared(tmp_path: Path, kind: str) -> None:
    paths = {name: tmp_path / name for name in ("before", "after")}
    for name, step_ms in (("before", 20.0), ("after", 25.0)):
        paths[name].write_text(json.dumps(MAKERS[kind](step_ms)))
    before, after = (read_run(str(path)) for path in paths.values())
    assert before.kind == kind and regressions(compare(before, before, 0.05)) == []
    found = regressions(compare(before, after, 0.05))
    for text in NAMED[kind]:
        assert any(text in line for line in found), found
    with pytest.raises(TinyvllmError, match="compare runs of one benchmark"):
        compare(before, make_run(), 0.05)


def test_damaged_json_of_a_benchmark_is_one_message(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"kind": "latency", "test": "tg32"}]))
    with pytest.raises(TinyvllmError, match=r"lacks a field of a latency .*: measure again"):
        read_run(str(path))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": "Q8_0"}, "differ in dtype, Q4_0 and Q8_0"),
        ({"params": 2}, "differ in params, 1 and 2"),
        ({"sampling": {"temperature": 0.8}}, "differ in temperature, 0.0 and 0.8"),
        ({"sampling": {"top_k": 40}}, "differ in top_k, 0 and 40"),
        ({"prefix_caching": True}, "differ in prefix_caching"),
        ({"environment": {"cores": 64}}, "from different machines .cores: 2 and 64.*--counts-only"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_runs_that_are_not_alike_are_refused(change: dict[str, Any], reason: str) -> None:
    alike = {"params": 1, "sampling": {"temperature": 0.0, "top_p": 1.0, "top_k": 0}, "environment": {"cores": 2}}
    with pytest.raises(TinyvllmError, match=reason):
        compare(make_run() | alike, make_run() | alike | change, 0.05)


def test_other_differences_are_named(tmp_path: Path) -> None:
    before, after = make_run(), make_run()
    before["settings"], after["settings"] = {"kv_cache_dtype": "float16"}, {"kv_cache_dtype": "float32"}
    after["cases"].append(copy.deepcopy(after["cases"][0]) | {"name": "new"})
    assert notes(parse_run(before), parse_run(after)) == [
        "the runs differ in kv_cache_dtype: float16 before, float32 after",
        "new is not compared: the earlier run lacks it",
    ]


def test_different_work_is_refused() -> None:
    other = make_run()
    other["device"] = "CUDA"
    with pytest.raises(TinyvllmError, match="differ in device, CPU and CUDA: compare runs with the same device"):
        compare(make_run(), other, 0.05)
    longer = copy.deepcopy(make_run())
    longer["cases"][0]["prompt_tokens"] = 1024
    with pytest.raises(TinyvllmError, match="1024 \\+ 32 tokens"):
        compare(make_run(), longer, 0.05)


@pytest.mark.parametrize(("text", "reason"), [("{", "is not JSON"), ("[1]", "is not the JSON of a benchmark")])
def test_other_files_are_refused(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "rows.json"
    path.write_text(text)
    with pytest.raises(TinyvllmError, match=reason):
        read_run(str(path))


def test_command_prints_both_and_exits_by_the_judgment(tmp_path: Path) -> None:
    paths = {name: tmp_path / f"{name}.json" for name in ("before", "same", "worse")}
    for name, run in (("before", make_run()), ("same", make_run(1.01)), ("worse", make_run(kernels=5))):
        paths[name].write_text(json.dumps(run))
    same = CliRunner().invoke(app, ["bench", "compare", str(paths["before"]), str(paths["same"])])
    assert same.exit_code == 0 and "no regression" in same.stdout and "1,000.000 ms" in same.stdout
    worse = CliRunner().invoke(app, ["bench", "compare", str(paths["before"]), str(paths["worse"])])
    assert worse.exit_code == 1 and "more kernels: kernels of a decode step rose from 4 to 5" in worse.stderr
