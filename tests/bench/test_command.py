"""`tinyvllm bench` on a tiny model: what it prints, and where its rows go."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from tests.builders import write_tiny_hf_llama
from tinyvllm.cli.commands import app
from tinyvllm.config import ModelFiles

QUICK = "--repeats 1 --log-level warning"


def run(flags: str, *arguments: str) -> Any:
    """`flags` are split at spaces, `arguments` are not."""
    return CliRunner().invoke(app, ["bench", *flags.split(), *arguments])


def test_every_flag_has_a_help_text() -> None:
    group: Any = get_command(app)
    for name, command in group.commands["bench"].commands.items():
        assert command.help, name
        for parameter in command.params:
            assert parameter.help, f"{name}: {parameter.name}"


def test_latency_prints_a_table_and_writes_rows(tiny_hf_files: ModelFiles, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    flags = "--prefill 8 --batch 1 --context 16 --tokens 2 --bandwidth 10 --max-num-batched-tokens 8"
    result = run(f"latency {flags} {QUICK}", str(tiny_hf_files.path), "--json", str(path))
    assert result.exit_code == 0, result.output
    assert "pp8" in result.stdout and "tg2 @ d16" in result.stdout
    assert "…" not in result.stdout  # nothing is truncated, though 120 columns are too few
    rows = json.loads(path.read_text(encoding="utf-8"))
    assert [(row["phase"], row["batch"], row["context"]) for row in rows] == [("prefill", 1, 0), ("decode", 1, 16)]
    assert [row["bandwidth_gbps"] for row in rows] == [10, 10]
    assert [row["floor_ms"] for row in rows] == pytest.approx([row["bytes"] / 1e7 for row in rows])


@pytest.mark.sweep  # by default, both captures' kernels and tokens: tests/engine/test_capture.py
def test_latency_compares_our_replay_with_tinyjit(tmp_path: Path) -> None:
    files = write_tiny_hf_llama(tmp_path / "tiny", layers=1)  # tinygrad's scheduler takes its time for each layer
    flags = "--prefill none --batch 1 --context 16 --tokens 2 --bandwidth 10 --max-num-batched-tokens 8"
    result = run(f"latency {flags} {QUICK} --compare-capture --json -", str(files.path))
    assert result.exit_code == 0, result.output
    assert "replay gains" in result.stdout and result.stdout.count("tg2 @ d16") == 1 + 2  # a line, two rows
    rows = json.loads(result.stdout.splitlines()[-1])
    assert [(row["capture"], row["phase"]) for row in rows] == [("replay", "decode"), ("tinyjit", "decode")]
    assert rows[0]["kernels"] == rows[1]["kernels"]


def test_throughputs_last_line_is_json(tiny_hf_files: ModelFiles) -> None:
    flags = "--num-prompts 2 --input-len 8 --output-len 3 --max-num-seqs 1 --max-num-batched-tokens 8"
    result = run(f"throughput {flags} {QUICK} --json - --markdown", str(tiny_hf_files.path))
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("| model |")
    (row,) = json.loads(result.stdout.splitlines()[-1])
    assert (row["phase"], row["requests"], row["input_len"], row["output_len"]) == ("throughput", 2, 8, 3)


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ("latency --batch one", "--batch has 'one'"),
        ("latency --prefill 4xlong", "--prefill has 'long'"),
        ("latency --prefill none --batch none", "nothing to measure"),
        ("latency model --shape llama-3.2-1b", "both a model"),
        ("latency --layers 2", "--layers"),
        ("latency --weights Q4_0", "--weights Q4_0"),
        ("latency --shape llama-9", "known: smollm2-135m"),
        ("latency --shape smollm2-135m --weights int3", "int3"),
        ("throughput --num-prompts 0", "--num-prompts"),
    ],
)
def test_bad_flag_is_one_line(flags: str, text: str) -> None:
    result = run(f"{flags} {QUICK}")
    assert result.exit_code == 1 and text in result.stderr and "Traceback" not in result.stderr
