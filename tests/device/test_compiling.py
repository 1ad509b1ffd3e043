"""Kernels are compiled in other processes, once each, and a lost one is not waited for."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from tinygrad import UOp
from tinygrad.codegen import to_program_cache

from tests.ops.kernel.examples import add_one_kernel
from tests.server.test_control import is_running, wait_until_gone
from tinyvllm.device import compiling
from tinyvllm.device.compile_workers import CompileWorkers, Job, LostJobError
from tinyvllm.device.compiling import Compiler
from tinyvllm.ops.kernel.body import F32
from tinyvllm.processes import MEANINGLESS_SIGNALS, STOP_SIGNALS

pytestmark = pytest.mark.usefixtures("compiling_processes")


def kernel(size: int) -> tuple[UOp, str]:
    """Of a size of its own, so that no other test has compiled it."""
    return add_one_kernel(size)(*[UOp.placeholder((size,), F32, slot) for slot in range(2)]), "CPU"


def test_two_who_want_a_kernel_have_it_compiled_once() -> None:
    compiler, kernels = Compiler(), [kernel(size) for size in (1001, 1002, 1003)]
    with mock.patch.dict(to_program_cache, clear=True):
        assert len(compiler.begin(kernels)) == len(compiler.begin(kernels[:2])) + 1 == 3
        programs = compiler.programs(kernels)
        assert compiler.programs(kernels[:1])[kernels[0]] is programs[kernels[0]]
        assert compiler.begin(kernels) == [], "what is there is not waited for"
    assert compiler.num_compiled == 3
    assert {program.src[0].arg.name for program in programs.values()} == {one.arg.name for one, _ in kernels}


def test_a_kernel_that_fails_is_raised_to_who_waits_and_tried_again_when_asked_for_again() -> None:
    compiler = Compiler()
    with mock.patch.dict(to_program_cache, clear=True), mock.patch.object(compiling, "_get_pool", lambda: None):
        with (
            mock.patch.object(compiling, "_compile_here", side_effect=RuntimeError("no compiler")),
            pytest.raises(RuntimeError, match="no compiler"),
        ):
            compiler.programs([kernel(1004)])
        assert len(compiler.programs([kernel(1004)])) == 1


class SlowPool:
    """Its jobs never end."""

    def submit(self, function: Any, argument: Any, urgency: int = 0) -> Job:
        return Job(function, argument)


def test_a_kernel_that_is_lost_is_compiled_here(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(compiling, "_get_pool", SlowPool)
    compiler, kernels = Compiler(), [kernel(1005), kernel(1006)]
    with mock.patch.dict(to_program_cache, clear=True), caplog.at_level(logging.WARNING):
        pending = compiler.begin(kernels)
        assert not any(one.is_done for one in pending)
        monkeypatch.setattr(compiling, "LOST_S", 0.0)
        assert all(one.is_done for one in pending)
        assert len(compiler.programs(kernels)) == 2
    assert caplog.text.count("a compiling process lost kernel") == 2


def test_kernels_of_a_dead_process_are_compiled_here_at_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As after a signal to the whole process group, or the OOM killer's."""
    pool = CompileWorkers(1, f"{__name__}:stop")
    monkeypatch.setattr(compiling, "_get_pool", lambda: pool)
    compiler, kernels = Compiler(), [kernel(1007), kernel(1008)]
    with mock.patch.dict(to_program_cache, clear=True), caplog.at_level(logging.WARNING):
        pending = compiler.begin(kernels)
        pid = wait_for_stop(pool)
        start_s = time.monotonic()
        pool.terminate()  # the second kernel is not begun in another process
        wait_until_gone([pid])
        assert all(one.is_done for one in pending) and len(compiler.programs(kernels)) == 2
        assert time.monotonic() - start_s < 5
    assert caplog.text.count("a compiling process lost kernel") == 2


# ---- The processes ----


def stop() -> None:
    """A process that never begins its job."""
    os.kill(os.getpid(), signal.SIGSTOP)


def begin() -> None:
    """Nothing to prepare."""


def wait_for_stop(pool: CompileWorkers) -> int:
    """The id of the only process, once it has stopped."""
    while not pool.pids() or Path(f"/proc/{pool.pids()[0]}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        time.sleep(0.01)
    return pool.pids()[0]


@pytest.fixture
def pool() -> Iterator[CompileWorkers]:
    pool = CompileWorkers(2, f"{__name__}:begin")
    yield pool
    pool.terminate()
    assert pool.pids() == []


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_jobs_end_with_their_value_their_error_or_their_process(pool: CompileWorkers) -> None:
    jobs = [pool.submit(int, text) for text in ("1", "x", "2")]
    assert jobs[0].result(20) == 1 and jobs[2].result(20) == 2
    with pytest.raises(ValueError, match="'x'"):
        jobs[1].result(20)
    for pid in pool.pids():
        for number in (*STOP_SIGNALS, *MEANINGLESS_SIGNALS, signal.SIGUSR1):
            os.kill(pid, number)
    pids = set(pool.pids())
    slow = [pool.submit(time.sleep, 60) for _ in range(2)]
    time.sleep(0.2)
    assert set(pool.pids()) == pids and not any(job.is_done() for job in slow), "signals to the group are ignored"
    start_s = time.monotonic()
    os.kill(pool.pids()[0], signal.SIGKILL)
    while not any(job.is_done() for job in slow):
        time.sleep(0.01)
    assert time.monotonic() - start_s < 2
    (lost,) = [job for job in slow if job.is_done()]
    with pytest.raises(LostJobError):
        lost.result()
    assert sorted(pool.imap_unordered(int, ["4", "5"])) == [4, 5], "by a new process, since the other is busy"
    pool.terminate()
    with pytest.raises(LostJobError):
        next(job for job in slow if job is not lost).result(0)
    wait_until_gone(list(pids))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_most_urgent_job_is_next_and_one_that_has_not_begun_can_be_withdrawn() -> None:
    pool = CompileWorkers(1, f"{__name__}:begin")
    try:
        assert pool.submit(int, "0").result(20) == 0  # the process is there
        begun = pool.submit(time.sleep, 0.5)
        while not begun.answer.running():
            time.sleep(0.01)
        later = [pool.submit(_now, None, urgency) for urgency in (3, 1, 2)]
        withdrawn = pool.submit(_now, None)
        assert withdrawn.withdraw() and not begun.withdraw()
        third, first, second = [job.result(20) for job in later]
        assert first < second < third
    finally:
        pool.terminate()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_processes_are_forked_by_a_template_which_may_die(pool: CompileWorkers) -> None:
    """It has imported what they need: one of them finds a module that it does not import. With the template they die,
    and another one follows."""
    pool.prepare(f"{__name__}:import_module", "turtledemo")
    assert pool.submit(_is_imported, "turtledemo").result(20)
    template, pids = pool._template, pool.pids()
    assert template is not None and template._process is not None
    os.kill(template._process.pid, signal.SIGKILL)
    wait_until_gone([template._process.pid, *pids])
    with contextlib.suppress(LostJobError):  # it was sent to a process that is gone
        pool.submit(int, "0").result(20)
    assert pool.submit(int, "1").result(20) == 1 and not set(pids) & set(pool.pids())


def import_module(name: str) -> None:
    importlib.import_module(name)


def _is_imported(name: str) -> bool:
    return name in sys.modules


def _now(_: None) -> int:
    return time.monotonic_ns()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("dies_with_parent", [True, False])
def test_a_busy_process_ends_with_its_killed_parent(dies_with_parent: bool) -> None:
    """Whether the system kills it, or its pipe closes."""
    program = f"""
import time
from tinyvllm.device import compile_workers
if not {dies_with_parent}:
    compile_workers._PROGRAM = compile_workers._PROGRAM.replace("MAIN(", "import tinyvllm.device.compile_workers as w; "
        "w.die_with_parent = lambda parent: None; MAIN(", 1)
pool = compile_workers.CompileWorkers(1, "{__name__}:begin")
print(pool.submit(int, "1").result(), pool.pids()[0], flush=True)
pool.submit(time.sleep, 1000).result()
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline().split()[1])
        assert is_running(pid)
        process.kill()
    wait_until_gone([pid])
