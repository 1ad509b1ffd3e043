"""The table of fault points, the plans that make them fail, and what a point costs without a plan."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import timeit
from pathlib import Path

import pytest

from tests.house import PACKAGE
from tinyvllm import faults
from tinyvllm.faults import POINTS, Fault, is_poisoned, planned, reach

CALL = re.compile(r'(?:reach|is_poisoned)\("([\w.]+)"\)')


def test_every_fault_point_is_used_and_every_use_is_listed() -> None:
    called = {
        name
        for path in PACKAGE.rglob("*.py")
        if path.name != "faults.py"
        for name in CALL.findall(path.read_text(encoding="utf-8"))
    }
    assert called == set(POINTS)


def test_the_planned_occurrences_fail_and_no_others() -> None:
    with planned(Fault("engine.launch", "os", at=2, times=2)) as plan:
        reach("engine.launch")
        for _ in range(2):
            with pytest.raises(OSError, match=r"No space left on device \(planned at engine\.launch\)"):
                reach("engine.launch")
        reach("engine.launch")
        reach("engine.sample")
    reach("engine.launch")
    assert plan.reached == {"engine.launch": 4, "engine.sample": 1} and len(plan.happened) == 2


def test_each_kind_of_fault_raises_its_error() -> None:
    with planned(Fault("engine.sample", "memory"), Fault("engine.sample", "device", at=2)):
        with pytest.raises(MemoryError):
            reach("engine.sample")
        with pytest.raises(RuntimeError, match=r"planned at engine\.sample"):
            reach("engine.sample")
    with planned(Fault("engine.sample", "nan", at=2)):
        assert [is_poisoned("engine.sample") for _ in range(3)] == [False, True, False]
    assert not is_poisoned("engine.sample")


def test_a_name_that_no_table_has_is_refused() -> None:
    with pytest.raises(ValueError, match=r"names no point"), planned(Fault("engine.lunch")):
        pass
    with planned(), pytest.raises(ValueError, match=r"has no point 'engine\.lunch'"):
        reach("engine.lunch")


def test_child_processes_inherit_a_plan_and_fail_once_among_them(tmp_path: Path) -> None:
    code = "from tinyvllm.faults import reach; reach('engine.launch'); print('alive')"
    environment = {**os.environ, **faults.environment(tmp_path, Fault("engine.launch", "exit"))}
    runs = [subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True) for _ in range(2)]
    assert [run.returncode for run in runs] == [-signal.SIGKILL, 0] and runs[1].stdout == b"alive\n"
    assert [path.name for path in tmp_path.iterdir()] == ["engine.launch exit 1"]


def test_without_a_plan_a_point_costs_little_more_than_a_call() -> None:
    """A generous limit, since other processes may want the core: it is about 30 ns on a quiet one."""
    each_s = min(timeit.repeat('reach("engine.launch")', globals={"reach": reach}, number=20_000, repeat=5)) / 20_000
    assert each_s < 2e-6
