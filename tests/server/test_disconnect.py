"""A client that leaves frees what its request holds, over real sockets."""

from __future__ import annotations

import asyncio
import socket
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from tests.server.client import raw_post
from tests.server.fake_engine import FakeEngine, serving
from tinyvllm.config import SamplingParams
from tinyvllm.server.context import RequestContext, as_current
from tinyvllm.server.events import ServerSentEvents
from tinyvllm.server.failures import ClientGone
from tinyvllm.server.generation import Item, Job, PromptCall
from tinyvllm.server.intake import event_stream
from tinyvllm.server.settings import ServerSettings
from tinyvllm.server.state import ServerState
from tinyvllm.server.streaming import EventStream, until_disconnect

BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "ab", "n": 2},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}]},
}


@pytest.mark.parametrize("path", BODIES)
def test_leaving_a_stream_ends_the_request(path: str) -> None:
    engine = FakeEngine(hang_after=3)
    with serving(engine) as url:
        with httpx.stream("POST", url + path, json={**BODIES[path], "stream": True}) as response:
            chunks = response.iter_text()  # keep a reference: httpx closes the response with its last iterator
            assert next(chunks).startswith("data: ")
            assert engine.running
        engine.wait_until(lambda: not engine.running)
        assert len(engine.closed) == 1
        assert httpx.get(url + "/health").status_code == 200


def test_leaving_a_stream_of_many_prompts_ends_them_all() -> None:
    engine = FakeEngine(hang_after=3)
    with serving(engine) as url:
        body = {"prompt": ["a", "b", "c"], "stream": True}
        with httpx.stream("POST", url + "/v1/completions", json=body) as response:
            chunks = response.iter_text()
            next(chunks)
            engine.wait_until(lambda: len(engine.running) == 3)
        engine.wait_until(lambda: not engine.running)
        assert len(engine.closed) == 3


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", BODIES)
def test_leaving_before_the_first_byte_ends_the_request(path: str, stream: bool) -> None:
    engine = FakeEngine(hang_before=True)
    with serving(engine) as url:
        with socket.create_connection((urlsplit(url).hostname, urlsplit(url).port)) as sock:
            sock.sendall(raw_post(path, {**BODIES[path], "stream": stream}))
            engine.wait_until(lambda: bool(engine.running))
        engine.wait_until(lambda: not engine.running)
        assert len(engine.closed) == 1


def test_clients_that_leave_do_not_disturb_those_that_stay() -> None:
    engine = FakeEngine()
    with serving(engine) as url:
        for _ in range(20):
            with httpx.stream("POST", url + "/v1/completions", json={"prompt": "a", "stream": True}) as response:
                next(response.iter_raw())
        whole = httpx.post(url + "/v1/completions", json={"prompt": "a", "max_tokens": 50}).json()
        assert whole["choices"][0]["text"] == engine.reply
        engine.wait_until(lambda: not engine.running)


# ---- The parts, without a socket ----


async def stay() -> dict[str, Any]:
    await asyncio.Event().wait()
    return {}


async def leave() -> dict[str, Any]:
    return {"type": "http.disconnect"}


class Texts(ServerSentEvents):
    """Events that are the items' texts."""

    def begin(self) -> bytes:
        return b""

    def take(self, item: Item) -> bytes:
        return item.delta.text.encode()

    def end(self) -> bytes:
        return b"."

    def fail(self, error: BaseException) -> bytes:
        return str(error).encode()


async def begin(engine: FakeEngine) -> EventStream:
    state = ServerState(engine, ServerSettings())  # type: ignore[arg-type]
    call = PromptCall([1], SamplingParams(max_tokens=50), request_id="r")
    return await event_stream(state, Job([call], n=1, arrival_s=0.0), Texts())


async def test_work_is_canceled_when_the_client_leaves() -> None:
    canceled = False

    async def work() -> None:
        nonlocal canceled
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            canceled = True
            raise

    with pytest.raises(ClientGone):
        await until_disconnect(leave, work())
    assert canceled


async def test_a_finished_result_is_returned_though_the_client_leaves() -> None:
    async def work() -> int:
        return 7

    assert await until_disconnect(leave, work()) == 7


async def test_work_is_canceled_with_the_caller() -> None:
    started, ended = asyncio.Event(), asyncio.Event()

    async def work() -> None:
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    task = asyncio.create_task(until_disconnect(stay, work()))
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended.is_set()


async def test_a_stream_that_is_never_sent_ends_with_its_request() -> None:
    engine, context = FakeEngine(hang_after=3), RequestContext("a")
    with as_current(context):
        await begin(engine)
    assert engine.running == {"r"}
    for close in context.closers:
        close()
    assert engine.closed == ["r"]


async def test_client_that_never_reads_ends_the_request() -> None:
    engine = FakeEngine()

    async def send(message: Any) -> None:
        await asyncio.Event().wait()  # a client whose TCP window is full

    await (await begin(engine))({"type": "http"}, leave, send)
    assert engine.closed == ["r"]


async def test_a_write_error_ends_the_request() -> None:
    engine = FakeEngine()

    async def send(message: Any) -> None:
        raise OSError("broken pipe")

    await (await begin(engine))({"type": "http"}, stay, send)
    assert engine.closed == ["r"]
