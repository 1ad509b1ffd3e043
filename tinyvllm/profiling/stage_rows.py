"""The stages of many served requests as rows of figures, and who uses each process's interpreter, as JSON values."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from statistics import stdev
from typing import Any

from tinyvllm.profiling.measure import Recording
from tinyvllm.profiling.request_stages import STAGES, Delivery, Segment, Served, ServedRequest

RESIDUAL, WALL = "residual", "wall"


@dataclass(frozen=True)
class StageRow:
    """One stage of all requests. Times in ms, shares of the sum of all wall times."""

    stage: str
    p50_ms: float  # per request
    p99_ms: float
    mean_ms: float
    share: float
    first_ms: float  # mean until the first output; a request's last token is not in it
    token_ms: float  # mean per token after the first, while the engine decodes
    cpu_ms: float | None = None  # mean processor time of the engine's thread; None for stages outside it
    std_ms: float = 0.0  # per request: sample standard deviation


def stage_rows(requests: Sequence[ServedRequest]) -> list[StageRow]:
    """A row for each stage that has any time, then the residual and the wall time. [] without requests."""
    if not requests:
        return []
    wall_ns = sum(request.wall_ns for request in requests)
    num_gaps = max(1, sum(request.num_tokens - 1 for request in requests))
    whole = [_by_stage(request.segments) for request in requests]
    first = [_by_stage(request.first_segments) for request in requests]
    decode = _by_stage(segment for request in requests for segment in request.decode_segments)
    cpu_ns = _cpu_by_stage(segment for request in requests for segment in request.segments)

    def row(stage: str, each_ns: Sequence[int], first_ns: int, decode_ns: int) -> StageRow:
        ordered = sorted(each_ns)
        return StageRow(
            stage=stage,
            p50_ms=_percentile(ordered, 0.50) / 1e6,
            p99_ms=_percentile(ordered, 0.99) / 1e6,
            mean_ms=sum(each_ns) / len(each_ns) / 1e6,
            share=sum(each_ns) / wall_ns,
            first_ms=first_ns / len(requests) / 1e6,
            token_ms=decode_ns / num_gaps / 1e6,
            cpu_ms=cpu_ns[stage] / len(requests) / 1e6 if stage in cpu_ns else None,
            std_ms=stdev(each_ns) / 1e6 if len(each_ns) > 1 else 0.0,
        )

    rows = []
    for stage in STAGES:
        each_ns = [one.get(stage, 0) for one in whole]
        first_ns = sum(one.get(stage, 0) for one in first)
        if any(each_ns) or first_ns:  # a stage may be known of the first output alone
            rows.append(row(stage, each_ns, first_ns, decode.get(stage, 0)))
    to_first_ns = sum(request.first_ns - request.start_ns for request in requests)
    first_rest_ns = to_first_ns - sum(sum(one.values()) for one in first)
    window_ns = sum(request.last_token_ns - request.first_token_ns for request in requests)
    decode_rest_ns = window_ns - sum(decode.values())
    rows.append(row(RESIDUAL, [request.residual_ns for request in requests], first_rest_ns, decode_rest_ns))
    rows.append(row(WALL, [request.wall_ns for request in requests], to_first_ns, window_ns))
    return rows


def served_as_json(served: Served) -> dict[str, Any]:
    """Stages, delivery, and how many requests were followed and left out."""
    rows = {row.stage: row for row in stage_rows(served.requests)}
    return {
        "requests": len(served.requests),
        "left_out": served.num_left_out,
        "residual_share": rows[RESIDUAL].share if rows else None,
        "stages": {stage: {k: v for k, v in asdict(row).items() if k != "stage"} for stage, row in rows.items()},
        "delivery": delivery_as_json(served.delivery),
    }


def delivery_as_json(delivery: Delivery) -> dict[str, Any]:
    """Means in ms: of a message's way back, and of what an event takes in its front-end."""
    events, batches = max(1, delivery.num_events), max(1, delivery.num_batches)
    return {
        "messages": delivery.num_batches,
        "events": delivery.num_events,
        "hop_back_ms": delivery.hop_back_ns / batches / 1e6,
        "detokenize_ms": delivery.detokenize_ns / events / 1e6,
        "serialize_ms": delivery.serialize_ns / events / 1e6,
        "send_ms": delivery.send_ns / events / 1e6,
    }


def process_as_json(recording: Recording) -> dict[str, Any]:
    """A process's use of the processor, and of its interpreter lock; shares are of the recording's wall time."""
    watched = recording.interpreter
    process: dict[str, Any] = {"name": recording.process, "pid": recording.pid, "wall_s": recording.wall_ns / 1e9}
    if watched is None:
        return process
    lock = watched.lock
    return process | {
        "cpu_share": watched.cpu_ns / watched.wall_ns,
        "threads": [
            {
                "name": thread.name,
                "cpu_share": thread.cpu_ns / watched.wall_ns,
                "core_wait_share": thread.core_wait_ns / watched.wall_ns,
            }
            for thread in watched.threads
        ],
        "lock": None
        if lock is None
        else {
            "held_share": lock.held_share,
            "held_error": lock.held_error,
            "probes": lock.num_probes,
            "mean_wait_ms": lock.mean_ns / 1e6,
            "p99_wait_ms": lock.p99_ns / 1e6,
            "max_wait_ms": lock.max_ns / 1e6,
            "floor_ms": lock.floor_ns / 1e6,
            "core_wait_ms": lock.core_wait_ns / 1e6,
            "holders": [
                {"thread": one.thread, "where": one.where, "share": one.num_probes / lock.num_probes}
                for one in lock.holders
            ],
        },
    }


def _by_stage(segments: Iterable[Segment]) -> dict[str, int]:
    """Nanoseconds of each stage."""
    sums: dict[str, int] = {}
    for segment in segments:
        sums[segment.stage] = sums.get(segment.stage, 0) + segment.duration_ns
    return sums


def _cpu_by_stage(segments: Iterable[Segment]) -> dict[str, int]:
    """Processor time of each stage that runs on the engine's thread, in ns."""
    sums: dict[str, int] = {}
    for segment in segments:
        if segment.cpu_ns is not None:
            sums[segment.stage] = sums.get(segment.stage, 0) + segment.cpu_ns
    return sums


def _percentile(ordered: Sequence[int], share: float) -> float:
    """Interpolated linearly between neighbors."""
    place = (len(ordered) - 1) * share
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)
