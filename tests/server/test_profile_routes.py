"""Recording on request: only with the flag, one at a time, and 403 or 409 otherwise."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import pytest

from tests.server.client import client_of, error_of
from tests.server.fake_engine import FakeEngine
from tinyvllm.errors import ProfilingError
from tinyvllm.profiling import measure
from tinyvllm.profiling.recording_codec import decode_recordings


@pytest.fixture(autouse=True)
def _off() -> Iterator[None]:
    yield
    for owner in (measure.CODE, measure.ROUTE, measure.FLAGS):
        with contextlib.suppress(ProfilingError):
            measure.stop(owner)


@pytest.mark.parametrize("path", ["/start_profile", "/stop_profile"])
async def test_a_server_without_the_flag_refuses(path: str) -> None:
    async with client_of(FakeEngine()) as client:
        response = await client.post(path)
    assert response.status_code == 403 and "--enable-profiling" in error_of(response)["message"]
    assert not measure.is_on()


async def test_the_time_between_start_and_stop_is_reported() -> None:
    async with client_of(FakeEngine(), enable_profiling=True) as client:
        assert (await client.post("/start_profile")).json()["status"] == "recording"
        with measure.span(measure.STEP, kind="decode"), measure.span(measure.PACK):
            pass
        document = (await client.post("/stop_profile")).json()
    assert document["spans"]["step"]["count"] == document["spans"]["pack"]["count"] == 1
    assert 0 < document["spans"]["pack"]["total_s"] <= document["spans"]["step"]["total_s"] <= document["wall_s"]


async def test_a_trace_is_returned_on_request() -> None:
    async with client_of(FakeEngine(), enable_profiling=True) as client:
        await client.post("/start_profile")
        with measure.span(measure.STEP):
            pass
        wrong = await client.post("/stop_profile", params={"format": "xml"})
        document = (await client.post("/stop_profile", params={"format": "trace"})).json()
    assert wrong.status_code == 400 and "xml" in error_of(wrong)["message"]
    assert "step" in {event["name"] for event in document["traceEvents"]}


async def test_recordings_are_returned_as_they_are() -> None:
    async with client_of(FakeEngine(), enable_profiling=True) as client:
        await client.post("/start_profile")
        with measure.span(measure.STEP, kind="decode"):
            pass
        response = await client.post("/stop_profile", params={"format": "recordings"})
    [recording] = decode_recordings(response.content)
    assert [span.facts for span in recording.named("step")] == [{"kind": "decode"}]
    assert recording.interpreter is not None and recording.interpreter.wall_ns > 0


async def test_the_table_has_the_process_and_its_requests() -> None:
    async with client_of(FakeEngine(), enable_profiling=True) as client:
        await client.post("/start_profile")
        document = (await client.post("/stop_profile")).json()
    assert document["process"]["pid"] == os.getpid() and document["process"]["cpu_share"] >= 0
    assert document["requests"]["requests"] == 0 and document["requests"]["stages"] == {}


async def test_one_recording_at_a_time() -> None:
    async with client_of(FakeEngine(), enable_profiling=True) as client:
        nothing = await client.post("/stop_profile")
        await client.post("/start_profile")
        second = await client.post("/start_profile")
    assert nothing.status_code == second.status_code == 409
    assert "start one first" in error_of(nothing)["message"] and "already" in error_of(second)["message"]


async def test_the_process_s_own_recording_is_not_stopped_by_a_client() -> None:
    """It would be lost: --profile and --trace write it when the process ends."""
    measure.start(owner=measure.FLAGS)
    async with client_of(FakeEngine(), enable_profiling=True) as client:
        refused = [await client.post("/start_profile"), await client.post("/stop_profile")]
    assert [response.status_code for response in refused] == [409, 409]
    assert all("--profile or --trace started it" in error_of(response)["message"] for response in refused)
    assert measure.stop(measure.FLAGS).wall_ns > 0
