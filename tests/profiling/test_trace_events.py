"""Traces for Perfetto and chrome://tracing: events are in order, nest, and are complete."""

from __future__ import annotations

import json

from tinyvllm.profiling.kernels import Launch
from tinyvllm.profiling.measure import Recorder, Recording, Span
from tinyvllm.profiling.trace_events import device_steps, trace_events, trace_text


def make_recording() -> Recording:
    recorder = Recorder()
    with recorder.span("step", kind="decode", bucket="decode 1"), recorder.span("pack"):
        pass
    recorder.add("queue", 10, 4_000_010)
    recorder.count("syncs", 3)
    return recorder.finish()


LAUNCHES = (Launch("layer 0 · qkv", "qkv_1", "CPU", 1_000, 2e-6), Launch("head", "lm_head", "CPU:1", 3_000, 4e-6))


def test_every_span_and_launch_is_an_event() -> None:
    events = trace_events(make_recording(), LAUNCHES)["traceEvents"]
    complete = {event["name"]: event for event in events if event["ph"] == "X"}
    assert set(complete) == {"step", "pack", "layer 0 · qkv", "head"}
    assert complete["step"]["args"] == {"kind": "decode", "bucket": "decode 1"}
    assert complete["layer 0 · qkv"]["dur"] == 2.0 and complete["head"]["args"] == {"program": "lm_head"}
    assert all(event["ts"] >= 0 and event["dur"] >= 0 for event in complete.values())


def test_what_lies_in_no_thread_is_a_pair() -> None:
    events = trace_events(make_recording())["traceEvents"]
    begin, end = (event for event in events if event["name"] == "queue")
    assert (begin["ph"], end["ph"], begin["id"]) == ("b", "e", end["id"])
    assert end["ts"] - begin["ts"] == 4_000.0


def test_inner_spans_lie_inside_of_outer_ones() -> None:
    events = {event["name"]: event for event in trace_events(make_recording())["traceEvents"] if event["ph"] == "X"}
    step, pack = events["step"], events["pack"]
    assert step["tid"] == pack["tid"]
    assert step["ts"] <= pack["ts"] and pack["ts"] + pack["dur"] <= step["ts"] + step["dur"]


def test_the_device_has_a_row_of_steps_that_do_not_overlap() -> None:
    """Two steps in flight: the second is launched before the first is read, and begins when the first ends."""
    spans = (
        Span("wait", 0, 900, "engine", 1, 0, {"bucket": "decode 1", "step": 6}),  # launched before the recording
        Span("launch", 1_000, 2_000, "engine", 1, 0, {"bucket": "decode 1", "step": 7}),
        Span("launch", 3_000, 4_000, "engine", 1, 0, {"bucket": "decode 1", "step": 8}),
        Span("wait", 4_000, 9_000, "engine", 1, 0, {"bucket": "decode 1", "step": 7}),
        Span("launch", 9_100, 9_200, "engine", 1, 0, {"bucket": "decode 1", "step": 9}),  # never read
        Span("wait", 9_300, 12_000, "engine", 1, 0, {"bucket": "decode 1", "step": 8}),
    )
    steps = device_steps(Recording(0, 20_000, spans, {}, {}, 0))
    assert [(step.label, step.start_ns, round(step.seconds * 1e9)) for step in steps] == [
        ("decode 1", 2_000, 7_000),
        ("decode 1", 9_000, 3_000),
    ]


def test_threads_and_devices_have_names() -> None:
    events = trace_events(make_recording(), LAUNCHES)["traceEvents"]
    names = {(e["pid"], e.get("tid")): e["args"]["name"] for e in events if e["ph"] == "M"}
    assert {names[2, 1], names[2, 2]} == {"CPU", "CPU:1"} and "MainThread" in names.values()
    assert all((e["pid"], e["tid"]) in names for e in events if e["ph"] != "M")


def test_a_file_is_json_with_the_counts() -> None:
    document = json.loads(trace_text(make_recording(), LAUNCHES))
    assert document["otherData"] == {"dropped_spans": 0, "syncs": 3}


def test_nothing_recorded_is_an_empty_trace() -> None:
    assert trace_events(None)["traceEvents"] == []
