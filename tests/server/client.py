"""Requests to an app in tests, and checks of the answers that all tests share."""

from __future__ import annotations

import json
import re
import socket
from typing import Any
from urllib.parse import urlsplit

import httpx

from tests.server.fake_engine import FakeEngine
from tinyvllm.server.app import make_app
from tinyvllm.server.settings import ServerSettings

CHAT = {"messages": [{"role": "user", "content": "hi"}]}


def client_of(engine: FakeEngine, **settings: Any) -> httpx.AsyncClient:
    """A client of an app around `engine`, without a socket. settings: ServerSettings'."""
    transport = httpx.ASGITransport(make_app(engine, ServerSettings(**settings)))  # type: ignore[arg-type]
    return httpx.AsyncClient(transport=transport, base_url="http://test")


async def post(engine: FakeEngine, path: str, body: Any, **options: Any) -> httpx.Response:
    async with client_of(engine, **options) as client:
        return await client.post(path, json=body)


async def get(engine: FakeEngine, path: str, **options: Any) -> httpx.Response:
    async with client_of(engine) as client:
        return await client.get(path, **options)


async def complete(engine: FakeEngine, **body: Any) -> dict[str, Any]:
    response = await post(engine, "/v1/completions", {"prompt": "ab", "max_tokens": 100, **body})
    assert response.status_code == 200, response.text
    return dict(response.json())


async def chat(engine: FakeEngine, **body: Any) -> dict[str, Any]:
    response = await post(engine, "/v1/chat/completions", {**CHAT, **body})
    assert response.status_code == 200, response.text
    return dict(response.json())


async def events(engine: FakeEngine, path: str, body: dict[str, Any]) -> list[Any]:
    """The server-sent events that answer `body`, without the final [DONE]."""
    response = await post(engine, path, {**body, "stream": True})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    frames = response.text.split("\n\n")
    assert frames[-1] == "" and frames[-2] == "data: [DONE]"
    return [json.loads(frame.removeprefix("data: ")) for frame in frames[:-2]]


def error_of(response: httpx.Response) -> dict[str, Any]:
    """The error in the response, after a check that it has OpenAI's shape."""
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    return dict(error)


def raw_post(path: str, body: dict[str, Any]) -> bytes:
    """A POST request as bytes, to be written to a socket."""
    content = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    return head.encode() + content


def exchange(url: str, path: str, body: dict[str, Any], head: str = "") -> bytes:
    """What a server sends on a connection of its own."""
    parts = urlsplit(url)
    data = json.dumps(body).encode()
    with socket.create_connection((parts.hostname, parts.port)) as sock:
        sock.sendall(
            f"POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n"
            f"{head}Content-Length: {len(data)}\r\n\r\n".encode()
            + data
        )
        return b"".join(iter(lambda: sock.recv(1 << 16), b""))


def read_answer(sock: socket.socket) -> bytes:
    """A whole answer that states its length, however it arrives."""
    answer, size = b"", 1
    while len(answer) < size:
        data = sock.recv(1 << 16)
        assert data, answer
        answer += data
        head, end, _ = answer.partition(b"\r\n\r\n")
        if found := re.search(rb"(?i)\r\ncontent-length: (\d+)", head):
            size = len(head) + len(end) + int(found[1])
        else:
            size = len(answer) + 1
    return answer
