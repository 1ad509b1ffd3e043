"""--profile and --trace show the recording at the end, separate from the answer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.fakes import make_terminal
from tinyvllm.profiling import measure


def test_a_profile_is_printed_beside_the_answer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    terminal = make_terminal(monkeypatch, tmp_path, reply="abc")
    result = terminal.run("generate", "--prompt", "x", "--profile", "--trace", str(trace))
    assert result.exit_code == 0 and result.stdout == "abc\n"
    assert "recorded" in result.stderr
    assert json.loads(trace.read_text(encoding="utf-8"))["displayTimeUnit"] == "ms"
    assert not measure.is_on()


def test_nothing_is_recorded_unless_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse() -> None:
        raise AssertionError("measuring was started")

    monkeypatch.setattr(measure, "start", refuse)
    assert make_terminal(monkeypatch, tmp_path, reply="abc").run("generate", "--prompt", "x").exit_code == 0


def test_a_trace_that_cannot_be_written_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    terminal = make_terminal(monkeypatch, tmp_path, reply="abc")
    result = terminal.run("generate", "--prompt", "x", "--trace", str(tmp_path / "no" / "trace.json"))
    assert result.exit_code == 1 and "cannot be written" in result.stderr and not measure.is_on()
