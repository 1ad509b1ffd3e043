"""Who holds the interpreter lock: what the probes' lateness means, and that watching ends with the recording."""

from __future__ import annotations

import dis
import threading
import time

from tinyvllm.profiling import measure
from tinyvllm.profiling.interpreter import PROBE_NAME, summarize_probes
from tinyvllm.profiling.lock_holders import Sighting, find_holder, holders_by_thread
from tinyvllm.profiling.measure import Recording
from tinyvllm.profiling.recording_codec import decode_recordings, encode_recordings
from tinyvllm.profiling.recording_verdict import judge_recording


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


def spin(done: threading.Event, turns: list[int]) -> None:
    while not done.is_set():
        turns[0] += 1
        sum(range(100))


def record_beside_a_hog() -> Recording:
    """Steps that wait for their device with the lock released, while a thread runs Python all the time. A step takes as
    long as that thread takes for a thousand turns, so that it has run, whatever else wants the cores."""
    done, turns = threading.Event(), [0]
    hog = threading.Thread(target=spin, args=(done, turns), name="hog")
    measure.start(watches=True)
    hog.start()
    for _ in range(100):
        with measure.span(measure.STEP, kind="decode"), measure.span(measure.WAIT):
            end = turns[0] + 1000
            while turns[0] < end:
                time.sleep(0.002)
    done.set()
    hog.join()
    return measure.stop()


def hog_had_the_lock(recording: Recording) -> bool:
    """On a busy machine the hog may get no core, and then the thread of the steps holds the lock more often, or waits
    for a core itself."""
    lock = recording.interpreter.lock if recording.interpreter is not None else None
    if lock is None or not lock.holders or holders_by_thread(lock.holders)[0][0] != "hog":
        return False
    first, *_ = [*judge_recording(recording), None]
    return first is not None and first.name == "lock contention" and first.share > 0.3


def test_a_thread_that_hogs_the_lock_is_named() -> None:
    recordings = iter(record_beside_a_hog, None)  # until one is as it is on a quiet machine
    recording = next(filter(hog_had_the_lock, recordings))
    first = judge_recording(recording)[0]
    assert "on thread hog" in first.because and "test_interpreter.py" in first.because
    [decoded] = decode_recordings(encode_recordings([recording]))
    assert decoded.interpreter == recording.interpreter


def sighting(name: str, instruction: int, cpu_ns: int | None) -> Sighting:
    """At an instruction of `spin`."""
    return Sighting(name, spin.__code__, instruction, 50, cpu_ns)


CALLS = [one.offset for one in dis.get_instructions(spin) if one.opname.startswith("CALL")]


def test_a_thread_within_one_call_holds_the_lock_only_if_no_other_thread_ran_on() -> None:
    in_c = {1: sighting("in-c", CALLS[0], 0)}, {1: sighting("in-c", CALLS[0], 5_000_000)}
    runs_on = {2: sighting("hog", 0, 0)}, {2: sighting("hog", CALLS[0], 4_000_000)}
    sleeps = {3: sighting("idle", CALLS[1], 9)}, {3: sighting("idle", CALLS[1], 9)}
    found = find_holder(in_c[0] | runs_on[0] | sleeps[0], in_c[1] | runs_on[1] | sleeps[1], 5_000_000)
    assert found is not None and found.name == "hog"
    found = find_holder(in_c[0] | sleeps[0], in_c[1] | sleeps[1], 5_000_000)
    assert found is not None and found.name == "in-c"
    assert find_holder(*sleeps, 5_000_000) is None and find_holder({}, in_c[1], 5_000_000) is None


def test_without_clocks_of_other_threads_the_one_that_ran_on_is_the_holder() -> None:
    before = {1: sighting("hog", 0, None), 2: sighting("idle", CALLS[0], None)}
    after = {1: sighting("hog", CALLS[0], None), 2: sighting("idle", CALLS[0], None)}
    found = find_holder(before, after, 5_000_000)
    assert found is not None and found.name == "hog"
