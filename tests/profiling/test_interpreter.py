"""Who holds the interpreter lock: what the probes' lateness means, and that watching ends with the recording."""

from __future__ import annotations

import threading

from tinyvllm.profiling import measure
from tinyvllm.profiling.interpreter import PROBE_NAME, summarize_probes


def test_the_lock_is_held_as_often_as_probes_wait_for_it() -> None:
    """75 probes wake up after 20 us, which the timer takes, and 25 wait another 4 ms for the lock."""
    lock = summarize_probes([20_000] * 75 + [4_020_000] * 25, [0] * 100)
    assert lock is not None
    assert (lock.num_probes, lock.num_held, lock.floor_ns) == (100, 25, 20_000)
    assert (lock.mean_ns, lock.max_ns) == (1_000_000, 4_000_000)
    assert lock.held_share == 0.25 and round(lock.held_error, 4) == 0.0433


def test_a_lock_that_is_always_held_is_no_floor() -> None:
    lock = summarize_probes([5_000_000] * 10, [0] * 10)
    assert lock is not None and (lock.num_held, lock.held_share, lock.mean_ns) == (10, 1.0, 4_800_000)


def test_waiting_for_a_core_is_not_waiting_for_the_lock() -> None:
    lock = summarize_probes([20_000] * 5 + [9_000_000] * 5, [0] * 5 + [8_980_000] * 5)
    assert lock is not None and (lock.num_held, lock.mean_ns, lock.core_wait_ns) == (0, 0, 4_490_000)


def test_a_recording_too_short_for_a_probe_says_nothing_of_the_lock() -> None:
    assert summarize_probes([], []) is None


def test_nothing_is_watched_unless_a_recording_asks_for_it() -> None:
    def is_probed() -> bool:
        return any(thread.name == PROBE_NAME for thread in threading.enumerate())

    measure.start()
    assert not is_probed()
    assert measure.stop().interpreter is None
    measure.start(watches=True)
    assert is_probed()
    interpreter = measure.stop().interpreter
    assert not is_probed()
    assert interpreter is not None and interpreter.wall_ns > 0
    assert {thread.name for thread in interpreter.threads} <= {"outside Python", *names_of_threads()}


def names_of_threads() -> set[str]:
    return {PROBE_NAME, *(thread.name for thread in threading.enumerate())}
