"""Counts catch what times are too noisy to catch: the tiny model's steps do not exceed the recorded counts, and each
kind of fault is named."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.bench.planted import FAULTS, make_runner, measure, only_counts
from tests.bench.write_counts import BASELINE
from tinyvllm.bench.compare import compare, regressions
from tinyvllm.bench.counts import GUARDED
from tinyvllm.config import ModelFiles
from tinyvllm.execution.inspector import RunnerInspector
from tinyvllm.execution.runner import ModelRunner


@pytest.fixture(scope="module")
def runner(tiny_hf_files: ModelFiles) -> Iterator[ModelRunner]:
    runner = make_runner(tiny_hf_files)
    yield runner
    runner.close()


@pytest.fixture(scope="module")
def clean(runner: ModelRunner) -> dict[str, Any]:
    return measure(runner)


def test_step_asks_for_no_more_than_written_down(clean: dict[str, Any]) -> None:
    """If a change is meant to raise a count, run python -m tests.bench.write_counts."""
    baseline = json.loads(BASELINE.read_text(encoding="utf-8"))
    changes = compare(baseline, only_counts(clean), 0.0, counts_only=True)
    assert len(changes) == 4 * (len(GUARDED) + 1)  # two cases, two phases
    assert regressions(changes) == []


def test_clean_step_has_no_faults(clean: dict[str, Any]) -> None:
    assert clean["findings"] == []
    step = clean["per_step"]
    assert (step["graph_launches"], step["syncs"], step["copies_h2d"], step["copies_d2h"]) == (1, 1, 0, 1)
    assert (step["eager_kernels"], step["compilations"], step["captures"]) == (0, 0, 0)
    assert 0 < step["sampling_kernels"] < step["kernels"]
    assert step["kv_blocks"] == 4  # two sequences of 23 tokens, in blocks of 16


@pytest.mark.parametrize("name", FAULTS)
def test_planted_fault_is_called_by_its_name(runner: ModelRunner, clean: dict[str, Any], name: str) -> None:
    with FAULTS[name](runner):
        worse = measure(runner)
    found = regressions(compare(only_counts(clean), only_counts(worse), 0.0, counts_only=True))
    assert any(name in line for line in found), found
    if name != "extra synchronization":  # one more is within the limit, and only the comparison sees it
        assert name in {finding["name"] for finding in worse["findings"]}
    assert regressions(compare(only_counts(clean), only_counts(measure(runner)), 0.0, counts_only=True)) == []


@pytest.mark.parametrize("name", GUARDED)
def test_any_rise_of_a_count_is_a_regression(clean: dict[str, Any], name: str) -> None:
    worse = copy.deepcopy(clean)
    worse["cases"][0]["per_step"]["decode"][name] += 1
    assert len(regressions(compare(clean, worse, 1.0, counts_only=True))) == 1
    assert regressions(compare(worse, clean, 1.0, counts_only=True)) == []


def test_a_kernel_that_runs_twice_is_one_more_and_goes_again(runner: ModelRunner, clean: dict[str, Any]) -> None:
    with RunnerInspector(runner).repeated_kernel():
        twice = measure(runner)
    changes = [change for change in compare(clean, twice, 1.0, counts_only=True) if change.name == "kernels"]
    assert len(changes) == 4 and {change.after - change.before for change in changes} == {1}  # two cases of two phases
    assert regressions(compare(clean, measure(runner), 1.0, counts_only=True)) == []
