"""The load processes, as their parent sees them: started together, told what to send, and never left behind."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection as Pipe
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import tinyvllm
from tinyvllm.bench.load import Load, LoadWork, Target
from tinyvllm.bench.load_answers import Share, unpack_share
from tinyvllm.errors import TinyvllmError

MAX_PROCESSES = 8  # of the automatic choice: 100,000 events a second need fewer
CLIENTS_PER_PROCESS = 4  # of the automatic choice: more streams would wait for each other's timestamps
START_DELAY_S = 0.02  # from the message to the start, so that all processes have it by then
EXIT_TIMEOUT_S = 5.0
MODULE = "tinyvllm.bench.load_worker"


@dataclasses.dataclass(frozen=True)
class Job:
    """The part of a level that one process sends. `due_s`: seconds after the start, None in a closed loop."""

    numbers: list[int]  # of prompts
    concurrency: int | None
    due_s: list[float] | None


def choose_num_processes(load: Load, num_requests: int, wanted: int | None = None) -> int:
    """As many as wanted, or by default half the cores up to 8 and one for every 4 clients; no more than have work."""
    if wanted is not None and wanted < 1:
        raise TinyvllmError(f"--load-processes is {wanted}: give at least 1")
    clients = min(num_requests, load.concurrency or num_requests)
    if wanted is None:
        wanted = min(MAX_PROCESSES, max(1, count_cores() // 2), -(-clients // CLIENTS_PER_PROCESS))
    return min(wanted, clients)


def count_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def split_load(load: Load, numbers: Sequence[int], num_processes: int, seed: int) -> list[Job]:
    """Deal requests and open connections to processes in turn: n requests at once are n over all of them. The arrivals
    of an open loop are drawn before they are dealt, so they do not depend on the number of processes."""
    arrivals = load.arrivals(len(numbers), seed)
    # Requests are dealt by connection, so that a process with more connections gets more requests.
    num_connections = load.concurrency or num_processes
    dealt: list[list[int]] = [[] for _ in range(num_processes)]
    for place in range(len(numbers)):
        dealt[place % num_connections % num_processes].append(place)
    return [
        Job(
            numbers=[numbers[place] for place in places],
            concurrency=None if load.concurrency is None else len(range(rank, load.concurrency, num_processes)),
            due_s=None if arrivals is None else [arrivals[place] for place in places],
        )
        for rank, places in enumerate(dealt)
    ]


class LoadProcesses:
    """Owns `count` load processes. A context manager: they end with it, or with this process if it is killed."""

    def __init__(self, target: Target, work: LoadWork, count: int) -> None:
        self._settings = {"target": dataclasses.asdict(target), "work": dataclasses.asdict(work)}
        self._count = count
        self._processes: list[subprocess.Popen[bytes]] = []
        self._pipes: list[Pipe] = []

    def __enter__(self) -> LoadProcesses:
        try:
            for _ in range(self._count):
                self._start_one()
            for rank in range(self._count):
                self._expect_ready(rank)
                self._tell(rank, self._settings)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """End all processes. May be called again."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.kill()  # it owns nothing that must be put away
            process.wait()
        self._pipes, self._processes = [], []

    def run(self, jobs: Sequence[Job], report_done: Callable[[int], None] | None = None) -> list[Share]:
        """Run one job on each of the first processes; all start at the same time. Returns their shares.

        Raises TinyvllmError if a process dies."""
        for rank, job in enumerate(jobs):
            self._tell(rank, dataclasses.asdict(job))
        for rank in range(len(jobs)):
            self._expect_ready(rank)
        start_s = time.perf_counter() + START_DELAY_S
        for rank in range(len(jobs)):
            self._tell(rank, {"start_s": start_s})
        shares: dict[int, Share] = {}
        done = [0] * len(jobs)
        while len(shares) < len(jobs):
            for pipe in wait([self._pipes[rank] for rank in range(len(jobs)) if rank not in shares]):
                rank = self._pipes.index(pipe)  # type: ignore[arg-type]  # they are all pipes
                message = self._receive(rank)
                if message.startswith(b"{"):
                    done[rank] = json.loads(message)["done"]
                else:
                    shares[rank] = unpack_share(message[1:])
                    done[rank] = len(jobs[rank].numbers)
                if report_done is not None:
                    report_done(sum(done))
        return [shares[rank] for rank in range(len(jobs))]

    def _start_one(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self._processes.append(
                subprocess.Popen(
                    [sys.executable, "-P", "-m", MODULE, str(theirs.fileno())],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    env=os.environ | {"PYTHONPATH": _search_path()},
                    process_group=0,  # Ctrl-C reaches the parent alone, which ends them
                )
            )
        self._pipes.append(Pipe(ours.detach()))

    def _expect_ready(self, rank: int) -> None:
        message = json.loads(self._receive(rank))
        assert message == {"ready": True}, message

    def _tell(self, rank: int, message: dict[str, Any]) -> None:
        try:
            self._pipes[rank].send_bytes(json.dumps(message).encode())
        except OSError as error:
            raise self._describe_death(rank) from error

    def _receive(self, rank: int) -> bytes:
        try:
            return self._pipes[rank].recv_bytes()
        except (EOFError, OSError) as error:
            raise self._describe_death(rank) from error

    def _describe_death(self, rank: int) -> TinyvllmError:
        process = self._processes[rank]
        try:
            code = process.wait(EXIT_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            how = "closed its connection"
        else:
            how = f"was ended by signal {-code}" if code < 0 else f"ended with code {code}"
        name = f"load process {rank + 1} of {self._count} (pid {process.pid})"
        return TinyvllmError(f"{name} {how} before its requests were answered: see its last lines above, and run again")


def _search_path() -> str:
    """A PYTHONPATH on which the processes find this very package."""
    folder = str(Path(tinyvllm.__file__).parent.parent)
    return os.pathsep.join([folder, *filter(None, [os.environ.get("PYTHONPATH")])])
