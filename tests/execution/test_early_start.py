"""The compiling processes begin before tinygrad is imported, where they are certain to be needed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tinyvllm.config import CACHE_DIR_VARIABLE, EngineConfig
from tinyvllm.execution import early_start
from tinyvllm.execution.early_start import begin_early

CONFIG = EngineConfig("tiny")


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    begun: list[str] = []
    monkeypatch.setattr(early_start, "prepare_early", lambda initialize, function, is_cpu: begun.append(function))
    monkeypatch.setenv(CACHE_DIR_VARIABLE, str(tmp_path))
    monkeypatch.setenv("DEV", "CPU")
    monkeypatch.setenv("PARALLEL", "2")
    return begun


def test_they_begin_if_no_step_is_kept(begun: list[str], tmp_path: Path) -> None:
    begin_early(CONFIG, 30)
    other = tmp_path / "programs" / "CUDA-0"
    other.mkdir(parents=True)
    (other / "step-0").touch()
    begin_early(CONFIG, 30)
    assert len(begun) == 2, "another device's steps are none"
    own = tmp_path / "programs" / "CPU-0"
    own.mkdir()
    (own / "program-0").touch()
    begin_early(CONFIG, 30)
    assert len(begun) == 3, "programs alone spare no trace"
    (own / "step-0").touch()
    begin_early(CONFIG, 30)
    assert len(begun) == 3
    begin_early(replace(CONFIG, compile_cache=False), 30)
    assert len(begun) == 4, "what is kept is not read"


def test_they_do_not_begin_where_this_process_is_as_fast(begun: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    begin_early(CONFIG, 2)
    begin_early(replace(CONFIG, capture="tinyjit"), 30)
    monkeypatch.setenv("PARALLEL", "1")
    begin_early(CONFIG, 30)
    assert begun == []
