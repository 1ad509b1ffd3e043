"""A regression in time exceeds both the limit and the noise; runs of different work are not compared."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tinyvllm.bench.compare import compare, parse_share, read_breakdown, regressions
from tinyvllm.bench.counts import GUARDED
from tinyvllm.cli import app
from tinyvllm.errors import TinyvllmError


def spread(mean: float, std: float, count: int = 5) -> dict[str, float]:
    return {"mean": mean, "std": std, "count": count}


def make_run(wall_s: float = 1.0, std_s: float = 0.01, **counts: int) -> dict[str, Any]:
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
    assert all("slower by" in line for line in found)


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


def test_different_work_is_refused() -> None:
    other = make_run()
    other["device"] = "CUDA"
    with pytest.raises(TinyvllmError, match="differ in device, CPU and CUDA: compare runs with the same device"):
        compare(make_run(), other, 0.05)
    longer = copy.deepcopy(make_run())
    longer["cases"][0]["prompt_tokens"] = 1024
    with pytest.raises(TinyvllmError, match="1024 \\+ 32 tokens"):
        compare(make_run(), longer, 0.05)


@pytest.mark.parametrize(("text", "reason"), [("{", "is not JSON"), ("[1]", "is not a breakdown")])
def test_other_files_are_refused(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "rows.json"
    path.write_text(text)
    with pytest.raises(TinyvllmError, match=reason):
        read_breakdown(str(path))


def test_command_prints_both_and_exits_by_the_judgment(tmp_path: Path) -> None:
    paths = {name: tmp_path / f"{name}.json" for name in ("before", "same", "worse")}
    for name, run in (("before", make_run()), ("same", make_run(1.01)), ("worse", make_run(kernels=5))):
        paths[name].write_text(json.dumps(run))
    same = CliRunner().invoke(app, ["bench", "compare", str(paths["before"]), str(paths["same"])])
    assert same.exit_code == 0 and "no regression" in same.stdout and "1,000.000 ms" in same.stdout
    worse = CliRunner().invoke(app, ["bench", "compare", str(paths["before"]), str(paths["worse"])])
    assert worse.exit_code == 1 and "more kernels: kernels of a decode step rose from 4 to 5" in worse.stderr
