"""Requests whose end could be read in two ways are refused and end their connection. Raw sockets, both parsers."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest
from uvicorn.protocols.http.h11_impl import H11Protocol

from tests.server.fake_engine import FakeEngine, serving
from tinyvllm.server.http1 import MAX_HEAD_BYTES, Http1Protocol

BODY = b'{"prompt":"x","max_tokens":2}'
CHUNKED = b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)
SIZE = len(BODY)
BOTH, HTTPTOOLS = (Http1Protocol, H11Protocol), (Http1Protocol,)
CASES = {
    "Content-Length, Transfer-Encoding": (f"Content-Length: {SIZE}\r\nTransfer-Encoding: chunked\r\n", CHUNKED, BOTH),
    "Transfer-Encoding, Content-Length": ("Transfer-Encoding: chunked\r\nContent-Length: 5\r\n", CHUNKED, BOTH),
    "two lengths": (f"Content-Length: {SIZE}\r\nContent-Length: 3\r\n", BODY, BOTH),
    "a length twice": (f"Content-Length: {SIZE}\r\nContent-Length: {SIZE}\r\n", BODY, HTTPTOOLS),
    "a list of lengths": (f"Content-Length: {SIZE}, 3\r\n", BODY, BOTH),
    "a signed length": (f"Content-Length: +{SIZE}\r\n", BODY, BOTH),
    "a negative length": ("Content-Length: -1\r\n", BODY, BOTH),
    "a hexadecimal length": (f"Content-Length: {SIZE:#x}\r\n", BODY, BOTH),
    "an endless length": ("Content-Length: 99999999999999999999999\r\n", BODY, BOTH),
    "chunked is not last": ("Transfer-Encoding: chunked, gzip\r\n", CHUNKED, BOTH),
    "another coding first": ("Transfer-Encoding: gzip, chunked\r\n", CHUNKED, BOTH),
    "an unknown coding": ("Transfer-Encoding: xchunked\r\n", CHUNKED, BOTH),
    "chunked twice": ("Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n", CHUNKED, BOTH),
    "a space before the colon": ("Transfer-Encoding : chunked\r\n", CHUNKED, BOTH),
    "no number": ("Transfer-Encoding: chunked\r\n", b"zz\r\n" + BODY + b"\r\n0\r\n\r\n", BOTH),
    "a negative chunk": ("Transfer-Encoding: chunked\r\n", b"-1\r\n" + BODY + b"\r\n0\r\n\r\n", BOTH),
    "an endless chunk": ("Transfer-Encoding: chunked\r\n", b"f" * 20 + b"\r\n" + BODY + b"\r\n0\r\n\r\n", HTTPTOOLS),
    "a chunk without its end": ("Transfer-Encoding: chunked\r\n", b"%x\r\n%b0\r\n\r\n" % (SIZE, BODY), BOTH),
    "a bare CR": (f"X: a\rContent-Length: 0\r\nContent-Length: {SIZE}\r\n", BODY, BOTH),
    "a NUL": (f"X: a\0b\r\nContent-Length: {SIZE}\r\n", BODY, BOTH),
    "two hosts": (f"Host: y\r\nContent-Length: {SIZE}\r\n", BODY, BOTH),
}


@pytest.fixture(scope="module", params=BOTH)
def server(request: pytest.FixtureRequest) -> Iterator[tuple[type, tuple[str, int]]]:
    with serving(FakeEngine("Hello"), http=request.param) as url:
        yield request.param, (urlsplit(url).hostname or "", urlsplit(url).port or 0)


def answers(address: tuple[str, int], data: bytes) -> bytes:
    """All that the server sends until it closes the connection."""
    with socket.create_connection(address) as sock:
        sock.sendall(data)
        return b"".join(iter(lambda: sock.recv(65536), b""))


@pytest.mark.parametrize("case", CASES)
def test_an_ambiguous_request_ends_its_connection(server: tuple[type, tuple[str, int]], case: str) -> None:
    parser, address = server
    headers, body, parsers = CASES[case]
    if parser not in parsers:
        return  # it reads both as one
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n{headers}\r\n"
    smuggled = b"GET /version HTTP/1.1\r\nHost: x\r\n\r\n"
    answer = answers(address, head.encode() + body + smuggled)
    assert answer[9:12] in (b"400", b"501") and answer.count(b"HTTP/1.1 ") == 1, answer


def test_a_request_needs_a_host_unless_it_is_of_http_1_0(server: tuple[type, tuple[str, int]]) -> None:
    assert answers(server[1], b"GET /version HTTP/1.1\r\n\r\n")[9:12] == b"400"
    assert answers(server[1], b"GET /version HTTP/1.0\r\n\r\n")[9:12] == b"200"


@pytest.mark.parametrize("is_complete", [True, False])
def test_a_head_has_a_limit(server: tuple[type, tuple[str, int]], is_complete: bool) -> None:
    """The parser of httptools keeps whatever comes."""
    head = b"GET /version HTTP/1.1\r\nHost: x\r\n" + b"X: aaaa\r\n" * (MAX_HEAD_BYTES // 4)
    try:
        answer = answers(server[1], head + b"\r\n" * is_complete)
    except ConnectionError:  # the answer is lost if it is sent before the whole head is
        return
    assert answer[9:12] in (b"431", b"400")
