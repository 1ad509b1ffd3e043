"""Who uses a process's interpreter: the processor time of its threads, and how often its lock is held.

Only one thread at a time runs Python code: the one that holds the interpreter lock (GIL). Two measurements together say
who that is. The operating system counts each thread's processor time; a thread that computes in C without the lock,
such as a kernel on the CPU, counts too, so a thread's share is an upper bound of the time that it holds the lock. And a
probe, a thread that sleeps for about 5 ms at a time, measures how late it wakes up. It is late by what the timer takes
(the floor, told by the earliest tenth of all probes), by waiting for a core (which Linux counts for each thread), and
by waiting for the lock. The probes come at random times, so the share of them that had to wait is the share of time in
which the lock is held. Who held it, each probe that had to wait finds out (`lock_holders.py`). `python -m
tests.profiling.lock_loads` checks that with known loads.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tinyvllm.profiling.lock_holders import Holder, Sighting, count_holders, find_holder, sight_threads

PROBE_S = (0.003, 0.007)  # between probes: random, so that they are not in step with the engine
RARE_PROBES_S = (0.01, 0.03)  # the same beside a benchmark, for a quarter of the cost
HELD_NS = 50_000  # a probe that waits longer than this found the lock held; shorter waits are the timer's noise
FLOOR_SHARE = 0.1  # of the probes, the earliest, tell what a wake-up takes ...
MAX_FLOOR_NS = 200_000  # ... but not more than this, because the lock may be held all the time
PROBE_NAME = "tinyvllm-lock-probe"
OTHER_THREADS = "outside Python"
_TASKS = Path("/proc/self/task")
_PR_SET_TIMERSLACK = 29


@dataclass(frozen=True)
class ThreadTime:
    """One thread's use of the processor during a recording."""

    name: str  # Python's; the threads that Python does not know are one row
    cpu_ns: int
    core_wait_ns: int  # ready to run, but without a core; 0 where the system does not tell


@dataclass(frozen=True)
class LockWait:
    """What the probes found."""

    num_probes: int
    num_held: int  # probes that had to wait for the lock
    mean_ns: int  # wait for the lock, over all probes
    p99_ns: int
    max_ns: int
    floor_ns: int  # what a wake-up takes when nobody holds the lock
    core_wait_ns: int  # mean wait for a core, which is left out of the above; 0 where the system does not tell
    holders: tuple[Holder, ...] = ()  # who held it in the probes that had to wait, the most frequent first

    @property
    def held_share(self) -> float:
        """Share of time in which the lock is held by some thread."""
        return self.num_held / self.num_probes

    @property
    def held_error(self) -> float:
        """Standard error of `held_share`, if the probes are independent."""
        share = self.held_share
        return math.sqrt(share * (1 - share) / self.num_probes)


@dataclass(frozen=True)
class Interpreter:
    """A process during a recording. `lock` is None if it was too short for a probe."""

    wall_ns: int
    cpu_ns: int  # of all threads, those included that have ended
    threads: tuple[ThreadTime, ...]  # the busiest first
    lock: LockWait | None


class Watch:
    """Measures from its creation until `stop`."""

    def __init__(self, pauses_s: tuple[float, float] = PROBE_S) -> None:
        """pauses_s: the least and the longest pause between probes."""
        self._start_ns, self._start_cpu_ns = time.perf_counter_ns(), time.process_time_ns()
        self._before = _thread_times()
        self._probe = _Probe(pauses_s)
        self._probe.start()

    def stop(self) -> Interpreter:
        names = {thread.native_id: thread.name for thread in threading.enumerate()}
        after = _thread_times()
        wall_ns = time.perf_counter_ns() - self._start_ns
        self._probe.stop()
        sums: dict[str, tuple[int, int]] = {}
        for thread_id, (cpu_ns, wait_ns) in after.items():
            cpu_before_ns, wait_before_ns = self._before.get(thread_id, (0, 0))
            name = names.get(thread_id, OTHER_THREADS)
            cpu_sum_ns, wait_sum_ns = sums.get(name, (0, 0))
            sums[name] = cpu_sum_ns + cpu_ns - cpu_before_ns, wait_sum_ns + wait_ns - wait_before_ns
        threads = [ThreadTime(name, *times) for name, times in sums.items()]
        return Interpreter(
            wall_ns=wall_ns,
            cpu_ns=time.process_time_ns() - self._start_cpu_ns,
            threads=tuple(sorted(threads, key=lambda thread: -thread.cpu_ns)),
            lock=self._probe.result(),
        )


class _Probe(threading.Thread):
    """Wakes up at random times, and records how late it was, how long it waited for a core, and who held the lock."""

    def __init__(self, pauses_s: tuple[float, float]) -> None:
        super().__init__(name=PROBE_NAME, daemon=True)
        self._pauses_s = pauses_s
        self._is_stopping = threading.Event()
        self._late_ns: list[int] = []
        self._core_wait_ns: list[int] = []
        self._holders: list[Sighting | None] = []

    def run(self) -> None:
        rng = random.Random(0)
        _wake_precisely()
        core_wait_ns = _core_wait_reader()
        while not self._is_stopping.is_set():
            pause_s = rng.uniform(*self._pauses_s)
            threads, waited_ns = sight_threads(), core_wait_ns()
            due_ns = time.perf_counter_ns() + int(pause_s * 1e9)
            time.sleep(pause_s)
            late_ns, waited_ns = time.perf_counter_ns() - due_ns, core_wait_ns() - waited_ns
            self._late_ns.append(late_ns)
            self._core_wait_ns.append(waited_ns)
            may_be_held = late_ns - waited_ns > HELD_NS
            self._holders.append(find_holder(threads, sight_threads(), late_ns - waited_ns) if may_be_held else None)

    def stop(self) -> None:
        self._is_stopping.set()
        self.join()

    def result(self) -> LockWait | None:
        return summarize_probes(self._late_ns, self._core_wait_ns, self._holders)


def summarize_probes(
    late_ns: list[int], core_wait_ns: list[int], holders: Sequence[Sighting | None] = ()
) -> LockWait | None:
    """From how late each probe woke up, how much of that it waited for a core, and who held the lock. None without
    probes."""
    if not late_ns:
        return None
    late = [max(0, late - waited) for late, waited in zip(late_ns, core_wait_ns, strict=True)]
    floor_ns = min(sorted(late)[int(FLOOR_SHARE * (len(late) - 1))], MAX_FLOOR_NS)
    each = [max(0, one - floor_ns) for one in late]
    waits = sorted(each)
    return LockWait(
        num_probes=len(waits),
        num_held=sum(wait > HELD_NS for wait in waits),
        mean_ns=sum(waits) // len(waits),
        p99_ns=waits[int(0.99 * (len(waits) - 1))],
        max_ns=waits[-1],
        floor_ns=floor_ns,
        core_wait_ns=sum(core_wait_ns) // len(waits),
        holders=count_holders(holder for holder, wait in zip(holders, each, strict=False) if wait > HELD_NS),
    )


def _thread_times() -> dict[int, tuple[int, int]]:
    """Processor time and wait for a core of each thread, by the system's thread id.

    Linux tells both, for threads that are not Python's too. Elsewhere the first of Python's threads, where there is a
    clock for it, else nothing."""
    times: dict[int, tuple[int, int]] = {}
    if _TASKS.is_dir():
        for task in _TASKS.iterdir():
            with contextlib.suppress(OSError, ValueError):  # it has just ended, or the kernel has no schedstat
                cpu_ns, wait_ns, _ = map(int, (task / "schedstat").read_text().split())
                times[int(task.name)] = cpu_ns, wait_ns
    if not times and hasattr(time, "pthread_getcpuclockid"):
        for thread in threading.enumerate():
            if thread.ident is not None and thread.native_id is not None:
                with contextlib.suppress(OSError):
                    clock = time.pthread_getcpuclockid(thread.ident)
                    times[thread.native_id] = time.clock_gettime_ns(clock), 0
    return times


def _core_wait_reader() -> Callable[[], int]:
    """A function that returns how long this thread has waited for a core so far, in ns. Always 0 if not on Linux.

    It calls C without releasing the lock, because getting it back may take long, and that would be counted, too."""
    try:
        fd = os.open(_TASKS / str(threading.get_native_id()) / "schedstat", os.O_RDONLY)
    except OSError:
        return lambda: 0
    pread, buffer = ctypes.PyDLL(None).pread, ctypes.create_string_buffer(80)

    def read() -> int:
        size = pread(fd, buffer, 80, ctypes.c_long(0))
        return int(buffer.raw[:size].split()[1]) if size > 0 else 0

    return read


def _wake_precisely() -> None:
    """Have Linux wake this thread at the nanosecond asked for instead of within 50 us."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, ctypes.c_ulong(1))
