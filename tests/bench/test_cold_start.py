"""The parts of a start: graphs that can run everything come first, and a second start uses the first one's cache."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.execution.driver import TINY
from tinyvllm.bench.cold_start import ColdStart, plans_for, start_engine
from tinyvllm.bench.subject import Subject
from tinyvllm.config import CACHE_DIR_VARIABLE, Capacity, EngineConfig, Limits, ModelFiles
from tinyvllm.execution.buckets import choose_bucket, first_buckets, least_context, make_buckets

CONFIG = TINY


def start(files: ModelFiles) -> ColdStart:
    runner, found = start_engine(Subject.of_files(files), CONFIG, lambda *stage: None, 1.0, 2.0, 0)
    assert runner.num_captures == len(runner.buckets) == len(found.buckets) == 3
    first = {bucket.name for bucket in first_buckets(runner.buckets)}
    assert {bucket.name for bucket in found.buckets[:2]} == first
    runner.close()
    return found


@pytest.mark.sweep  # by default: its parts in test_breakdown.py, and a second start in tests/execution/test_start.py
def test_a_start_by_parts(tiny_gguf_files: ModelFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_DIR_VARIABLE, str(tmp_path))
    found, again = start(tiny_gguf_files), start(tiny_gguf_files)
    for each in (found, again):
        assert 3.0 < each.first_token_s < each.total_s
        assert each.first_token_s - each.first_step_s < each.all_graphs_s < each.total_s
        assert each.as_json()["all_graphs_s"] == each.all_graphs_s
    assert found.num_kept == 0
    assert (again.num_kept, again.num_compiled) == (2 * len(again.buckets), 0)


@pytest.mark.parametrize("limits", [Limits(16, 256), Limits(256, 2048), Limits(64, 8192)], ids=str)
def test_a_plan_that_fills_a_token_bucket_runs_in_no_other(limits: Limits) -> None:
    capacity = Capacity(1000, 16, 100, limits.max_num_seqs, limits.max_num_batched_tokens)
    buckets = make_buckets(limits, EngineConfig("tiny"), lambda num_rows, verifies: (40,) * (num_rows < 8))
    for bucket in buckets:
        for plan in plans_for(bucket, capacity, least_context(bucket, buckets) - 1):
            if bucket.num_seqs * capacity.max_model_len >= bucket.num_tokens:
                assert choose_bucket(buckets, plan) == bucket, [entry.count for entry in plan.entries]
