"""The load processes: how work is divided, that they start together, and that none outlives its parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from subprocess import DEVNULL, PIPE

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.bench.event_server import EventServer, serving_events
from tests.forking import printed_by
from tests.sweeps import swept
from tinyvllm.bench.load import Load, LoadWork, Target
from tinyvllm.bench.load_processes import LoadProcesses, choose_num_processes, split_load
from tinyvllm.errors import TinyvllmError

WORK = LoadWork(num_requests=8, num_warmup=0, output_len=20)


@given(st.integers(1, 40), st.integers(0, 60), st.integers(1, 8), st.sampled_from([None, 5.0]), st.booleans())
def test_division_loses_nothing(
    concurrency: int, count: int, num_processes: int, rate: float | None, is_capped: bool
) -> None:
    load = Load(concurrency if is_capped or rate is None else None, rate)
    num_processes = min(num_processes, concurrency)
    numbers = list(range(100, 100 + count))
    jobs = split_load(load, numbers, num_processes, seed=3)
    assert len(jobs) == num_processes and sorted(number for job in jobs for number in job.numbers) == numbers
    if load.concurrency is not None:
        assert sum(job.concurrency or 0 for job in jobs) == concurrency
        shares = [(len(job.numbers), job.concurrency or 0) for job in jobs]
        assert all(requests <= (count // concurrency + 1) * connections for requests, connections in shares)
    if rate is None:
        assert all(job.due_s is None for job in jobs)
    else:  # together they are the arrivals of one process
        assert sorted(time_s for job in jobs for time_s in job.due_s or ()) == load.arrivals(count, seed=3)


def test_number_of_processes_follows_the_cores_and_the_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tinyvllm.bench.load_processes.count_cores", lambda: 2)
    assert choose_num_processes(Load(64), 100) == 1
    monkeypatch.setattr("tinyvllm.bench.load_processes.count_cores", lambda: 32)
    assert [choose_num_processes(Load(count), 1000) for count in (1, 4, 8, 16, 256)] == [1, 1, 2, 4, 8]
    assert choose_num_processes(Load(rate=1.0), 1000) == 8
    assert choose_num_processes(Load(64), 100, 12) == 12 and choose_num_processes(Load(3), 100, 12) == 3
    assert choose_num_processes(Load(rate=1.0), 5, 12) == 5


def test_processes_start_together_and_count_what_is_done() -> None:
    done: list[int] = []
    with serving_events(EventServer(hold=4, total=8)) as url, LoadProcesses(Target(url, "tiny"), WORK, 4) as processes:
        shares = processes.run(split_load(Load(4), range(8), 4, seed=0), done.append)
    assert [len(share.answers) for share in shares] == [2] * 4
    assert all(answer.error is None and len(answer.text_s) == 20 for share in shares for answer in share.answers)
    assert done == sorted(done) and done[-1] == 8


def test_jobs_for_fewer_processes_leave_the_others_idle() -> None:
    with serving_events(EventServer()) as url, LoadProcesses(Target(url, "tiny"), WORK, 3) as processes:
        for count in (1, 3, 2):
            shares = processes.run(split_load(Load(count), range(6), count, seed=0))
            assert [len(share.answers) for share in shares] == [6 // count] * count


def test_death_of_a_process_is_an_error_by_name_and_ends_the_others() -> None:
    server = EventServer(hold=10, total=10)  # never answers: only 8 requests come
    with serving_events(server) as url, LoadProcesses(Target(url, "tiny"), WORK, 2) as processes:
        victim, other = processes._processes
        killer = threading.Timer(0.5, os.kill, (victim.pid, signal.SIGKILL))
        killer.start()
        with pytest.raises(TinyvllmError, match=rf"load process 1 of 2 \(pid {victim.pid}\) was ended by signal 9"):
            processes.run(split_load(Load(8), range(8), 2, seed=0))
        killer.join()
    assert other.returncode is not None


PARENT = """
import signal
import sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job would ignore it
from tests.bench.test_load_processes import WORK
from tinyvllm.bench.load import Load, Target
from tinyvllm.bench.load_processes import LoadProcesses, split_load

with LoadProcesses(Target(sys.argv[1], "tiny"), WORK, 2) as processes:
    print(*[process.pid for process in processes._processes], flush=True)
    processes.run(split_load(Load(8), range(8), 2, seed=0))
"""


@pytest.mark.parametrize("number", swept([signal.SIGINT, signal.SIGTERM, signal.SIGKILL], [signal.SIGKILL]))
def test_no_process_outlives_its_parent(number: signal.Signals) -> None:
    with (
        serving_events(EventServer(hold=10, total=10)) as url,
        subprocess.Popen([sys.executable, "-c", PARENT, url], stdout=PIPE, stderr=DEVNULL) as parent,
    ):
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 2 and all(map(is_running, pids))
        parent.send_signal(number)
        parent.wait()
        while any(map(is_running, pids)):
            time.sleep(0.01)


def is_running(pid: int) -> bool:
    """False for a zombie that nobody has waited for, which a container without an init process keeps."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    except NotADirectoryError:  # a system without /proc
        os.kill(pid, 0)
        return True
    return state != "Z"


def test_load_process_imports_little() -> None:
    code = "import sys, tinyvllm.bench.load_worker; print(*sys.modules)"
    modules = printed_by(code).split()
    for heavy in ("tinygrad", "numpy", "httpx", "rich", "typer", "pydantic", "tinyvllm.cli", "tinyvllm.engine"):
        assert heavy not in modules
