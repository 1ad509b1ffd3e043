"""Full queues, long requests, silent clients, engines that stall, and bad settings: each is answered by an error."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from tests.patience import jump_over_waits
from tests.server.client import CHAT, client_of, error_of, post, raw_post
from tests.server.fake_engine import FakeEngine, serving
from tinyvllm.errors import RequestError, TinyvllmError
from tinyvllm.scheduling.plan import StepStats
from tinyvllm.server.app import make_app
from tinyvllm.server.context import RequestContext
from tinyvllm.server.events import KEEPALIVE
from tinyvllm.server.request_limits import Admission, QueueFullError
from tinyvllm.server.settings import Cors, ServerSettings

HANGING = {"prompt": "ab", "stream": True}


# ---- The queue ----


def test_requests_beyond_the_queue_are_refused_and_may_be_retried() -> None:
    engine = FakeEngine(hang_after=3)  # of 4 sequences at once
    with serving(engine, max_num_queued_requests=1) as url, httpx.Client(base_url=url) as client:
        with client.stream("POST", "/v1/completions", json={**HANGING, "n": 4}) as first:
            chunks = first.iter_raw()  # keep a reference: httpx closes the response with its last iterator
            next(chunks)
            with httpx.stream("POST", url + "/v1/completions", json=HANGING) as second:
                more_chunks = second.iter_raw()
                next(more_chunks)
                for body in ({"prompt": "x"}, {"prompt": "x", "stream": True}):
                    refused = httpx.post(url + "/v1/completions", json=body)
                    assert refused.status_code == 429 and refused.headers["retry-after"] == "1"
                    error = refused.json()["error"]
                    assert (error["type"], error["code"]) == ("rate_limit_error", "queue_full")
                    assert "at most 1 may be" in error["message"] and "--max-num-queued-requests" in error["message"]
        engine.wait_until(lambda: not engine.running)
        engine.hang_after = None
        assert httpx.post(url + "/v1/completions", json={"prompt": "x"}).status_code == 200
        text = httpx.get(url + "/metrics").text
    assert 'tinyvllm:requests_refused_total{engine="0",model_name="tiny",reason="queue_full"} 2.0' in text


async def test_a_request_larger_than_the_queue_is_a_bad_request() -> None:
    response = await post(FakeEngine(), "/v1/completions", {"prompt": "x", "n": 6}, max_num_queued_requests=1)
    assert response.status_code == 400 and error_of(response)["param"] == "n"
    assert "5 at most" in error_of(response)["message"]
    many = {"prompt": ["x"] * 6}
    response = await post(FakeEngine(), "/v1/completions", many, max_num_queued_requests=1)
    assert response.status_code == 400 and error_of(response)["param"] == "prompt"


async def test_a_full_queue_does_not_take_the_server_out_of_rotation() -> None:
    engine = FakeEngine(hang_before=True)
    app = make_app(engine, ServerSettings(max_num_queued_requests=0))  # type: ignore[arg-type]
    app.state.server.admission.admit(RequestContext("a"), 4, 10, max_num_seqs=4)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        assert (await client.post("/v1/completions", json={"prompt": "x"})).status_code == 429
        assert (await client.get("/ready")).status_code == 200
        assert (await client.get("/v1/models")).status_code == 200


def test_waiting_tokens_are_bounded_but_a_long_prompt_alone_is_admitted() -> None:
    admission = Admission(ServerSettings(max_num_queued_tokens=100))
    first, second, third = (RequestContext(name) for name in "abc")
    admission.admit(first, 1, 1000, max_num_seqs=4)  # nothing waits, so it may have any length
    with pytest.raises(QueueFullError, match="1000 prompt tokens are waiting and this prompt has 1"):
        admission.admit(second, 1, 1, max_num_seqs=4)
    admission.prompt_computed(first, 1000)
    admission.admit(second, 1, 60, max_num_seqs=4)
    admission.admit(second, 1, 40, max_num_seqs=4)
    with pytest.raises(QueueFullError):
        admission.admit(third, 1, 1, max_num_seqs=4)
    for context in (first, second, third):
        admission.release(context)
        admission.release(context)  # a second release changes nothing
    assert (admission.num_seqs, admission.num_waiting_tokens) == (0, 0)


def test_refused_requests_hold_nothing() -> None:
    admission = Admission(ServerSettings(max_num_queued_requests=0))
    context = RequestContext("a")
    admission.admit(context, 3, 10, max_num_seqs=4)
    with pytest.raises(QueueFullError):
        admission.admit(RequestContext("b"), 2, 10, max_num_seqs=4)
    with pytest.raises(RequestError):
        admission.admit(RequestContext("c"), 5, 10, max_num_seqs=4)
    assert (admission.num_seqs, admission.num_waiting_tokens) == (3, 10)


@pytest.mark.parametrize("stream", [False, True])
async def test_places_are_released_however_a_request_ends(stream: bool) -> None:
    engine = FakeEngine()
    app = make_app(engine)  # type: ignore[arg-type]
    admission = app.state.server.admission
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        for flaw in ({}, {"fail_after": 0}, {"fail_after": 2}, {"abort_after": 2}, {"crash_after": 2}):
            for name in ("fail_after", "abort_after", "crash_after"):
                setattr(engine, name, flaw.get(name))
            await client.post("/v1/completions", json={"prompt": ["a", "b"], "n": 2, "stream": stream})
            assert (admission.num_seqs, admission.num_waiting_tokens) == (0, 0), flaw
        await client.post("/v1/completions", json={"prompt": ["a", "x" * 2000], "stream": stream})  # too long
        assert (admission.num_seqs, admission.num_waiting_tokens) == (0, 0)


# ---- Time ----


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_a_request_that_takes_too_long_is_ended(path: str) -> None:
    jump_over_waits()
    engine = FakeEngine(hang_before=True)
    response = await post(engine, path, {"prompt": "a", **CHAT}, request_timeout_s=50)
    assert response.status_code == 504 and error_of(response)["code"] == "request_timeout"
    assert response.headers["x-should-retry"] == "false" and " 50 s" in error_of(response)["message"]
    assert not engine.running and len(engine.closed) == 1


async def test_a_stream_that_takes_too_long_says_so_and_ends() -> None:
    jump_over_waits()
    engine = FakeEngine(hang_after=3)
    response = await post(engine, "/v1/completions", {"prompt": "a", "stream": True}, request_timeout_s=50)
    *_, last, done = [line for line in response.text.split("\n\n") if line]
    assert done == "data: [DONE]" and json.loads(last.removeprefix("data: "))["error"]["code"] == "request_timeout"
    assert not engine.running


async def test_a_request_in_time_is_not_affected_by_the_limit() -> None:
    response = await post(FakeEngine(), "/v1/completions", {"prompt": "a"}, request_timeout_s=60)
    assert response.json()["choices"][0]["text"] == "Hello, wörld!"


async def test_a_stream_sends_comments_while_its_prompt_is_computed() -> None:
    jump_over_waits()
    engine = FakeEngine(hang_before=True)
    app = make_app(engine, ServerSettings(keepalive_s=5, request_timeout_s=18))  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        response = await client.post("/v1/completions", json={"prompt": "a", "stream": True})
    assert response.status_code == 200
    # nothing is sent before the first 5 s are over, which may still end with an error's status
    assert response.content.startswith(KEEPALIVE * 2) and response.content.count(KEEPALIVE) == 2
    assert "request_timeout" in response.text and response.text.endswith("data: [DONE]\n\n")


async def test_a_quick_stream_has_no_comments() -> None:
    response = await post(FakeEngine(), "/v1/completions", {"prompt": "a", "stream": True}, keepalive_s=5)
    assert KEEPALIVE not in response.content and response.text.count("data: ") == 14


def test_a_client_that_does_not_read_loses_its_request() -> None:
    engine = FakeEngine(reply="x" * 200_000)
    with serving(engine, idle_timeout_s=0.3) as url:
        with socket.create_connection((urlsplit(url).hostname, urlsplit(url).port)) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.sendall(raw_post("/v1/chat/completions", {**CHAT, "stream": True}))
            engine.wait_until(lambda: len(engine.closed) == 1)
        assert not engine.running
        assert httpx.get(url + "/health").status_code == 200


def test_a_client_that_does_not_send_its_body_gets_408() -> None:
    with (
        serving(FakeEngine(), idle_timeout_s=0.2) as url,
        socket.create_connection((urlsplit(url).hostname, urlsplit(url).port)) as sock,
    ):
        sock.sendall(raw_post("/v1/completions", {"prompt": "a long enough one"})[:-10])
        answer = sock.recv(65536)
    assert answer.startswith(b"HTTP/1.1 408")


# ---- Health ----


async def test_an_engine_whose_steps_do_not_end_is_unhealthy(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now_s)
    engine = FakeEngine()
    engine.statistics = StepStats()
    app = make_app(engine, ServerSettings(watchdog_timeout_s=5))  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:

        async def health() -> int:
            return (await client.get("/health")).status_code

        engine.statistics = StepStats(end_s=now_s)
        now_s += 60  # after a long idle time, a request that has just arrived is no stall
        assert await health() == 200
        await client.post("/v1/completions", json={"prompt": "x"})
        engine.statistics = StepStats(num_waiting=1, end_s=now_s - 60)
        assert await health() == 200
        now_s += 6
        for path in ("/health", "/ready", "/ping"):
            response = await client.get(path)
            assert response.status_code == 503 and error_of(response)["code"] == "engine_stalled"
        engine.statistics = StepStats(num_waiting=1, end_s=now_s)  # the step ended after all
        assert await health() == 200
        now_s += 60
        engine.statistics = StepStats()  # idle: a client that reads slowly is no stall
        app.state.server.admission.admit(RequestContext("a"), 1, 1, max_num_seqs=4)
        assert await health() == 200


async def test_ping_is_health_by_get_and_post() -> None:
    async with client_of(FakeEngine()) as client:
        assert (await client.get("/ping")).status_code == (await client.post("/ping")).status_code == 200
    async with client_of(FakeEngine(is_ready=False)) as client:
        assert (await client.get("/ping")).status_code == (await client.get("/ready")).status_code == 503


async def test_out_of_memory_is_a_refusal() -> None:
    response = await post(FakeEngine(refuse=MemoryError()), "/v1/completions", {"prompt": "a"})
    assert response.status_code == 503 and error_of(response)["code"] == "out_of_memory"
    assert response.headers["retry-after"]


async def test_errors_reveal_no_paths_of_the_server() -> None:
    engine = FakeEngine(refuse=TinyvllmError("cannot read /root/models/x.gguf: see ~/a/b or a/b at http://host/v1/x"))
    message = error_of(await post(engine, "/v1/completions", {"prompt": "a"}))["message"]
    assert "/root" not in message and "x.gguf" not in message
    assert "a/b at http://host/v1/x" in message


# ---- Settings ----


@pytest.mark.parametrize(
    ("settings", "flag"),
    [
        ({"max_num_queued_requests": -1}, "--max-num-queued-requests"),
        ({"max_num_queued_tokens": -1}, "--max-num-queued-tokens"),
        ({"max_body_bytes": 10}, "--max-body-bytes"),
        ({"shutdown_timeout_s": -1}, "--shutdown-timeout"),
        ({"request_timeout_s": -1}, "--request-timeout"),
        ({"idle_timeout_s": float("nan")}, "--idle-timeout"),
        ({"cors": Cors(origins=("*",), credentials=True)}, "--allow-credentials"),
    ],
)
def test_bad_settings_are_refused_by_their_flag(settings: dict[str, Any], flag: str) -> None:
    with pytest.raises(TinyvllmError, match=flag):
        ServerSettings(**settings)


async def test_a_client_may_repeat_its_request_id() -> None:
    engine = FakeEngine()
    async with client_of(engine) as client:
        headers = {"x-request-id": "same"}
        answers = await asyncio.gather(
            *(client.post("/v1/completions", json={"prompt": "a"}, headers=headers) for _ in range(2))
        )
    ids = [answer.json()["id"] for answer in answers]
    assert len(set(ids)) == 2 and all(one.startswith("cmpl-same-") for one in ids)
    assert {answer.headers["x-request-id"] for answer in answers} == {"same"}
