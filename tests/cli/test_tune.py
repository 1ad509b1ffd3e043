"""`tinyvllm tune`: a whole search on a tiny model, in its worker process."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.execution import tune_workers
from tinyvllm.cli.commands import app
from tinyvllm.cli.tune import _Progress
from tinyvllm.config import CACHE_DIR_VARIABLE, ModelFiles
from tinyvllm.execution import tune_process
from tinyvllm.execution.tune_events import Event, Job


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["tune", *arguments])


Search = Callable[..., Any]  # (worker, *arguments) -> the result of `run`


@pytest.fixture
def search(tiny_gguf_files: ModelFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Search:
    """`run` of the tiny model by a worker that plays a device, and keeps its choices in a folder of the test's own."""

    def search_by(worker: object, *arguments: str) -> Any:
        monkeypatch.setenv(CACHE_DIR_VARIABLE, str(tmp_path))
        monkeypatch.setattr(tune_process, "run_worker", worker)
        return run(str(tiny_gguf_files.path), *arguments, "--log-level", "error")

    return search_by


def test_a_search_prints_the_times_of_candidates_and_counts_them(search: Search) -> None:
    """By a worker that plays a device; tests/execution/test_tune.py searches for real, in one process."""
    result = search(tune_workers.well, "--json", "-")
    assert result.exit_code == 0, result.output
    assert f"{tune_workers.NUM_CANDIDATES} candidates tried, 0 unusable; results are in " in result.stdout
    (row,) = json.loads(result.stdout.splitlines()[-1])
    expected = {"tried": tune_workers.NUM_CANDIDATES - 1, "before_s": 1.0, "best_s": 1.5, "chosen": {}}
    assert row == {"bucket": "decode 1", "kernel": "kernel", **expected}, "the first is the choice of before"
    assert "decode 1" in result.stdout and "+50.0%" in result.stdout and "unchanged" in result.stdout


def real_command(files: ModelFiles) -> list[str]:
    flags = ["--max-num-seqs", "2", "--max-num-batched-tokens", "8", "--max-model-len", "64", "--log-level", "error"]
    return [str(files.path), *flags, "--buckets", "decode 2", "--json", "-"]


def test_the_real_worker_loads_and_tries_candidates_until_it_is_done(
    tiny_gguf_files: ModelFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """About 4 s of CPU time. The path of the choices is an answer of the worker that has loaded the model."""
    monkeypatch.setenv(CACHE_DIR_VARIABLE, str(tmp_path))
    result = run(*real_command(tiny_gguf_files))
    assert result.exit_code == 0, result.output
    (path,) = (tmp_path / "tuned").iterdir()
    assert f", 0 unusable; results are in {path}" in result.stdout and "out of time" not in result.output
    rows = json.loads(result.stdout.splitlines()[-1])
    assert {row["kernel"].split()[0] for row in rows} == {"qkv", "attention_out", "gate_up", "down", "lm_head"}
    assert all(row["bucket"] == "decode 2" and row["tried"] for row in rows)
    assert f"{sum(row['tried'] for row in rows)} candidates tried" in result.stdout


@pytest.mark.sweep
def test_a_search_prints_what_it_found_and_the_next_one_finds_it_done(
    tiny_gguf_files: ModelFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CACHE_DIR_VARIABLE, str(tmp_path))
    command = real_command(tiny_gguf_files)
    result = run(*command)
    assert result.exit_code == 0, result.output
    assert "rows_per_pass" in result.stdout or "unchanged" in result.stdout
    rows = json.loads(result.stdout.splitlines()[-1])
    assert {row["bucket"] for row in rows} == {"decode 2"}
    assert all(row["tried"] and (row["best_s"] < row["before_s"]) >= bool(row["chosen"]) for row in rows)
    (path,) = (tmp_path / "tuned").iterdir()
    assert str(path) in result.stdout
    again = run(*command)
    assert again.exit_code == 0 and "0 candidates tried" in again.stdout and "searched before" in again.stdout


@pytest.mark.parametrize(
    ("worker", "said"),
    [
        (
            tune_workers.dying_early,
            f"a candidate of kernel in decode 1: it will not be tried again ({tune_workers.FATAL})",
        ),
        (tune_workers.saying_why, "nothing to tune"),
    ],
    ids=["dies", "nothing"],
)
def test_what_was_not_tried_is_said(search: Search, worker: object, said: str) -> None:
    result = search(worker)
    assert result.exit_code == 0 and said in result.output, result.output


@pytest.mark.parametrize(
    ("worker", "when"),
    [(tune_workers.out_of_time, "before the model was loaded"), (tune_workers.slow, "before the first candidate")],
)
def test_a_budget_that_was_too_small_is_said(search: Search, worker: object, when: str) -> None:
    result = search(worker)
    assert result.exit_code == 0 and "results are in" not in result.output
    assert "kernel" not in result.stdout, "nor is there an empty table"
    assert f"nothing was tried: the budget ended {when}" in result.output and "larger --budget" in result.output


@pytest.mark.parametrize(("num_events", "said"), [(0, "nothing was tried"), (2, "results so far are in /tuned.json;")])
def test_an_interrupted_search_says_where_its_results_are(
    tiny_gguf_files: ModelFiles, monkeypatch: pytest.MonkeyPatch, num_events: int, said: str
) -> None:
    events = Event("ready", path="/tuned.json"), Event("end", bucket="decode 1", kernel="down", seconds=1.0)

    def search(job: Job, budget_s: float, report: Any) -> None:
        for event in events[:num_events]:
            report(event)
        raise KeyboardInterrupt

    monkeypatch.setattr(tune_process, "tune", search)
    result = run(str(tiny_gguf_files.path), "--log-level", "error")
    assert result.exit_code == 130 and f"interrupted: {said}" in result.output


def test_a_gain_that_was_not_kept_is_no_change() -> None:
    progress = _Progress()
    end = Event("end", bucket="decode 1", kernel="down", seconds=1.0, before_s=1.0)
    progress.see(end, lambda stage, done, total: None)
    progress.see(replace(end, chosen=(("tiles", 2),), seconds=0.8), lambda stage, done, total: None)
    change, words = [next(iter(column.cells)) for column in progress.table().columns[3:]]
    assert change == "" and str(words).startswith("unchanged: the gain was too small")


def test_buckets_are_names() -> None:
    result = run("--buckets", " , ")
    assert result.exit_code == 1 and "--buckets is ' , '" in result.output


def test_a_budget_is_minutes_above_0() -> None:
    result = run("--budget", "0")
    assert result.exit_code == 1 and "--budget is 0" in result.output
