"""Requests with large bodies, which a front-end passes on to another that listens on a Unix socket."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest
import uvicorn
from hypothesis import given
from hypothesis import strategies as st

from tests.server.fake_engine import FakeEngine
from tinyvllm.server.app import make_app
from tinyvllm.server.large_lane import LARGE_BYTES, LargeLane, _Body
from tinyvllm.server.settings import ServerSettings
from tinyvllm.server.sockets import bind, bind_unix


class Lanes:
    """A front-end with an engine of its own, and a large lane with another, so that it shows who answered."""

    def __init__(self, directory: Path) -> None:
        self.small, self.large = FakeEngine(reply="small"), FakeEngine(reply="large", max_model_len=10_000_000)
        uds = str(directory / "large")
        self._servers = [
            self._serve(make_app(self.large, ServerSettings(max_body_bytes=4 * LARGE_BYTES)), bind_unix(uds)),  # type: ignore[arg-type]
        ]
        sock = bind("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{sock.getsockname()[1]}"
        self._servers.append(self._serve(LargeLane(make_app(self.small), uds), sock))  # type: ignore[arg-type]

    def _serve(self, app: object, sock: socket.socket) -> tuple[uvicorn.Server, threading.Thread]:
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, timeout_graceful_shutdown=5))  # type: ignore[arg-type]
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
        thread.start()
        return server, thread

    def client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=self.url, headers={"content-type": "application/json"})

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


async def test_a_lane_that_is_gone_is_a_503(lanes: Lanes) -> None:
    lanes.stop(0)
    async with lanes.client() as client:
        response = await client.post("/v1/completions", content=body_of(2 * LARGE_BYTES))
        assert response.status_code == 503 and response.headers["retry-after"]
        assert (await client.post("/v1/completions", content=body_of(10))).status_code == 200


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

    body = _Body(receive)
    assert await body.is_large({"headers": []}) == (len(whole) > LARGE_BYTES)
    assert b"".join([chunk async for chunk in body.chunks()]) == whole
