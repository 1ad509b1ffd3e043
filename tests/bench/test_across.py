"""Formats, devices and engines in one table, and attention by context."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from tests.bench.clocked import Clock, ClockedInspector, ClockedRunner
from tests.bench.fakes import make_machine
from tinyvllm.bench.across import combinations, read_rows
from tinyvllm.bench.contexts import contexts_table, measure_contexts
from tinyvllm.bench.latency import Case, LatencyWork
from tinyvllm.bench.runs import make_run
from tinyvllm.cli.commands import app
from tinyvllm.config import ModelFiles
from tinyvllm.errors import TinyvllmError
from tinyvllm.profiling.kernels import Kernel, StepProfile
from tinyvllm.scheduling.plan import StepPlan


def make_row(tok_s: float, dtype: str = "Q4_0", device: str = "CPU", test: str = "tg32 @ d128") -> dict[str, Any]:
    rates = {"tok_s": tok_s, "tok_s_std": 0.5, "step_ms_median": 1e3 / tok_s, "bytes": 1_000_000, "floor_share": 0.5}
    what = {"kind": "latency", "phase": "decode", "test": test, "model": "tiny", "dtype": dtype, "device": device}
    return {**what, **rates, "model_bytes": 2_000_000, "kernels": 9, "environment": {"load_average": 0.1}}


def test_every_format_runs_on_every_device() -> None:
    found = combinations(["a.gguf"], "smollm2-135m", ["float16", "Q4_0"], ["CPU", "CL"])
    assert [run.name for run in found] == [
        *("a.gguf on CPU", "a.gguf on CL", "smollm2-135m float16 on CPU", "smollm2-135m float16 on CL"),
        *("smollm2-135m Q4_0 on CPU", "smollm2-135m Q4_0 on CL"),
    ]
    assert found[-1].flags == ("--shape", "smollm2-135m", "--weights", "Q4_0", "--device", "CL")
    with pytest.raises(TinyvllmError, match="nothing to compare"):
        combinations([], None, [], ["CPU"])
    with pytest.raises(TinyvllmError, match="formats of a --shape"):
        combinations(["a"], None, ["Q4_0"], [])


def test_files_are_shown_case_by_case_with_ratios(tmp_path: Path) -> None:
    runs = {"ours": [make_row(50.0), make_row(400.0, test="pp128")], "theirs": [make_row(100.0, "Q8_0", "CL")]}
    for name, rows in runs.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    files = [str(tmp_path / f"{name}.json") for name in runs]
    result = CliRunner().invoke(app, ["bench", "across", *files, "--json", "-"])
    assert result.exit_code == 0, result.output
    lines = [line.split() for line in result.stdout.splitlines()]
    assert lines[1][:7] == ["tg32", "@", "d128", "tiny", "Q4_0", "CPU", "2.00"]
    assert lines[2][:4] == ["tiny", "Q8_0", "CL", "2.00"] and "2.00" in lines[2][5:]  # twice as fast as the first
    assert lines[3][0] == "pp128" or lines[4][0] == "pp128"
    assert len(json.loads(result.stdout.splitlines()[-1])) == 3
    with pytest.raises(TinyvllmError, match="has no rows of"):
        (tmp_path / "other.json").write_text("{}")
        read_rows(str(tmp_path / "other.json"))


def test_runs_are_made_one_after_another(monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], **_: Any) -> Any:
        commands.append(command)
        rows = json.dumps([make_row(50.0 * len(commands))]).encode()
        return SimpleNamespace(returncode=0 if len(commands) < 3 else 1, stdout=b"table\n" + rows + b"\n")

    monkeypatch.setattr(subprocess, "run", run)
    flags = ["bench", "across", "--shape", "smollm2-135m", "--weights", "float16,Q4_0", "--tokens", "4"]
    result = CliRunner().invoke(app, flags)
    assert result.exit_code == 0, result.output
    assert "2 of 2: smollm2-135m Q4_0" in result.stderr
    start = [sys.executable, "-P", "-m", "tinyvllm", "bench", "latency", "--shape", "smollm2-135m", "--weights"]
    assert [command[: len(start) + 1] for command in commands] == [[*start, "float16"], [*start, "Q4_0"]]
    assert "--tokens 4" in " ".join(commands[0])
    failed = CliRunner().invoke(app, flags)
    assert failed.exit_code == 1 and "smollm2-135m float16 failed with code 1" in failed.stderr


class AttentionInspector(ClockedInspector):
    """Attention takes 1 us for each token of the context, and all else 1 ms."""

    def profile(self, plan: StepPlan, *, repeats: int, warmup: int) -> StepProfile:
        seconds = {"attention": plan.entries[0].start / 1e6, "down": 1e-3}
        kernels = tuple(
            Kernel(device="CPU", layer=None, operation=name, program=name, seconds=took_s)
            for name, took_s in seconds.items()
        )
        whole_s = sum(seconds.values())
        return StepProfile("decode 1", "CPU", 1, True, kernels, whole_s, whole_s, ())


def test_attentions_share_grows_with_the_context() -> None:
    inspector = AttentionInspector(ClockedRunner(Clock()))
    work = LatencyWork((Case("decode", 1, 100), Case("decode", 1, 400)), num_decoded=1)
    rows = measure_contexts(inspector, work, lambda *stage: None)
    assert [(row.context, round(row.attention_ms, 3), round(row.attention_share, 3)) for row in rows] == [
        (100, 0.1, 0.091),
        (400, 0.4, 0.286),
    ]
    console = Console(width=120, color_system=None)
    with console.capture() as capture:
        console.print(contexts_table(make_machine(), rows))
    assert "9.1%" in capture.get() and "28.6%" in capture.get()
    assert make_run([row.as_json() for row in rows]).cases[0].name == "context 100, batch 1"


def test_contexts_of_a_real_step(tiny_hf_files: ModelFiles) -> None:
    flags = "bench contexts --context 16,40,4096 --repeats 1 --warmup 1 --log-level warning --cpu-cores 1"
    flags += " --max-num-batched-tokens 16 --json -"
    result = CliRunner().invoke(app, [*flags.split(), str(tiny_hf_files.path)])
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout.splitlines()[-1])
    assert [row["context"] for row in rows] == [16, 40]  # the model has no longer ones
    assert all(0 < row["attention_share"] < 1 and row["kind"] == "contexts" for row in rows)
    assert rows[1]["kv_bytes"] > rows[0]["kv_bytes"]
