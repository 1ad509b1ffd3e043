"""Host spans and device kernels on one timeline, as JSON for Perfetto (ui.perfetto.dev) and chrome://tracing.

The format is the "Trace Event Format": complete events (X), asynchronous events (b, e) for spans outside the threads'
stacks, flow events (s, t, f) for a request's way through threads and processes, and metadata (M). Each recorded process
is a row of its own; another row below it shows the steps of its device.
"""

from __future__ import annotations

import itertools
import json
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from tinyvllm.profiling.kernels import Kernel, Launch
from tinyvllm.profiling.measure import ANSWER, CALL, DETOKENIZE, LAUNCH, RECEIVE, STEP, SUBMIT, WAIT, Recording, Span

HOST, DEVICE = 1, 2  # process numbers of the first recording; those of the next are 3 and 4


def trace_events(recorded: Recording | Sequence[Recording] | None, launches: Sequence[Launch] = ()) -> dict[str, Any]:
    """The JSON document of one or more processes. Times are microseconds since the first event.

    launches: kernels that were timed apart, on the device of the first process."""
    recordings = [recorded] if isinstance(recorded, Recording) else list(recorded or ())
    devices = [device_steps(recording) for recording in recordings] or [[]]
    devices[0] += launches
    starts = [span.start_ns for recording in recordings for span in recording.spans]
    first_ns = min(starts + [launch.start_ns for device in devices for launch in device], default=0)
    events: list[dict[str, Any]] = []
    ids = itertools.count()
    for place, recording in enumerate(recordings):
        events += _host_events(recording, HOST + 2 * place, len(recordings) > 1, first_ns, ids)
    for place, device in enumerate(devices):
        name = "device" if len(recordings) < 2 else f"{recordings[place].process}, device"
        events += _device_events(device, DEVICE + 2 * place, name, first_ns)
    events += _flow_events(recordings, first_ns)
    document: dict[str, Any] = {"traceEvents": events, "displayTimeUnit": "ms"}
    counts = {one.process: {"dropped_spans": one.num_dropped, **one.counts} for one in recordings}
    if recordings:
        document["otherData"] = counts if len(recordings) > 1 else counts[recordings[0].process]
    return document


def device_steps(recording: Recording) -> list[Launch]:
    """The steps as the host sees the device work on them: from the step's launch, or the end of the previous step,
    until its tokens were read. Steps with only one end in the recording are left out."""
    launched = {span.facts["step"]: span.end_ns for span in recording.named(LAUNCH) if "step" in span.facts}
    steps, free_ns = [], 0
    for wait in recording.named(WAIT):
        number = wait.facts.get("step")
        if number in launched:
            start_ns = max(launched[number], free_ns)
            free_ns = wait.end_ns
            seconds = (wait.end_ns - start_ns) / 1e9
            steps.append(Launch(str(wait.facts.get("bucket", STEP)), "a whole step", "steps", start_ns, seconds))
    return steps


def in_turn(kernels: Sequence[Kernel]) -> list[Launch]:
    """The kernels of a log one after the other: it has the time of each, but not when it began."""
    launches, now_s = [], 0.0
    for kernel in kernels:
        launches.append(Launch(kernel.label, kernel.program, kernel.device, round(now_s * 1e9), kernel.seconds))
        now_s += kernel.seconds
    return launches


def trace_text(recorded: Recording | Sequence[Recording] | None, launches: Sequence[Launch] = ()) -> str:
    """The JSON document as the text of a file."""
    return json.dumps(trace_events(recorded, launches)) + "\n"


def _host_events(
    recording: Recording, process: int, shows_pid: bool, first_ns: int, ids: Iterator[int]
) -> list[dict[str, Any]]:
    threads = _order(span.thread for span in recording.spans)
    name = f"{recording.process} (pid {recording.pid})" if shows_pid else recording.process
    events = _metadata(process, name, threads)
    for span in recording.spans:
        events += _span_events(span, process, threads[span.thread], first_ns, next(ids))
    return events


def _device_events(launches: Sequence[Launch], process: int, name: str, first_ns: int) -> list[dict[str, Any]]:
    rows = _order(launch.device for launch in launches)
    events = _metadata(process, name, rows)
    for launch in launches:
        event = _complete(launch.label, "kernel", process, rows[launch.device], launch.start_ns - first_ns)
        events.append(event | {"dur": launch.seconds * 1e6, "args": {"program": launch.program}})
    return events


def _flow_events(recordings: Sequence[Recording], first_ns: int) -> list[dict[str, Any]]:
    """Arrows from each request's submission to the engine's loop and back to the message with its last token."""
    stops: dict[str, list[tuple[int, int, int]]] = {}  # request -> time, process and thread of the spans on its way
    for place, recording in enumerate(recordings):
        process, threads = HOST + 2 * place, _order(span.thread for span in recording.spans)
        for request, span in _stops(recording):
            stops.setdefault(request, []).append((span.start_ns, process, threads[span.thread]))
    events: list[dict[str, Any]] = []
    for number, (request, way) in enumerate(stops.items(), 1):
        for place, (time_ns, process, thread) in enumerate(sorted(way) if len(way) > 1 else ()):
            phase = "s" if place == 0 else "f" if place == len(way) - 1 else "t"
            event = {"name": "request", "cat": "request", "ph": phase, "id": number, "pid": process, "tid": thread}
            event |= {"ts": (time_ns - first_ns) / 1e3, "args": {"request": request}}
            events.append(event | ({"bp": "e"} if phase == "f" else {}))
    return events


def _stops(recording: Recording) -> Iterator[tuple[str, Span]]:
    """The engine's ids of requests, each with a span through which its arrow passes."""
    for span in (*recording.named(SUBMIT), *recording.named(RECEIVE)):
        yield str(span.facts["request"]), span
    request_of = {call.facts["http"]: str(call.facts["request"]) for call in recording.named(CALL)}
    batches = sorted(recording.named(DETOKENIZE), key=lambda span: span.start_ns)
    starts = [span.start_ns for span in batches]
    for answer in recording.named(ANSWER):
        place = bisect_right(starts, int(answer.facts["last_taken_ns"])) - 1
        if place >= 0 and answer.facts["http"] in request_of:
            yield request_of[answer.facts["http"]], batches[place]


def _order(names: Iterable[str]) -> dict[str, int]:
    """Number the names from 1, in order of first appearance."""
    numbers: dict[str, int] = {}
    for name in names:
        numbers.setdefault(name, len(numbers) + 1)
    return numbers


def _metadata(process: int, name: str, threads: dict[str, int]) -> list[dict[str, Any]]:
    if not threads:
        return []
    rows = [{"name": "process_name", "ph": "M", "pid": process, "args": {"name": name}}]
    rows += [
        {"name": "thread_name", "ph": "M", "pid": process, "tid": number, "args": {"name": thread}}
        for thread, number in threads.items()
    ]
    return rows


def _span_events(span: Span, process: int, thread: int, first_ns: int, number: int) -> list[dict[str, Any]]:
    start_ns, facts = span.start_ns - first_ns, dict(span.facts)
    if span.depth >= 0:
        event = _complete(span.name, "host", process, thread, start_ns)
        if span.cpu_ns is not None:
            event |= {"tdur": span.cpu_ns / 1e3}  # the thread's own time, as Perfetto's "thread duration"
        return [event | {"dur": span.duration_ns / 1e3, "args": facts}]
    shared = {"name": span.name, "cat": "host", "id": number, "pid": process, "tid": thread}
    return [
        shared | {"ph": "b", "ts": start_ns / 1e3, "args": facts},
        shared | {"ph": "e", "ts": (start_ns + span.duration_ns) / 1e3},
    ]


def _complete(name: str, category: str, process: int, thread: int, start_ns: int) -> dict[str, Any]:
    return {"name": name, "cat": category, "ph": "X", "pid": process, "tid": thread, "ts": start_ns / 1e3}
