"""The stages of a served request divide its wall time, from its head to its last byte, over real HTTP."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.server.device import Device
from tinyvllm.profiling import measure
from tinyvllm.profiling.measure import Recording
from tinyvllm.profiling.request_stages import STAGES, ClientTimes, Segment, ServedRequest, assemble

FIRST_STAGES = {"completions": {"parse", "tokenize"}, "chat/completions": {"parse", "template", "tokenize"}}


@pytest.fixture(autouse=True)
def _off() -> Iterator[None]:
    yield
    if measure.is_on():
        measure.stop()


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    """A device whose runner has the spans of execution's."""
    device = Device()
    for name, stage in (("launch", measure.LAUNCH), ("collect", measure.WAIT)):
        monkeypatch.setattr(device.runner, name, in_span(stage, getattr(device.runner, name)))
    return device


def in_span(stage: str, function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def call(argument: Any) -> Any:
        with measure.span(stage):
            return function(argument)

    return call


def stream(url: str, path: str, number: int, num_tokens: int = 9) -> str:
    """Read a whole stream; returns the id of its HTTP request."""
    prompt = (
        {"prompt": f"{number}" * 30} if path == "completions" else {"messages": [{"role": "user", "content": "hi"}]}
    )
    body = {"max_tokens": num_tokens, "stream": True, **prompt}
    response = httpx.post(f"{url}/v1/{path}", json=body, headers={"x-request-id": f"test-{number}"})
    assert response.text.endswith("data: [DONE]\n\n")
    return response.headers["x-request-id"]


def record(url: str, path: str, count: int = 1, num_tokens: int = 9) -> Recording:
    measure.start()
    with ThreadPoolExecutor(count) as clients:
        list(clients.map(lambda number: stream(url, path, number, num_tokens), range(count)))
    httpx.get(url + "/health")  # on the same event loop, so the streams before it are closed
    return measure.stop()


def split(whole: Recording, name: str, has: Callable[[str], bool]) -> Recording:
    """The spans of the threads that `has` accepts, as the recording of a process of that name."""
    return dataclasses.replace(whole, process=name, spans=tuple(span for span in whole.spans if has(span.thread)))


def check_partition(segments: tuple[Segment, ...], start_ns: int, end_ns: int) -> None:
    """The segments are in order, disjoint and inside of [start_ns, end_ns)."""
    assert all(segment.start_ns < segment.end_ns for segment in segments)
    assert all(before.end_ns <= after.start_ns for before, after in itertools.pairwise(segments))
    assert segments[0].start_ns == start_ns and segments[-1].end_ns == end_ns


def check_request(request: ServedRequest) -> None:
    check_partition(request.segments, request.start_ns, request.end_ns)
    check_partition(request.first_segments, request.start_ns, request.first_ns)
    covered_ns = sum(segment.duration_ns for segment in request.segments)
    assert 0 <= request.residual_ns == request.wall_ns - covered_ns
    stages = [segment.stage for segment in request.segments]
    assert set(stages) <= set(STAGES)
    assert all(0 <= segment.cpu_ns <= segment.duration_ns for segment in request.segments if segment.cpu_ns is not None)
    assert {segment.stage for segment in request.segments if segment.cpu_ns} >= {"commit", "loop"}
    assert stages.index("hop") < stages.index("prefill") < stages.index("decode") < stages.index("hop back")


@pytest.mark.parametrize("path", FIRST_STAGES)
def test_the_stages_of_a_stream_divide_its_wall_time(device: Device, url: str, path: str) -> None:
    served = assemble([record(url, path)])
    [request] = served.requests
    assert served.num_left_out == 0 and request.http_id == "test-0"
    check_request(request)
    stages = {segment.stage for segment in request.segments}
    assert stages >= {"admission", "schedule", "commit", "serialize", "send"} | FIRST_STAGES[path]
    assert request.num_tokens > 1


def test_requests_that_run_together_are_told_apart(device: Device, url: str) -> None:
    device.generate_endlessly(step_s=0)
    served = assemble([record(url, "completions", count=4)])
    assert {request.http_id for request in served.requests} == {f"test-{number}" for number in range(4)}
    for request in served.requests:
        check_request(request)
        assert request.num_tokens == 9
    delivery = served.delivery
    assert delivery.num_events == 4 * 9 and 9 <= delivery.num_batches <= 36
    assert min(delivery.detokenize_ns, delivery.serialize_ns, delivery.send_ns) > 0


def test_a_preempted_request_is_in_the_queue_once(device: Device, url: str) -> None:
    """Four requests need more blocks than there are. The engine knows when each last left the queue: some after their
    first tokens."""
    device.generate_endlessly(step_s=0.01)  # slow enough that the four run at once
    served = assemble([record(url, "completions", count=4, num_tokens=60)])
    assert device.stats.num_preemptions > 0 and len(served.requests) == 4
    for request in served.requests:
        check_request(request)


def test_the_client_s_times_are_the_borders(device: Device, url: str) -> None:
    recording = record(url, "completions")
    [alone] = assemble([recording]).requests
    client = ClientTimes(alone.start_ns - 1000, alone.first_ns + 10, alone.end_ns + 2000)
    [request] = assemble([recording], {"test-0": client}).requests
    assert request.segments[0] == Segment("accept", alone.start_ns - 1000, alone.start_ns)
    assert request.segments[-1] == Segment("transfer", alone.end_ns, alone.end_ns + 2000)
    assert (request.wall_ns, request.residual_ns) == (alone.wall_ns + 3000, alone.residual_ns)
    early = ClientTimes(alone.start_ns, alone.first_ns - 10, alone.end_ns - 10)  # it reads before the server's clock
    [request] = assemble([recording], {"test-0": early}).requests
    check_request(request)
    assert assemble([recording], {"another": client}).requests == ()


def test_what_is_not_one_recorded_stream_is_left_out(device: Device, url: str) -> None:
    measure.start()
    httpx.post(url + "/v1/completions", json={"prompt": "x", "max_tokens": 2})
    httpx.post(url + "/v1/completions", json={"prompt": "x", "max_tokens": 2, "n": 2, "stream": True})
    httpx.get(url + "/health")
    served = assemble([measure.stop()])
    assert (served.requests, served.num_left_out) == ((), 2)


def test_processes_are_put_together(device: Device, url: str) -> None:
    """The spans of one process, dealt to two recordings as if its threads were processes."""
    whole = record(url, "completions")
    [engine_thread] = {span.thread for span in whole.named("step")}
    parts = [
        split(whole, "front-end 0", lambda thread: thread != engine_thread),
        split(whole, "engine 0", lambda thread: thread == engine_thread),
    ]
    [alone], [request] = assemble([whole]).requests, assemble(parts).requests
    assert (request.front_end, request.engine) == ("front-end 0", "engine 0")
    assert request.segments == alone.segments
