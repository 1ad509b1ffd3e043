"""Spans nest, close on errors, cost nothing while off, and never exceed their memory limit."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyvllm.errors import InvariantError, ProfilingError
from tinyvllm.profiling import measure
from tinyvllm.profiling.measure import Recorder, Recording
from tinyvllm.profiling.recording_codec import decode_recordings, encode_recordings


@pytest.fixture(autouse=True)
def _off() -> Iterator[None]:
    """Recording is off after each test, however it ends."""
    yield
    if measure.is_on():
        measure.stop()


def record_nested() -> Recording:
    measure.start()
    with measure.span(measure.STEP) as step:
        with measure.span(measure.SCHEDULE):
            pass
        with measure.span(measure.PACK):
            pass
        step.tell(kind="decode", bucket="decode 8")
    return measure.stop()


def test_a_span_knows_what_lies_inside_of_it() -> None:
    recording = record_nested()
    (step,) = recording.named("step")
    inner = [*recording.named("schedule"), *recording.named("pack")]
    assert step.facts == {"kind": "decode", "bucket": "decode 8"}
    assert [span.depth for span in (step, *inner)] == [0, 1, 1]
    assert step.inner_ns == sum(span.duration_ns for span in inner)
    assert step.own_ns + step.inner_ns == step.duration_ns <= recording.wall_ns
    assert all(step.start_ns <= span.start_ns <= span.end_ns <= step.end_ns for span in inner)


def test_own_times_of_all_spans_sum_to_the_outermost() -> None:
    recording = record_nested()
    assert sum(total.own_ns for total in recording.totals.values()) == recording.totals["step"].total_ns


def test_off_is_one_shared_object_that_does_nothing() -> None:
    assert measure.span("pack") is measure.span("wait", bucket="decode 1")
    with measure.span("pack") as span:
        span.tell(kind="decode")
    measure.add("queue", 0, 1)
    measure.count("syncs")
    measure.start()
    recording = measure.stop()
    assert (recording.spans, recording.totals, recording.counts) == ((), {}, {})


def test_a_span_closes_on_an_error_and_names_it() -> None:
    measure.start()
    with pytest.raises(ValueError), measure.span("step"), measure.span("pack"):
        raise ValueError("as planned")
    with measure.span("commit"):
        pass
    recording = measure.stop()
    assert {span.name: (span.depth, span.facts) for span in recording.spans} == {
        "pack": (1, {"error": "ValueError"}),
        "step": (0, {"error": "ValueError"}),
        "commit": (0, {}),
    }


def test_an_error_passes_while_off() -> None:
    with pytest.raises(ValueError), measure.span("pack"):
        raise ValueError("as planned")


def test_threads_do_not_nest_in_each_other() -> None:
    measure.start()

    def other() -> None:
        with measure.span("tokenize"):
            pass

    with measure.span("step"):
        thread = threading.Thread(target=other, name="caller")
        thread.start()
        thread.join()
    recording = measure.stop()
    (tokenize,), (step,) = recording.named("tokenize"), recording.named("step")
    assert (tokenize.depth, tokenize.thread, step.inner_ns) == (0, "caller", 0)


@given(st.integers(1, 20), st.integers(0, 60))
def test_memory_is_bounded_and_totals_stay_exact(kept: int, made: int) -> None:
    recorder = Recorder(max_spans=kept)
    for index in range(made):
        recorder.add("queue", 10 * index, 10 * index + 3)
    recording = recorder.finish()
    assert len(recording.spans) == min(kept, made)
    assert recording.num_dropped == made - len(recording.spans)
    assert [span.start_ns for span in recording.spans] == [10 * index for index in range(made)][-kept:]
    if made:
        assert (recording.totals["queue"].count, recording.totals["queue"].total_ns) == (made, 3 * made)


def test_counts_add_up() -> None:
    measure.start()
    measure.count("syncs")
    measure.count("syncs")
    measure.count("copied_bytes", 4096)
    assert measure.stop().counts == {"syncs": 2, "copied_bytes": 4096}


def test_a_span_that_is_open_at_the_end_is_left_out_and_ends_well() -> None:
    measure.start()
    with measure.span("step"):
        recording = measure.stop()
    assert recording.spans == ()


def test_starting_twice_and_stopping_nothing_are_refused() -> None:
    with pytest.raises(ProfilingError, match="no profile"):
        measure.stop()
    measure.start()
    with pytest.raises(ProfilingError, match="already"):
        measure.start()


def test_a_span_around_an_await_is_found_out() -> None:
    recorder = Recorder()
    first, second = recorder.span("queue"), recorder.span("wait")
    first.__enter__()
    second.__enter__()
    with pytest.raises(InvariantError, match="await"):
        first.__exit__(None, None, None)


def test_a_tally_counts_without_a_span_and_covers_the_open_one() -> None:
    measure.start()
    with measure.span("detokenize"):
        measure.tally("serialize", 100, 130)
        measure.tally("serialize", 200, 220)
    recording = measure.stop()
    [batch] = recording.spans
    assert (batch.name, batch.inner_ns) == ("detokenize", 50)
    total = recording.totals["serialize"]
    assert (total.count, total.total_ns, total.own_ns) == (2, 50, 50)


def test_a_recording_knows_its_process() -> None:
    measure.name_process("engine 3")
    try:
        measure.start()
        recording = measure.stop()
    finally:
        measure.name_process("host")
    assert (recording.process, recording.pid) == ("engine 3", os.getpid())


class Clocks:
    """Stands in for the module `time`: `work` moves both clocks, `wait` the wall clock only."""

    def __init__(self) -> None:
        self.wall_ns = self.cpu_ns = 0

    def work(self, ns: int) -> None:
        self.wall_ns, self.cpu_ns = self.wall_ns + ns, self.cpu_ns + ns

    def wait(self, ns: int) -> None:
        self.wall_ns += ns

    def perf_counter_ns(self) -> int:
        return self.wall_ns

    def thread_time_ns(self) -> int:
        return self.cpu_ns


def test_processor_time_tells_work_from_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    clocks = Clocks()
    monkeypatch.setattr(measure, "time", clocks)
    recorder = Recorder()
    with recorder.span("step"):
        clocks.work(10)
        with recorder.span("wait"):
            clocks.work(2)
            clocks.wait(100)
        clocks.wait(3)
        recorder.tally("send", clocks.wall_ns - 1, clocks.wall_ns, cpu_ns=9)  # a clock that ticks coarsely
    recorder.add("queue", 0, 50)
    recording = recorder.finish()
    (step,), (wait,), (queue,) = (recording.named(name) for name in ("step", "wait", "queue"))
    assert (wait.duration_ns, wait.cpu_ns, wait.own_cpu_ns) == (102, 2, 2)
    assert (step.duration_ns, step.cpu_ns, step.inner_cpu_ns, step.own_cpu_ns) == (115, 12, 3, 9)
    assert queue.cpu_ns is None and recording.totals["queue"].timed_ns == 0
    waited_ns = {name: total.waited_ns for name, total in recording.totals.items()}
    assert waited_ns == {"wait": 100, "step": 12 - 9, "send": 0, "queue": 0}


def test_processor_time_survives_the_codec() -> None:
    recording = record_nested()
    [decoded] = decode_recordings(encode_recordings([recording]))
    assert decoded == recording and all(span.cpu_ns is not None for span in decoded.spans)
