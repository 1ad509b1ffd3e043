"""The compiling processes begin before tinygrad is imported, where they are certain to be needed."""

from __future__ import annotations

import builtins
import os
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from tinygrad import helpers

from tinyvllm.config import CACHE_DIR_VARIABLE, EngineConfig
from tinyvllm.device import environment
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
    monkeypatch.delenv("PARALLEL")
    monkeypatch.setenv("NUM_CPU_THREADS", "1")
    begin_early(CONFIG, 30)
    assert begun == []


def test_they_begin_before_the_large_imports() -> None:
    program = "import sys, tinyvllm.execution.early_start; print({'numpy', 'tinygrad'} & sys.modules.keys())"
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert process.stdout == "set()\n"


@pytest.mark.parametrize(
    ("settings", "quota", "expected"),
    [
        ({}, "max 100000", len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        ({}, "100000 100000", 1),
        ({}, "50000 100000", 1),
        ({}, "750000 100000", 7),
        ({"PYTEST_XDIST_WORKER_COUNT": "2"}, "700000 100000", 3),
        ({"NUM_CPU_THREADS": "1"}, "700000 100000", 1),
        ({"VIZ": "1"}, "700000 100000", 0),
        ({"VIZ": "1", "PARALLEL": "3"}, "700000 100000", 3),
    ],
)
def test_the_number_of_processes_is_tinygrads(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, settings: dict[str, str], quota: str, expected: int
) -> None:
    """Its module is run again, with these settings."""
    for name in ("PARALLEL", "NUM_CPU_THREADS", "VIZ", "PYTEST_XDIST_WORKER_COUNT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    file = tmp_path / "cpu.max"
    file.write_text(quota)
    monkeypatch.setattr(environment, "CGROUP_QUOTA", file)
    opened, path = builtins.open, "/sys/fs/cgroup/cpu.max"
    monkeypatch.setattr(builtins, "open", lambda name, *more, **by: opened(file if name == path else name, *more, **by))
    if sys.version_info >= (3, 13) and "NUM_CPU_THREADS" not in settings:  # which ask the system, whatever the quota
        expected = environment.num_processes()
    assert environment.num_processes() == runpy.run_path(helpers.__file__)["PARALLEL"].value == expected
