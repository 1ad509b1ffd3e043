"""Requests that offer an upgrade are answered as HTTP/1.1, with their bodies, by both parsers; over raw sockets."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from urllib.parse import urlsplit

import httpx
import pytest
from uvicorn.protocols.http.h11_impl import H11Protocol

from tests.server.fake_engine import FakeEngine, serving
from tinyvllm.server.event_loop import http_protocol
from tinyvllm.server.http1 import Http1Protocol

SETTINGS = "AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA"  # of Java's HttpClient
H2C = f"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: {SETTINGS}\r\n"
TLS = "Upgrade: TLS/1.0\r\nConnection: keep-alive, Upgrade\r\n"


@pytest.fixture(params=[Http1Protocol, H11Protocol])
def address(request: pytest.FixtureRequest) -> Iterator[tuple[str, int]]:
    with serving(FakeEngine("Hello"), http=request.param) as url:
        yield urlsplit(url).hostname or "", urlsplit(url).port or 0


def post(max_tokens: int, headers: str = H2C, *, is_chunked: bool = False) -> bytes:
    """A request whose answer has `max_tokens` characters."""
    body = json.dumps({"prompt": "x", "max_tokens": max_tokens}).encode()
    length = f"Content-Length: {len(body)}"
    if is_chunked:
        body = b"%x\r\n%b\r\n%x\r\n%b\r\n0\r\n\r\n" % (3, body[:3], len(body) - 3, body[3:])
        length = "Transfer-Encoding: chunked"
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n{length}\r\n{headers}\r\n"
    return head.encode() + body


class Peer:
    """A connection that reads one answer at a time."""

    def __init__(self, address: tuple[str, int]) -> None:
        self.sock = socket.create_connection(address)
        self._file = self.sock.makefile("rb")

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()
        self.sock.close()

    def answer(self) -> tuple[int, str]:
        """The status and the body of the next answer."""
        status, length = int(self._file.readline().split()[1]), 0
        while (line := self._file.readline()) != b"\r\n":
            name, _, value = line.partition(b":")
            length = int(value) if name.lower() == b"content-length" else length
        return status, self._file.read(length).decode()

    def text(self) -> str:
        """The completion in the next answer."""
        status, body = self.answer()
        assert status == 200, body
        return str(json.loads(body)["choices"][0]["text"])

    def is_closed(self) -> bool:
        return self._file.read(1) == b""


@pytest.mark.parametrize("headers", [H2C, TLS])
@pytest.mark.parametrize("is_chunked", [False, True])
def test_the_body_after_an_offer_is_read(address: tuple[str, int], headers: str, is_chunked: bool) -> None:
    with Peer(address) as peer:
        peer.sock.sendall(post(3, headers, is_chunked=is_chunked))
        assert peer.text() == "Hel"


@pytest.mark.parametrize("cut", ["head", "end of head", "body", "every byte"])
def test_a_request_may_arrive_in_pieces(address: tuple[str, int], cut: str) -> None:
    request = post(4)
    head_size = request.index(b"\r\n\r\n") + 4
    cuts = {"head": [40], "end of head": [head_size], "body": [head_size + 5], "every byte": range(1, len(request))}[
        cut
    ]
    with Peer(address) as peer:
        peer.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for start, end in zip([0, *cuts], [*cuts, len(request)], strict=True):
            peer.sock.sendall(request[start:end])
        assert peer.text() == "Hell"


def test_the_connection_stays_open_for_requests_with_and_without_offers(address: tuple[str, int]) -> None:
    with Peer(address) as peer:
        for number, headers in enumerate([H2C, "", H2C, TLS, ""], 1):
            peer.sock.sendall(post(number, headers))
            assert peer.text() == "Hello"[:number]


def test_pipelined_requests_are_answered_in_order(address: tuple[str, int]) -> None:
    with Peer(address) as peer:
        get = f"GET /version HTTP/1.1\r\nHost: x\r\n{H2C}\r\n".encode()
        peer.sock.sendall(post(1) + post(2, "") + post(3) + get + post(4, TLS, is_chunked=True))
        assert [peer.text() for _ in range(3)] == ["H", "He", "Hel"]
        assert "version" in json.loads(peer.answer()[1])
        assert peer.text() == "Hell"


def test_the_other_options_of_connection_still_hold(address: tuple[str, int]) -> None:
    with Peer(address) as peer:
        peer.sock.sendall(post(2, H2C.replace("Upgrade,", "close, Upgrade,")))
        assert peer.text() == "He"
        assert peer.is_closed()


def test_a_client_that_waits_for_100_continue_gets_it(address: tuple[str, int]) -> None:
    head, _, body = post(2, H2C + "Expect: 100-continue\r\n").partition(b"\r\n\r\n")
    with Peer(address) as peer:
        peer.sock.sendall(head + b"\r\n\r\n")
        assert peer.answer() == (100, "")
        peer.sock.sendall(body)
        assert peer.text() == "He"


def test_a_bad_request_after_an_offer_is_refused(address: tuple[str, int]) -> None:
    with Peer(address) as peer:
        peer.sock.sendall(post(2))
        assert peer.text() == "He"
        peer.sock.sendall(b"nonsense\r\n\r\n")
        assert peer.answer()[0] == 400


def test_connect_is_refused(address: tuple[str, int]) -> None:
    with Peer(address) as peer:
        peer.sock.sendall(f"CONNECT x:443 HTTP/1.1\r\nHost: x\r\n{H2C}\r\n".encode())
        assert peer.answer()[0] in (400, 404, 405)


def test_the_faster_parser_is_used_where_it_is_installed() -> None:
    assert http_protocol() is Http1Protocol
    with serving(FakeEngine("Hello")) as url:
        body = {"prompt": "x", "max_tokens": 2}
        headers = {"Connection": "Upgrade, HTTP2-Settings", "Upgrade": "h2c"}
        answer = httpx.post(url + "/v1/completions", json=body, headers=headers)
    assert answer.json()["choices"][0]["text"] == "He"
