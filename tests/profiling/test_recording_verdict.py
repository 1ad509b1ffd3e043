"""What limits the steps of a recording, judged by spans of the engine's thread."""

from __future__ import annotations

import dataclasses

import pytest

from tinyvllm.profiling.interpreter import Interpreter, LockWait
from tinyvllm.profiling.lock_holders import Holder
from tinyvllm.profiling.measure import Recording, Span
from tinyvllm.profiling.recording_verdict import judge_recording, step_parts

MS = 1_000_000


def recording_of(*steps: tuple[str, int, int], pack_cpu: float = 1.0, num_dropped: int = 0) -> Recording:
    """A recording of steps one after another: (kind, ms, ms of waiting for the device). What is not waiting is packing,
    during which the thread runs `pack_cpu` of the time."""
    spans: list[Span] = []
    start_ns = 0
    for kind, whole_ms, wait_ms in steps:
        end_ns, packed_ns = start_ns + whole_ms * MS, start_ns + (whole_ms - wait_ms) * MS
        cpu_ns = int((packed_ns - start_ns) * pack_cpu)
        spans += [
            Span("pack", start_ns, packed_ns, "engine", 1, cpu_ns=cpu_ns),
            Span("wait", packed_ns, end_ns, "engine", 1, cpu_ns=0),
            Span("wait", start_ns, end_ns, "another", 0, cpu_ns=0),  # not the engine's
            Span("step", start_ns, end_ns, "engine", 0, end_ns - start_ns, {"kind": kind}, cpu_ns, cpu_ns),
        ]
        start_ns = end_ns
    return Recording(0, start_ns, tuple(spans), {}, {}, num_dropped)


def names(recording: Recording) -> list[str]:
    return [finding.name for finding in judge_recording(recording)]


def test_a_recording_without_steps_or_with_steps_on_the_device_says_nothing() -> None:
    assert names(recording_of()) == names(recording_of(("decode", 100, 98))) == []


def test_the_host_is_the_limit_where_it_works_in_most_of_each_step() -> None:
    (host,) = judge_recording(recording_of(("decode", 100, 40), ("decode", 100, 40)))
    assert host.name == "host-bound" and host.share == pytest.approx(0.6) and "pack, 120.000 ms" in host.because


def test_a_host_that_does_not_run_waits() -> None:
    (host,) = judge_recording(recording_of(("decode", 100, 40), pack_cpu=0.2))
    assert host.name == "host waits" and "12.000 ms" in host.because


def test_steps_with_prompts_are_named() -> None:
    (prompts,) = judge_recording(recording_of(("mixed", 300, 290), ("decode", 100, 95)))
    assert prompts.name == "prefill-bound" and prompts.share == pytest.approx(0.75)


def test_a_capture_between_steps_is_no_prefill() -> None:
    steps = recording_of(("decode", 100, 98), ("prefill", 50, 49))
    capture = Span("capture", 150 * MS, 1_073 * MS, "engine", 0, cpu_ns=0)
    (first,) = judge_recording(dataclasses.replace(steps, spans=(*steps.spans, capture)))
    assert first.name == "capturing graphs" and "923.000 ms" in first.because


def test_a_thread_that_hogs_the_lock_is_named_with_its_function() -> None:
    lock = LockWait(100, 95, 4 * MS, 5 * MS, 5 * MS, 20_000, 0, (Holder("hog", "spin (hog.py:7)", 95),))
    slow = dataclasses.replace(recording_of(("decode", 60, 59)), interpreter=Interpreter(MS, MS, (), lock))
    (first,) = judge_recording(slow)
    assert first.name == "lock contention" and "spin (hog.py:7) on thread hog" in first.because


def test_steps_whose_spans_were_dropped_are_left_out() -> None:
    """A step that began before the oldest kept span ended may miss some of its parts."""
    recording = recording_of(("decode", 100, 40), ("decode", 100, 98))
    cut = dataclasses.replace(recording, spans=recording.spans[1:], num_dropped=1)
    assert [part.host_ns for part in step_parts(cut)] == [2 * MS]
    assert [part.host_ns for part in step_parts(recording)] == [60 * MS, 2 * MS]


def test_stages_that_exceed_their_steps_have_no_verdict() -> None:
    """A wait that was counted twice, and a thread that ran for longer than passed."""
    recording = recording_of(("decode", 100, 40), ("decode", 100, 40))
    again = Span("wait", 60 * MS, 100 * MS, "engine", 2, 40 * MS, cpu_ns=0)
    (twice,) = judge_recording(dataclasses.replace(recording, spans=(*recording.spans, again)))
    assert (
        twice.is_withheld
        and "the host's part of all steps 80.000 ms, by the clock of its thread 120.000 ms" in twice.because
    )
    (clock,) = judge_recording(recording_of(("decode", 100, 40), pack_cpu=1.5))
    assert clock.is_withheld and clock.as_json()["disagreements"]
    assert clock.because == "the host's part of all steps 60.000 ms, by the clock of its thread 90.000 ms (+50%)"
