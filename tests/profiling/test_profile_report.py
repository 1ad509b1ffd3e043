"""Tables account for all of a recording's time, and the JSON agrees."""

from __future__ import annotations

import io

import pytest
from rich.console import Console, RenderableType

from tinyvllm.profiling.measure import Recorder, Recording, Span, Total
from tinyvllm.profiling.profile_report import outside_spans, recording_as_json, recording_table


def text_of(table: RenderableType) -> str:
    console = Console(width=140, file=io.StringIO())
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def make_recording() -> Recording:
    """100 us: one step of 60 that contains a pack of 20, and 5 in a queue, on no thread's stack."""
    spans = (
        Span("pack", 10_000, 30_000, "engine", 1),
        Span("step", 5_000, 65_000, "engine", 0, 20_000),
        Span("queue", 0, 5_000, "caller", -1),
    )
    totals = {span.name: Total(1, span.duration_ns, span.own_ns) for span in spans}
    return Recording(0, 100_000, spans, totals, {"syncs": 1}, 0)


def test_own_times_and_what_lies_outside_are_the_whole_time() -> None:
    document = recording_as_json(make_recording())
    own_s = sum(document["spans"][name]["own_s"] for name in ("step", "pack"))
    assert own_s + document["outside_s"]["engine"] == pytest.approx(document["wall_s"])


def test_the_table_has_a_row_for_each_name_and_for_the_rest() -> None:
    text = text_of(recording_table(make_recording()))
    for words in ("step", "pack", "queue", "outside spans (engine)", "40.0%", "syncs: 1"):
        assert words in text


def test_nothing_is_said_of_the_rest_where_spans_were_let_go() -> None:
    recorder = Recorder(max_spans=1)
    for _ in range(2):
        with recorder.span("step"):
            pass
    recording = recorder.finish()
    assert outside_spans(recording) == {}
    assert "1 earlier ones were dropped" in text_of(recording_table(recording))


def test_an_empty_recording_is_an_empty_table() -> None:
    assert "recorded" in text_of(recording_table(Recorder().finish()))
