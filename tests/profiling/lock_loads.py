"""What the probe of the interpreter lock finds under known loads: `python -m tests.profiling.lock_loads`."""

from __future__ import annotations

import hashlib
import re
import threading
import time
from collections.abc import Callable

from tinyvllm.profiling import measure

SECONDS = 2.0
BLOCK = bytes(1 << 22)


def idle(until_s: float) -> None:
    time.sleep(until_s - time.perf_counter())


def python_half_of_the_time(until_s: float) -> None:
    while (now_s := time.perf_counter()) < until_s:
        python_all_the_time(now_s + 0.004)
        time.sleep(0.004)


def python_all_the_time(until_s: float) -> None:
    while time.perf_counter() < until_s:
        pass


def c_without_the_lock(until_s: float) -> None:
    while time.perf_counter() < until_s:
        hashlib.sha256(BLOCK).digest()


def regular_expression(until_s: float) -> None:
    """One long call of C that keeps the lock."""
    while time.perf_counter() < until_s:
        re.match(r"(a*)*b", "a" * 22)


def python_beside_c(until_s: float) -> None:
    """The thread in C uses as much of the processor, but not the lock."""
    beside = threading.Thread(target=c_without_the_lock, args=(until_s,), name="in-c")
    beside.start()
    python_all_the_time(until_s)
    beside.join()


def held_share(load: Callable[[float], None]) -> str:
    measure.start(watches=True)
    thread = threading.Thread(target=load, args=(time.perf_counter() + SECONDS,), name="load")
    thread.start()
    thread.join()
    watched = measure.stop().interpreter
    assert watched is not None and watched.lock is not None
    lock = watched.lock
    return (
        f"held {lock.held_share:.0%} ± {lock.held_error:.0%}, wait {lock.mean_ns / 1e6:.3f} ms on average, "
        f"CPU {watched.cpu_ns / watched.wall_ns:.0%}, {lock.num_probes} probes; holders: "
        + (", ".join(f"{one.thread} in {one.where} {one.num_probes}x" for one in lock.holders) or "none")
    )


if __name__ == "__main__":
    for load in (
        *(idle, python_half_of_the_time, python_all_the_time, c_without_the_lock),
        *(regular_expression, python_beside_c),
    ):
        print(f"{load.__name__.replace('_', ' ')}: {held_share(load)}")
