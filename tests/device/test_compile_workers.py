"""Processes end with their jobs' owner, whichever of them dies, and a template is there for as long as it is needed."""

from __future__ import annotations

import contextlib
import importlib
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.patience import wait_for
from tests.server.test_control import is_running, wait_until_gone
from tests.sweeps import swept
from tinyvllm.device import compile_workers
from tinyvllm.device.compile_workers import CompileWorkers, LostJobError, end_unused, prepare_early
from tinyvllm.processes import MEANINGLESS_SIGNALS, STOP_SIGNALS

pytestmark = [
    pytest.mark.usefixtures("compiling_processes"),
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, and has templates"),
]
BEGIN = f"{__name__}:begin"
IMPORT = f"{__name__}:import_module"
MODULE = "turtledemo"  # which nothing imports


def begin() -> None:
    """Nothing to prepare."""


@pytest.fixture
def pool() -> Iterator[CompileWorkers]:
    pool = CompileWorkers(2, f"{__name__}:begin")
    yield pool
    pool.terminate()
    assert pool.pids() == []


@pytest.mark.parametrize("has_template", [True, False])
def test_jobs_end_with_their_value_their_error_or_their_process(pool: CompileWorkers, has_template: bool) -> None:
    if not has_template:  # as on macOS
        pool._template = None
    jobs = [pool.submit(int, text) for text in ("1", "x", "2")]
    assert jobs[0].result() == 1 and jobs[2].result() == 2
    with pytest.raises(ValueError, match="'x'"):
        jobs[1].result()
    for pid in pool.pids():
        for number in (*STOP_SIGNALS, *MEANINGLESS_SIGNALS, signal.SIGUSR1):
            os.kill(pid, number)
    pids = set(pool.pids())
    slow = [pool.submit(time.sleep, 1000) for _ in range(2)]
    time.sleep(0.2)
    assert set(pool.pids()) == pids and not any(job.is_done() for job in slow), "signals to the group are ignored"
    os.kill(pool.pids()[0], signal.SIGKILL)
    wait_for(lambda: any(job.is_done() for job in slow))
    (lost,) = [job for job in slow if job.is_done()]
    with pytest.raises(LostJobError):
        lost.result()
    assert sorted(pool.imap_unordered(int, ["4", "5"])) == [4, 5], "by a new process, since the other is busy"
    pool.terminate()
    with pytest.raises(LostJobError):
        next(job for job in slow if job is not lost).result(0)
    wait_until_gone(list(pids))


def test_the_most_urgent_job_is_next_then_the_costliest_and_one_that_waits_can_be_withdrawn(tmp_path: Path) -> None:
    pool, go = CompileWorkers(1, f"{__name__}:begin"), tmp_path / "go"
    try:
        begun = pool.submit(_wait_for_file, go)
        wait_for(begun.answer.running)
        later = [pool.submit(_now, None, urgency, cost) for urgency, cost in ((2, 0), (1, 5), (1, 7))]
        withdrawn = pool.submit(_now, None)
        assert withdrawn.withdraw() and not begun.withdraw()
        go.touch()
        third, second, first = [job.result() for job in later]
        assert first < second < third
    finally:
        pool.terminate()


def import_module(name: str) -> None:
    importlib.import_module(name)


def _is_imported(name: str) -> bool:
    return name in sys.modules


def _now(_: None) -> int:
    return time.monotonic_ns()


def _wait_for_file(path: Path) -> None:
    while not path.exists():
        time.sleep(0.01)


# each way of ending; one process or several end alike
@pytest.mark.parametrize(
    ("size", "dies_with_parent"), swept(itertools.product((1, 2), (True, False)), [(2, True), (1, False)])
)
def test_busy_processes_end_with_their_killed_parent(size: int, dies_with_parent: bool) -> None:
    """Whether the system kills them, or their pipes close. The template ends too."""
    program = f"""
import time
from tinyvllm.device import compile_workers
if not {dies_with_parent}:
    compile_workers._PROGRAM = compile_workers._PROGRAM.replace("MAIN(", "import tinyvllm.device.compile_workers as w; "
        "w.die_with_parent = lambda parent: None; MAIN(", 1)
pool = compile_workers.CompileWorkers({size}, "{BEGIN}")
jobs = [pool.submit(time.sleep, 1000) for _ in range({size})]
while not all(job.answer.running() for job in jobs):
    time.sleep(0.01)
print(*pool.pids(), *([] if pool._template is None else [pool._template.pid]), flush=True)
jobs[0].result()
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pids = [int(pid) for pid in process.stdout.readline().split()]
        assert len(pids) == (1 if size == 1 else 3) and all(map(is_running, pids))
        process.kill()
    wait_until_gone(pids)


def leave_behind(seconds: float) -> int:
    """A process that nobody collects when this one is killed, and that works; its id."""
    program = f"import time\nwhile time.process_time() < {seconds}: pass\nprint(flush=True)\ntime.sleep(1000)"
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    return process.pid


@pytest.mark.parametrize("size", [1, 2])
def test_what_a_process_leaves_behind_is_ended_and_collected_and_its_time_counts(size: int) -> None:
    """Even where process 1 collects nothing, as in a container: then orphans become this program's children."""
    program = f"""
import os
from tests.device.test_compile_workers import leave_behind
from tinyvllm.device.compile_workers import CompileWorkers
from tinyvllm.processes import adopt_orphans
adopt_orphans()
pool = CompileWorkers({size}, "{BEGIN}")
jobs = [pool.submit(leave_behind, 0.5) for _ in range({size})]
pids = [job.result() for job in jobs]
before = sum(os.times()[2:4])
pool.terminate()
assert sum(os.times()[2:4]) - before > 0.4 * {size}
try:
    assert os.waitpid(-1, os.WNOHANG) is None
except ChildProcessError:
    print(*pids)
"""
    run = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, check=True)
    pids = [int(pid) for pid in run.stdout.split()]
    assert len(pids) == size and not any(map(is_running, pids))


# ---- The template ----


def template_of(pool: CompileWorkers) -> int:
    """Its id."""
    assert pool._template is not None and pool._template._process is not None
    return pool._template._process.pid


def kill_template(pool: CompileWorkers) -> None:
    """With it die those that it forked."""
    pids = [template_of(pool), *pool.pids()]
    os.kill(pids[0], signal.SIGKILL)
    wait_until_gone(pids)


def is_imported(pool: CompileWorkers) -> bool:
    """Asked again if the first was sent to a process that is gone."""
    with contextlib.suppress(LostJobError):
        return bool(pool.submit(_is_imported, MODULE).result())
    return bool(pool.submit(_is_imported, MODULE).result())


def test_processes_know_what_the_template_was_prepared_for_even_after_its_death(pool: CompileWorkers) -> None:
    """One of them finds a module that it does not import. Another template follows, before it is asked to fork, too."""
    pool.prepare(IMPORT, MODULE)
    assert is_imported(pool)
    pids = {template_of(pool), *pool.pids()}
    kill_template(pool)
    assert is_imported(pool) and not pids & {template_of(pool), *pool.pids()}
    kill_template(pool)
    pool.prepare(IMPORT, MODULE)
    assert is_running(template_of(pool)) and is_imported(pool)


def test_a_terminated_template_is_prepared_again_when_asked_to(pool: CompileWorkers) -> None:
    pool.prepare(IMPORT, MODULE)
    assert is_imported(pool)
    pids = [template_of(pool), *pool.pids()]
    pool.terminate()
    wait_until_gone(pids)
    pool.prepare(IMPORT, MODULE)
    assert is_running(template_of(pool)) and is_imported(pool)
    pool.terminate()
    assert not is_imported(pool), "what was asked for before is forgotten"


def test_a_template_outlives_the_thread_that_asked_for_it(pool: CompileWorkers) -> None:
    def ask() -> None:
        pool.prepare(IMPORT, MODULE)
        assert is_imported(pool)  # so it runs, and has asked the system to be killed with that thread

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    pid = template_of(pool)
    time.sleep(0.2)
    assert is_running(pid) and is_imported(pool) and template_of(pool) == pid


def test_terminating_does_not_wait_for_a_busy_template_nor_start_another(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []
    start = compile_workers._start_process

    def note(*arguments: Any) -> subprocess.Popen[bytes]:
        started.append(start(*arguments))
        return started[-1]

    monkeypatch.setattr(compile_workers, "_start_process", note)
    pool = CompileWorkers(4, BEGIN)
    pool.prepare("time:sleep", 1000)
    jobs = [pool.submit(int, "1") for _ in range(4)]
    time.sleep(0.5)  # one waits for the template, and the others for that one
    threads = [worker.thread for worker in pool._workers]
    pool.terminate()
    for job in jobs:
        with pytest.raises(LostJobError):
            job.result(0)
    for thread in threads:
        thread.join()
        assert not thread.is_alive()
    assert len(started) == 1 and started[0].poll() is not None


@pytest.mark.parametrize("has_pidfd", [True, False])
def test_no_other_process_is_killed_once_the_template_is_gone(
    pool: CompileWorkers, monkeypatch: pytest.MonkeyPatch, has_pidfd: bool
) -> None:
    """The id of a process that the system has collected may be another's."""
    if not has_pidfd:
        monkeypatch.delattr(os, "pidfd_open")
    busy = pool.submit(time.sleep, 1000)
    wait_for(busy.answer.running)
    process = pool._workers[0]._process
    assert process is not None
    process.kill()
    with pytest.raises(LostJobError):
        busy.result()
    assert pool.submit(int, "1").result() == 1
    pid = pool.pids()[0]
    kill_template(pool)
    killed: list[int] = []
    monkeypatch.setattr(os, "kill", lambda pid, number: killed.append(pid))
    pool.terminate()
    assert pid not in killed


# ---- A template that begins early ----


@pytest.fixture
def no_pools(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of other tests may not be collected yet."""
    monkeypatch.setattr(compile_workers, "_pools", weakref.WeakValueDictionary())


def early_template() -> int:
    (template,) = compile_workers._early.values()
    assert template._process is not None
    return template._process.pid


@pytest.mark.usefixtures("no_pools")
def test_an_early_template_is_adopted_and_a_later_one_is_the_pools_own() -> None:
    prepare_early(BEGIN, IMPORT, MODULE)
    prepare_early(BEGIN, IMPORT, MODULE)
    pid = early_template()
    pool = CompileWorkers(2, BEGIN)
    try:
        assert template_of(pool) == pid and not compile_workers._early and is_imported(pool)
        pool.terminate()
        prepare_early(BEGIN, IMPORT, MODULE)  # as a second load does
        assert not compile_workers._early and is_running(template_of(pool)) and is_imported(pool)
        pid = template_of(pool)
        end_unused(BEGIN)
        assert is_running(pid), "there was a job"
    finally:
        pool.terminate()
    wait_until_gone([pid])


@pytest.mark.usefixtures("no_pools")
def test_an_early_template_ends_if_nobody_needs_it() -> None:
    prepare_early(BEGIN, IMPORT, MODULE)
    pids = [early_template()]
    CompileWorkers(1, BEGIN)  # has none
    assert not compile_workers._early
    prepare_early(BEGIN, IMPORT, MODULE)
    pids.append(early_template())
    end_unused(BEGIN)
    assert not compile_workers._early
    pool = CompileWorkers(2, BEGIN)
    prepare_early(BEGIN, IMPORT, MODULE)
    pids.append(template_of(pool))
    end_unused(BEGIN)
    wait_until_gone(pids)
