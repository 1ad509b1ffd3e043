"""`tinyvllm tune`: a whole search on a tiny model, in its worker process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tinyvllm.cli.commands import app
from tinyvllm.config import CACHE_DIR_VARIABLE, ModelFiles


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["tune", *arguments])


def test_a_search_prints_what_it_found_and_the_next_one_finds_it_done(
    tiny_gguf_files: ModelFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CACHE_DIR_VARIABLE, str(tmp_path))
    flags = ["--max-num-seqs", "2", "--max-num-batched-tokens", "8", "--max-model-len", "64", "--log-level", "error"]
    command = [str(tiny_gguf_files.path), *flags, "--buckets", "decode 2", "--json", "-"]
    result = run(*command)
    assert result.exit_code == 0, result.output
    assert "rows_per_pass" in result.stdout or "unchanged" in result.stdout
    rows = json.loads(result.stdout.splitlines()[-1])
    assert {row["bucket"] for row in rows} == {"decode 2"}
    assert all(row["tried"] and (row["best_s"] < row["before_s"]) >= bool(row["chosen"]) for row in rows)
    (path,) = (tmp_path / "tuned").iterdir()
    assert str(path) in result.stdout
    again = run(*command)
    assert again.exit_code == 0 and "0 candidates tried" in again.stdout


def test_a_budget_is_minutes_above_0() -> None:
    result = run("--budget", "0")
    assert result.exit_code == 1 and "--budget is 0" in result.output
