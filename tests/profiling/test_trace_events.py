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


# What each phase of the Trace Event Format must have besides ph and pid.
REQUIRED = {
    "X": {"name", "cat", "tid", "ts", "dur"},
    "b": {"name", "cat", "tid", "ts", "id"},
    "e": {"name", "cat", "tid", "ts", "id"},
    "s": {"name", "cat", "tid", "ts", "id"},
    "t": {"name", "cat", "tid", "ts", "id"},
    "f": {"name", "cat", "tid", "ts", "id", "bp"},
    "M": {"name", "args"},
}


def make_processes() -> list[Recording]:
    """A front-end that submits a request and gets its last token back, and the engine in between."""
    front_end = (
        Span("submit", 1_000, 2_000, "loop", 0, 0, {"request": "cmpl-1"}),
        Span("call", 500, 2_500, "loop", -1, 0, {"request": "cmpl-1", "http": "1"}),
        Span("detokenize", 8_000, 9_000, "loop", 0, 0, {}),
        Span("answer", 8_100, 9_500, "loop", -1, 0, {"http": "1", "last_taken_ns": 8_100}),
    )
    engine = (
        Span("receive", 3_000, 3_500, "engine", 0, 0, {"request": "cmpl-1"}),
        Span("launch", 4_000, 5_000, "engine", 0, 0, {"bucket": "decode 1", "step": 1}),
        Span("wait", 5_000, 7_000, "engine", 0, 0, {"bucket": "decode 1", "step": 1}),
    )
    return [
        Recording(0, 20_000, front_end, {}, {"syncs": 1}, 0, "front-end 0", 17),
        Recording(0, 20_000, engine, {}, {"syncs": 2}, 5, "engine 0", 18),
    ]


def test_each_process_is_a_row_with_its_threads_and_its_device() -> None:
    document = trace_events(make_processes())
    rows = {(e["pid"], e.get("tid")): e["args"]["name"] for e in document["traceEvents"] if e["ph"] == "M"}
    assert rows == {
        (1, None): "front-end 0 (pid 17)",
        (1, 1): "loop",
        (3, None): "engine 0 (pid 18)",
        (3, 1): "engine",
        (4, None): "engine 0, device",
        (4, 1): "steps",
    }
    assert document["otherData"]["engine 0"] == {"dropped_spans": 5, "syncs": 2}


def test_an_arrow_follows_a_request_to_the_engine_and_back() -> None:
    arrows = [e for e in trace_events(make_processes())["traceEvents"] if e["ph"] in "stf"]
    assert [(e["ph"], e["pid"], e["ts"]) for e in arrows] == [("s", 1, 0.5), ("t", 3, 2.5), ("f", 1, 7.5)]
    assert {e["id"] for e in arrows} == {1} and arrows[0]["args"] == {"request": "cmpl-1"}


def test_all_events_have_the_fields_of_the_format() -> None:
    document = json.loads(json.dumps(trace_events(make_processes(), LAUNCHES)))
    events = document["traceEvents"]
    for event in events:
        assert event.keys() >= {"ph", "pid"} | REQUIRED[event["ph"]], event
        assert isinstance(event["pid"], int) and event.get("ts", 0) >= 0
    named = {(e["pid"], e["tid"]) for e in events if e["ph"] == "M" and "tid" in e}
    assert all((e["pid"], e["tid"]) in named for e in events if e["ph"] != "M")
    for begin in (e for e in events if e["ph"] == "b"):
        assert [e["ph"] for e in events if e.get("id") == begin["id"] and e["name"] == begin["name"]] == ["b", "e"]
    for flow in (e for e in events if e["ph"] in "stf"):  # it is bound to the slice that encloses it
        slices = [e for e in events if e["ph"] == "X" and (e["pid"], e["tid"]) == (flow["pid"], flow["tid"])]
        assert any(e["ts"] <= flow["ts"] <= e["ts"] + e["dur"] for e in slices)
