"""The client of the load processes: connections that are kept, closed, lost, silent, encrypted or Unix sockets."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import ssl
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trustme

from tests.bench.event_server import HEAD, EventServer, make_chunk, serving_events
from tinyvllm.bench.load import LoadWork, Target
from tinyvllm.bench.load_answers import Answer
from tinyvllm.bench.load_client import Client
from tinyvllm.bench.load_measure import make_client

WORK = LoadWork(output_len=3)
ANSWER = (HEAD % b"") + make_chunk('{"choices": [{"text": "a"}]}') + make_chunk("[DONE]") + b"0\r\n\r\n"
Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def send(target: Target, count: int, *, pause_s: float = 0.0) -> list[Answer]:
    """Send `count` requests one after another."""

    async def send_each() -> list[Answer]:
        answers = []
        async with Client(target) as client:
            for number in range(count):
                answers.append(await client.send(client.make_request(WORK.request(target, number))))
                await asyncio.sleep(pause_s)
        return answers

    return asyncio.run(send_each())


def send_to(handler: Handler, count: int, *, pause_s: float = 0.0, timeout_s: float = 30.0) -> list[Answer]:
    """Send requests to a server whose connections are handled by `handler`."""

    async def run() -> list[Answer]:
        server = await asyncio.start_server(handler, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        try:
            return await asyncio.to_thread(send, Target(url, "tiny", timeout_s=timeout_s), count, pause_s=pause_s)
        finally:
            server.close()

    return asyncio.run(run())


async def read_request(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readuntil(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
    return head + await reader.readexactly(length)


@pytest.mark.parametrize(("closes", "keeps_alive"), [(False, True), (True, True), (False, False)])
def test_connection_is_used_again_unless_one_side_closes_it(closes: bool, keeps_alive: bool) -> None:
    server = EventServer(closes=closes)
    with serving_events(server) as url:
        answers = send(Target(url, "tiny", keeps_alive=keeps_alive), 3)
    assert [(answer.error, len(answer.text_s), answer.num_output) for answer in answers] == [(None, 3, 3)] * 3
    assert server.num_connections == (1 if keeps_alive and not closes else 3)


def test_request_is_sent_again_if_an_idle_connection_was_closed() -> None:
    connections: list[int] = []

    async def answer_once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one request and close at the second, which came too late."""
        connections.append(len(connections))
        await read_request(reader)
        writer.write(ANSWER)
        with contextlib.suppress(asyncio.IncompleteReadError):
            await read_request(reader)
        writer.close()

    assert [answer.error for answer in send_to(answer_once, 3)] == [None] * 3
    assert len(connections) == 3


def test_lost_connections_are_errors_of_their_answers() -> None:
    replies = iter([b"", ANSWER[:-30], b"SSH-2.0\r\n\r\n", ANSWER])

    async def reply(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(next(replies))
        writer.close()

    errors = [answer.error for answer in send_to(reply, 4)]
    assert errors[0] == "ConnectionResetError: the server closed the connection before it answered"
    assert errors[1] == "ValueError: the server closed the connection in the middle of an answer"
    assert "which is not HTTP/1.1" in str(errors[2]) and errors[3] is None


def test_silent_server_is_an_error_and_its_next_answer_another_connection() -> None:
    connections: list[int] = []

    async def stop_halfway(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(len(connections))
        await read_request(reader)
        writer.write(ANSWER[:-30] if len(connections) == 1 else ANSWER)
        await reader.read()
        writer.close()

    first, second = send_to(stop_halfway, 2, timeout_s=2.0)
    assert first.error == "TimeoutError: the server was silent for 2 s (--timeout)"
    assert second.error is None and len(connections) == 2


def test_missing_server_is_an_error() -> None:
    (answer,) = send(Target("http://127.0.0.1:9", "tiny"), 1)
    assert str(answer.error).startswith("ConnectionRefusedError") and answer.sent_s > 0


def test_request_has_the_key_the_path_and_the_host() -> None:
    async def heads() -> list[bytes]:
        urls = ("http://name:81/prefix/", "http://[::1]:81", "unix:/tmp/socket", "http://user:pass%3A@name")
        targets = [Target(url, "tiny", api="chat", api_key=None if "@" in url else "secret") for url in urls]
        return [Client(target).make_request(b"{}").partition(b"\r\n\r\n")[0] for target in targets]

    named, numeric, local, plain = asyncio.run(heads())
    assert named.startswith(b"POST /prefix/v1/chat/completions HTTP/1.1\r\nHost: name:81\r\n")
    assert b"\r\nAuthorization: Bearer secret\r\n" in named and named.endswith(b"\r\nContent-Length: 2")
    assert b"\r\nHost: [::1]:81\r\n" in numeric
    assert local.startswith(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n")
    assert b"\r\nHost: name\r\n" in plain
    assert b"\r\nAuthorization: Basic " + base64.b64encode(b"user:pass:") + b"\r\n" in plain


def test_https_trusts_the_authority_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    with serving_events(EventServer(), ssl=context) as url:
        (refused,) = send(Target(url, "tiny"), 1)
        assert str(refused.error).startswith("SSLCertVerificationError")
        authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
        assert [(answer.error, len(answer.text_s)) for answer in send(Target(url, "tiny"), 2)] == [(None, 3)] * 2
        with make_client(Target(url, "tiny")) as client:
            assert client.get("/v1/models").status_code == 404


def test_unix_socket(tmp_path: Path) -> None:
    with serving_events(EventServer(), socket=tmp_path / "socket") as url:
        target = Target(url, "tiny")
        assert target.unix_socket == str(tmp_path / "socket")
        assert Target("unix:///run/a//b", "tiny").unix_socket == "/run/a//b"
        assert [(answer.error, len(answer.text_s)) for answer in send(target, 2)] == [(None, 3)] * 2
        with make_client(target) as client:
            assert client.get("/v1/models").status_code == 404
