"""Requests with large bodies, which a front-end passes on to another that listens on a Unix socket."""

from __future__ import annotations

import asyncio
import gzip
import json
import logging
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest
import uvicorn
from hypothesis import given
from hypothesis import strategies as st

from tests.patience import PATIENCE_S
from tests.server.client import read_answer
from tests.server.fake_engine import FakeEngine
from tinyvllm.server.app import make_app
from tinyvllm.server.failures import ClientGone
from tinyvllm.server.front_ends import FrontEnds
from tinyvllm.server.large_lane import LARGE_BYTES
from tinyvllm.server.relay import ChunkDecoder, RequestBody
from tinyvllm.server.settings import ServerSettings
from tinyvllm.server.sockets import bind, bind_unix
from tinyvllm.server.state import ServerState
from tinyvllm.server.streaming import send_promptly


class Lanes:
    """A front-end with an engine of its own, and a large lane with another, so that it shows who answered."""

    def __init__(self, directory: Path, idle_timeout_s: float = PATIENCE_S) -> None:
        self.small, self.large = FakeEngine(reply="small"), FakeEngine(reply="large", max_model_len=10_000_000)
        uds = str(directory / "large")
        settings = ServerSettings(max_body_bytes=4 * LARGE_BYTES, idle_timeout_s=idle_timeout_s)
        lane = make_app(self.large, settings, FrontEnds(is_large_lane=True))  # type: ignore[arg-type]
        app = make_app(self.small, settings, FrontEnds(large_lane=uds))  # type: ignore[arg-type]
        self.states: tuple[ServerState, ServerState] = (lane.state.server, app.state.server)
        sock = bind("127.0.0.1", 0)
        self.address = sock.getsockname()
        self.url = f"http://127.0.0.1:{self.address[1]}"
        self._servers = [self._serve(lane, bind_unix(uds)), self._serve(app, sock)]

    def _serve(self, app: object, sock: socket.socket) -> tuple[uvicorn.Server, threading.Thread]:
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, timeout_graceful_shutdown=5))  # type: ignore[arg-type]
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
        thread.start()
        return server, thread

    def client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=self.url, headers={"content-type": "application/json"})

    def counts(self, name: str) -> list[str]:
        """The samples of a metric in both processes, but those that are 0."""
        lines = [line for state in self.states for line in state.metrics.render().decode().splitlines()]
        return [line for line in lines if line.startswith(name) and not line.endswith(" 0.0")]

    def cut(self) -> None:
        """Break the connections between the two, as the death of the large lane would."""
        for connection in list(self._servers[0][0].server_state.connections):
            connection.loop.call_soon_threadsafe(connection.transport.abort)

    def stop(self, index: int) -> None:
        server, thread = self._servers[index]
        server.should_exit = True
        thread.join()

    def close(self) -> None:
        for index in (1, 0):
            self.stop(index)


@pytest.fixture
def lanes(tmp_path: Path) -> Iterator[Lanes]:
    lanes = Lanes(tmp_path)
    yield lanes
    lanes.close()


@pytest.fixture
def hasty_lanes(tmp_path: Path) -> Iterator[Lanes]:
    """They do not wait for bodies."""
    lanes = Lanes(tmp_path, idle_timeout_s=0.3)
    yield lanes
    lanes.close()


def body_of(size: int, **fields: object) -> bytes:
    """A completion request of about `size` bytes whose prompt is small."""
    return json.dumps({"prompt": "hello", **fields}).encode().ljust(size)


async def test_only_large_bodies_take_the_large_lane(lanes: Lanes) -> None:
    async with lanes.client() as client:
        for size, text in (
            (100, "small"),
            (LARGE_BYTES, "small"),
            (LARGE_BYTES + 1, "large"),
            (2 * LARGE_BYTES, "large"),
        ):
            response = await client.post("/v1/completions", content=body_of(size))
            assert response.json()["choices"][0]["text"] == text, size
            assert response.headers["content-type"] == "application/json" and response.headers["x-request-id"]


async def test_a_body_of_unstated_length_is_passed_on_once_it_is_large(lanes: Lanes) -> None:
    async def parts(data: bytes) -> AsyncIterator[bytes]:
        for start in range(0, len(data), 50_000):
            yield data[start : start + 50_000]

    async with lanes.client() as client:
        for size, text in ((1000, "small"), (3 * LARGE_BYTES, "large")):
            response = await client.post("/v1/completions", content=parts(body_of(size)))
            assert response.json()["choices"][0]["text"] == text, size


async def test_a_compressed_body_is_large_by_what_it_stands_for(lanes: Lanes) -> None:
    headers = {"content-encoding": "gzip"}
    async with lanes.client() as client:
        for size, text in ((1000, "small"), (3 * LARGE_BYTES, "large")):
            content = gzip.compress(body_of(size))
            response = await client.post("/v1/completions", content=content, headers=headers)
            assert response.json()["choices"][0]["text"] == text, size
        bomb = await client.post("/v1/completions", content=gzip.compress(body_of(5 * LARGE_BYTES)), headers=headers)
        damaged = await client.post("/v1/completions", content=gzip.compress(body_of(100))[:-1], headers=headers)
        assert (bomb.status_code, damaged.status_code) == (413, 400)


async def test_a_stream_passes_event_by_event_and_errors_keep_their_status(lanes: Lanes) -> None:
    async with lanes.client() as client:
        async with client.stream(
            "POST", "/v1/completions?a=b", content=body_of(2 * LARGE_BYTES, stream=True)
        ) as response:
            lines = [line async for line in response.aiter_lines() if line.startswith("data: {")]
        assert "".join(json.loads(line[6:])["choices"][0]["text"] for line in lines) == "large" and len(lines) >= 5
        bad = await client.post("/v1/completions", content=b" " * 2 * LARGE_BYTES + b"{")
        assert bad.status_code == 400 and bad.json()["error"]["type"] == "invalid_request_error"
        too_large = await client.post("/v1/completions", content=body_of(5 * LARGE_BYTES))
        assert too_large.status_code == 413


async def test_a_client_that_leaves_ends_its_request_in_the_large_lane(lanes: Lanes) -> None:
    lanes.large.hang_after = 2
    async with lanes.client() as client:
        async with client.stream("POST", "/v1/completions", content=body_of(2 * LARGE_BYTES, stream=True)) as response:
            async for _ in response.aiter_lines():
                break
        await asyncio.to_thread(lanes.large.wait_until, lambda: lanes.large.closed and not lanes.large.running)


async def test_a_request_has_one_id_and_is_counted_once(lanes: Lanes) -> None:
    async with lanes.client() as client:
        response = await client.post(
            "/v1/completions", content=body_of(2 * LARGE_BYTES), headers={"x-request-id": "mine"}
        )
        own = await client.post("/v1/completions", content=body_of(2 * LARGE_BYTES))
    assert response.headers.get_list("x-request-id") == ["mine"] and response.json()["id"].startswith("cmpl-mine")
    assert own.json()["id"].startswith(f"cmpl-{own.headers['x-request-id']}")
    assert lanes.counts("http_requests_total") == [
        'http_requests_total{handler="/v1/completions",method="POST",status="2xx"} 2.0'
    ]


async def test_a_lane_that_is_gone_is_a_503(lanes: Lanes) -> None:
    lanes.stop(0)
    async with lanes.client() as client:
        response = await client.post("/v1/completions", content=body_of(2 * LARGE_BYTES))
        assert response.status_code == 503 and response.headers["retry-after"] and response.headers["x-request-id"]
        assert response.json()["error"]["code"] == "front_end_gone"
        (refusals,) = lanes.counts("tinyvllm:requests_refused_total")
        assert refusals.endswith('reason="unavailable"} 1.0')
        assert (await client.post("/v1/completions", content=body_of(10))).status_code == 200


async def test_a_lane_that_dies_ends_its_streams_with_an_error(lanes: Lanes, caplog: pytest.LogCaptureFixture) -> None:
    lanes.large.hang_after = 2
    async with lanes.client() as client:
        content = body_of(2 * LARGE_BYTES, stream=True)
        async with client.stream("POST", "/v1/completions", content=content) as response:
            lines = []
            async for line in response.aiter_lines():
                if line.startswith("data: "):
                    lines.append(line[6:])
                if len(lines) == 2:
                    lanes.cut()
    assert lines[-1] == "[DONE]" and json.loads(lines[-2])["error"]["code"] == "front_end_gone"
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == [
        "an answer ends too early: the front-end for large bodies has died: try again later"
    ]


async def test_lines_of_ollama_pass_and_end_with_its_error(lanes: Lanes) -> None:
    content = json.dumps({"model": "tiny", "prompt": "hello"}).encode().ljust(2 * LARGE_BYTES)
    async with httpx.AsyncClient(base_url=lanes.url) as client:  # without a content type, as curl's bodies are
        whole = await client.post("/api/generate", content=content)
        assert "".join(json.loads(line)["response"] for line in whole.text.splitlines()) == "large"
        lanes.large.hang_after = 2
        async with client.stream("POST", "/api/generate", content=content) as response:
            lines = []
            async for line in response.aiter_lines():
                lines.append(json.loads(line))
                if len(lines) == 2:
                    lanes.cut()
    assert [line["response"] for line in lines[:-1]] == ["l", "a"] and list(lines[-1]) == ["error"]


# ---- Clients that stall or leave ----

HEAD = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
STALLED = {
    "small": f"{HEAD}Content-Length: 1000\r\n\r\n{{",
    "large": f"{HEAD}Content-Length: 400000\r\n\r\n{{",
    "of unstated length, small yet": f"{HEAD}Transfer-Encoding: chunked\r\n\r\n5\r\n{{    \r\n",
    "of unstated length, large": f"{HEAD}Transfer-Encoding: chunked\r\n\r\n{300_000:x}\r\n{' ' * 300_000}\r\n",
}


@pytest.mark.parametrize("request_text", STALLED.values(), ids=STALLED)
def test_a_body_that_stalls_is_a_408(hasty_lanes: Lanes, request_text: str, caplog: pytest.LogCaptureFixture) -> None:
    lanes = hasty_lanes
    with socket.create_connection(lanes.address) as sock:
        sock.sendall(request_text.encode())
        answer = read_answer(sock).decode()
    assert answer.startswith("HTTP/1.1 408") and "the body did not arrive in time" in answer
    assert "x-request-id" in answer and not caplog.records
    lanes.small.wait_until(lambda: bool(lanes.counts("http_requests_total")))
    assert lanes.counts("http_requests_total") == [
        'http_requests_total{handler="/v1/completions",method="POST",status="4xx"} 1.0'
    ]


@pytest.mark.parametrize("request_text", STALLED.values(), ids=STALLED)
def test_a_client_that_leaves_in_its_body_is_not_logged(
    lanes: Lanes, request_text: str, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_connection(lanes.address) as sock:
        sock.sendall(request_text.encode())
        time.sleep(0.1)
    lanes.small.wait_until(lambda: bool(lanes.counts("http_requests_total")))
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@given(st.lists(st.integers(0, LARGE_BYTES), max_size=6))
async def test_what_was_read_to_see_the_size_is_not_lost(sizes: list[int]) -> None:
    messages = [
        {"type": "http.request", "body": bytes([index]) * size, "more_body": index < len(sizes) - 1}
        for index, size in enumerate(sizes)
    ] or [{"type": "http.request", "body": b"", "more_body": False}]
    whole = b"".join(bytes(message["body"]) for message in messages)  # type: ignore[call-overload]
    left = iter(messages)

    async def receive() -> dict[str, object]:
        return dict(next(left))

    body = RequestBody(receive)
    assert await body.read_beyond(LARGE_BYTES) == (len(whole) > LARGE_BYTES)
    assert b"".join([part async for part in body.parts()]) == whole


@given(st.lists(st.binary(min_size=1, max_size=40), max_size=8), st.lists(st.integers(1, 50), min_size=1))
def test_chunks_are_taken_apart_however_they_arrive(chunks: list[bytes], sizes: list[int]) -> None:
    wire = b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n\r\n"
    decoder, found, start = ChunkDecoder(), b"", 0
    for size in [*sizes, len(wire)]:
        assert decoder.is_complete == (start >= len(wire))
        found += decoder.feed(wire[start : start + size])
        start += size
    assert decoder.is_complete and found == b"".join(chunks)


async def test_a_client_that_does_not_read_counts_as_gone() -> None:
    sent: list[object] = []

    async def send(message: object) -> None:
        sent.append(message)
        if len(sent) > 1:
            await asyncio.Event().wait()

    await send_promptly(send, {"body": b"1"}, 0.01)
    with pytest.raises(ClientGone):
        await send_promptly(send, {"body": b"2"}, 0.01)
