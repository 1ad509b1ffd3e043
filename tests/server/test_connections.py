"""How many connections a server accepts, and what happens to the others."""

from __future__ import annotations

import asyncio
import contextlib
import json
import resource
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from tests.patience import until, wait_for
from tests.server.fake_engine import FakeEngine
from tinyvllm.server import gate
from tinyvllm.server.app import make_app
from tinyvllm.server.board import NUM_TAKEN, Board
from tinyvllm.server.connections import Intake
from tinyvllm.server.file_limit import MAX_CONNECTIONS, RESERVED_FILES, default_max_connections, raise_file_limit
from tinyvllm.server.gate import REFUSAL, Gate
from tinyvllm.server.serve import DrainingServer, uvicorn_config
from tinyvllm.server.settings import ServerSettings
from tinyvllm.server.sockets import bind

ROOT = Path(__file__).parents[2]


def make_gate() -> Gate:
    return Gate(lambda state: asyncio.Protocol(), set(), None, 10)


async def test_a_lost_connection_counts_as_taken(caplog: pytest.LogCaptureFixture) -> None:
    board = Board.in_memory()
    here, there = socket.socketpair()
    intake = Intake(there, make_gate(), board)
    for _ in range(3):
        here.send(b"c")  # this is how a mark arrives whose descriptor exceeds the limit
    await until(lambda: board.own.cells[NUM_TAKEN] == 3)
    assert caplog.text.count("too many open files") == 1
    intake.close()
    here.close()


async def test_a_connection_that_was_reset_counts_as_taken() -> None:
    board = Board.in_memory()
    here, there = socket.socketpair()
    intake = Intake(there, make_gate(), board)
    reset = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)  # has no TCP_NODELAY, like a reset connection on macOS
    socket.send_fds(here, [b"c"], [reset.fileno()])
    await until(lambda: board.own.cells[NUM_TAKEN] == 1)
    for sock in (here, reset):
        sock.close()
    intake.close()


# ---- One process ----


@contextlib.contextmanager
def serving(engine: FakeEngine, **settings: Any) -> Iterator[tuple[str, DrainingServer]]:
    """A server of one process, on a thread, and its URL."""
    sock = bind("127.0.0.1", 0)
    app = make_app(engine, ServerSettings(**settings))  # type: ignore[arg-type]
    state = app.state.server
    server = DrainingServer(uvicorn_config(app, None, access_log=False), state.drain, state.settings)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{sock.getsockname()[1]}", server
    finally:
        server.should_exit = server.force_exit = True
        thread.join()


def connect(url: str) -> socket.socket:
    return socket.create_connection((urlsplit(url).hostname or "", urlsplit(url).port or 0))


def test_idle_connections_make_room_then_only_probes_are_served_then_all_are_refused(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = FakeEngine("Hello", hang_after=2)
    with serving(engine, max_connections=4) as (url, server), contextlib.ExitStack() as stack:
        idle = [stack.enter_context(connect(url)) for _ in range(4)]
        wait_for(lambda: len(server.server_state.connections) == 4)
        body = json.dumps({"prompt": "x", "stream": True}).encode()
        headers = f"host: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
        request = f"POST /v1/completions HTTP/1.1\r\n{headers}\r\n\r\n".encode() + body
        busy = []
        for _ in range(4):  # each takes the place of an idle one
            busy.append(stack.enter_context(connect(url)))
            busy[-1].sendall(request)
            answer = busy[-1].recv(4096)
            assert answer.startswith(b"HTTP/1.1 200"), answer
        assert [sock.recv(1) for sock in idle] == [b""] * 4
        with httpx.Client(base_url=url) as probe:
            assert probe.get("/health").status_code == 200
            refused = probe.post("/v1/completions", json={"prompt": "x"})
            assert refused.status_code == 503 and refused.json()["error"]["code"] == "too_many_connections"
            assert refused.headers["connection"] == "close"
        monkeypatch.setattr(gate, "NUM_EXTRA", 0)
        for _ in range(3):
            with connect(url) as sock:
                sock.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
                answer = b"".join(iter(lambda: sock.recv(4096), b""))
                assert answer == REFUSAL and b"too_many_connections" in answer
        assert caplog.text.count("connections are refused") == 1
        for sock in busy:
            sock.close()


# ---- The limit of open files ----


def test_the_default_leaves_files_for_everything_else(monkeypatch: pytest.MonkeyPatch) -> None:
    for limit, expected in ((64, 32), (256, 128), (1024, 1024 - RESERVED_FILES), (1 << 20, MAX_CONNECTIONS)):
        monkeypatch.setattr(resource, "getrlimit", lambda kind, limit=limit: (limit, limit))
        assert default_max_connections() == expected


@pytest.mark.parametrize(
    ("limits", "expected"),
    [((1024, 4096), 4096), ((1024, 1 << 20), 65_536), ((1 << 20, 1 << 20), None), ((9, 9), None)],
)
def test_the_soft_limit_is_raised_as_far_as_it_may(
    monkeypatch: pytest.MonkeyPatch, limits: tuple[int, int], expected: int | None
) -> None:
    made: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda kind: limits)
    monkeypatch.setattr(resource, "setrlimit", lambda kind, pair: made.append(pair))
    raise_file_limit()
    assert made == ([] if expected is None else [(expected, limits[1])])
