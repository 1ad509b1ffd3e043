"""Host spans and device kernels on one timeline, as JSON for Perfetto (ui.perfetto.dev) and chrome://tracing.

The format is the "Trace Event Format": complete events (X), asynchronous events (b, e) for spans outside the threads'
stacks, and metadata (M).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from tinyvllm.profiling.kernels import Launch
from tinyvllm.profiling.measure import LAUNCH, STEP, WAIT, Recording, Span

HOST, DEVICE = 1, 2  # process numbers


def trace_events(recording: Recording | None, launches: Sequence[Launch] = ()) -> dict[str, Any]:
    """The JSON document. Times are microseconds since the first event."""
    spans = recording.spans if recording is not None else ()
    if recording is not None:
        launches = [*device_steps(recording), *launches]
    first_ns = min([span.start_ns for span in spans] + [launch.start_ns for launch in launches], default=0)
    events = [*_metadata(HOST, "host", _order(span.thread for span in spans))]
    events += _metadata(DEVICE, "device", _order(launch.device for launch in launches))
    threads, devices = _order(span.thread for span in spans), _order(launch.device for launch in launches)
    for number, span in enumerate(spans):
        events += _span_events(span, threads[span.thread], first_ns, number)
    for launch in launches:
        events.append(
            _complete(launch.label, "kernel", DEVICE, devices[launch.device], launch.start_ns - first_ns)
            | {"dur": launch.seconds * 1e6, "args": {"program": launch.program}}
        )
    document: dict[str, Any] = {"traceEvents": events, "displayTimeUnit": "ms"}
    if recording is not None:
        document["otherData"] = {"dropped_spans": recording.num_dropped, **recording.counts}
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


def trace_text(recording: Recording | None, launches: Sequence[Launch] = ()) -> str:
    """The JSON document as the text of a file."""
    return json.dumps(trace_events(recording, launches)) + "\n"


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


def _span_events(span: Span, thread: int, first_ns: int, number: int) -> list[dict[str, Any]]:
    start_ns, facts = span.start_ns - first_ns, dict(span.facts)
    if span.depth >= 0:
        event = _complete(span.name, "host", HOST, thread, start_ns)
        return [event | {"dur": span.duration_ns / 1e3, "args": facts}]
    shared = {"name": span.name, "cat": "host", "id": number, "pid": HOST, "tid": thread}
    return [
        shared | {"ph": "b", "ts": start_ns / 1e3, "args": facts},
        shared | {"ph": "e", "ts": (start_ns + span.duration_ns) / 1e3},
    ]


def _complete(name: str, category: str, process: int, thread: int, start_ns: int) -> dict[str, Any]:
    return {"name": name, "cat": category, "ph": "X", "pid": process, "tid": thread, "ts": start_ns / 1e3}
