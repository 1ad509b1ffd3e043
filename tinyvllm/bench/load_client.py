"""A client of OpenAI's streaming API that costs little per event, so that it measures the server rather than itself.

One network read is one call of `Connection.data_received`: it takes the time once and parses what has come.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import ssl
import time
from typing import cast
from urllib.parse import SplitResult, unquote, urlsplit

from tinyvllm.bench.load import APIS, Target
from tinyvllm.bench.load_answers import Answer
from tinyvllm.bench.load_stream import Response
from tinyvllm.errors import TinyvllmError

CONNECT_TIMEOUT_S = 10.0
DEFAULT_PORTS = {"http": 80, "https": 443}


class Connection(asyncio.Protocol):
    """A connection to the server, which carries one request at a time."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.heard_s = 0.0  # when the request was sent or bytes last came
        self.is_idle = True  # another request may be sent
        self.has_heard = False  # bytes of the current response have come
        self._response: Response | None = None
        self._ended: asyncio.Future[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    async def exchange(self, request: bytes, answer: Answer) -> None:
        """Send a request and record its response. Raises OSError or ValueError if the exchange fails."""
        assert self.transport is not None and self.is_idle
        self.is_idle = self.has_heard = False
        self._response = Response(answer)
        self._ended = asyncio.get_running_loop().create_future()
        answer.sent_s = self.heard_s = time.perf_counter()
        self.transport.write(request)
        try:
            await self._ended
        finally:
            self._ended = None
            if not self.is_idle:
                self.transport.abort()

    def data_received(self, data: bytes) -> None:
        self.heard_s = now_s = time.perf_counter()
        response = self._response
        if response is None:  # bytes that belong to no request
            self._close()
            return
        self.has_heard = True
        try:
            response.take(data, now_s)
        except ValueError as error:
            self.fail(error)
            return
        if response.is_complete:
            self._response, self.is_idle = None, response.keeps_alive
            self._end(None)

    def eof_received(self) -> None:
        """The server sends nothing more. The transport closes itself."""
        self.is_idle = False
        if not self.has_heard:
            self.fail(ConnectionResetError("the server closed the connection before it answered"))
        elif self._response is not None:
            try:
                self._response.take_end(time.perf_counter())
                self._end(None)
            except ValueError as error:
                self.fail(error)

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_idle = False
        self._end(exc or ConnectionResetError("the connection was closed"))

    def fail(self, error: Exception) -> None:
        """End the current exchange with an error, and the connection with it."""
        self._end(error)
        self._close()

    def _end(self, error: Exception | None) -> None:
        self._response = None
        if self._ended is not None and not self._ended.done():
            if error is None:
                self._ended.set_result(None)
            else:
                self._ended.set_exception(error)

    def _close(self) -> None:
        self.is_idle = False
        if self.transport is not None:
            self.transport.abort()


class Client:
    """Owns the connections of one process to a server. Use it as an async context manager."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._url = split_url(target)
        self._ssl = make_ssl_context() if self._url.scheme == "https" else None
        self._head = self._make_head()
        self._idle: list[Connection] = []
        self._busy: set[Connection] = set()
        self._watch: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Client:
        self._watch = asyncio.create_task(self._end_silent_exchanges())
        return self

    async def __aexit__(self, *exc: object) -> None:
        assert self._watch is not None
        self._watch.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._watch
        for connection in (*self._idle, *self._busy):
            if connection.transport is not None:
                connection.transport.abort()

    def make_request(self, body: bytes) -> bytes:
        """The bytes of a whole HTTP request."""
        return b"%sContent-Length: %d\r\n\r\n%s" % (self._head, len(body), body)

    async def send(self, request: bytes) -> Answer:
        """Send what `make_request` returned. Errors are recorded in the answer."""
        answer = Answer(time.perf_counter())
        try:
            await self._send(request, answer)
        except (OSError, ValueError, TimeoutError) as error:
            answer.error = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        if answer.error is None and not answer.text_s:
            answer.error = "the answer has no text"
        return answer

    async def _send(self, request: bytes, answer: Answer) -> None:
        connection = self._find_idle()
        if connection is not None:
            try:
                await self._exchange(connection, request, answer)
                return
            except ConnectionError:
                if connection.has_heard:
                    raise
        # There was no idle connection, or the server closed it just as the request was sent (RFC 9112, section 9.3.1).
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            connection = await self._connect()
        await self._exchange(connection, request, answer)

    async def _exchange(self, connection: Connection, request: bytes, answer: Answer) -> None:
        self._busy.add(connection)
        try:
            await connection.exchange(request, answer)
        finally:
            self._busy.discard(connection)
        if connection.is_idle and self._target.keeps_alive:
            self._idle.append(connection)
        elif connection.transport is not None:
            connection.transport.close()

    def _find_idle(self) -> Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if connection.is_idle:
                return connection
        return None

    async def _connect(self) -> Connection:
        loop, path = asyncio.get_running_loop(), self._target.unix_socket
        if path is not None:
            return (await loop.create_unix_connection(Connection, path))[1]
        host, port = self._url.hostname or "", self._url.port or DEFAULT_PORTS[self._url.scheme]
        return (await loop.create_connection(Connection, host, port, ssl=self._ssl))[1]

    async def _end_silent_exchanges(self) -> None:
        """One task for all requests, because a timer per read would cost more than parsing it."""
        limit_s = self._target.timeout_s
        while True:
            await asyncio.sleep(min(1.0, limit_s / 4))
            now_s = time.perf_counter()
            for connection in list(self._busy):
                if now_s - connection.heard_s > limit_s:
                    connection.fail(TimeoutError(f"the server was silent for {limit_s:g} s (--timeout)"))

    def _make_head(self) -> bytes:
        """The request line and the headers, but for the body's length."""
        host = "localhost" if self._target.unix_socket is not None else self._url.netloc.rpartition("@")[2]
        path = "" if self._target.unix_socket is not None else self._url.path.rstrip("/")
        headers = {"Host": host, "Accept": "text/event-stream", "Content-Type": "application/json"}
        headers["TE"] = "trailers"  # our server sends Server-Timing at the end of a stream
        headers["Connection"] = "TE" if self._target.keeps_alive else "close, TE"
        if self._url.username is not None:
            user = f"{unquote(self._url.username)}:{unquote(self._url.password or '')}"
            headers["Authorization"] = f"Basic {base64.b64encode(user.encode()).decode()}"
        lines = [f"{name}: {value}\r\n" for name, value in (headers | self._target.headers).items()]
        return f"POST {path}{APIS[self._target.api]} HTTP/1.1\r\n{''.join(lines)}".encode()


def split_url(target: Target) -> SplitResult:
    """The parts of the server's address. Raises TinyvllmError unless it is http, https or unix."""
    try:
        url = urlsplit(target.url)
        has_port = url.port != 0
    except ValueError as error:
        raise TinyvllmError(f"--url is {target.url}: {error}") from error
    if target.unix_socket or (url.scheme in DEFAULT_PORTS and url.hostname and has_port):
        return url
    raise TinyvllmError(f"--url is {target.url}: give http://HOST:PORT, https://HOST:PORT or unix:/PATH/OF/SOCKET")


def make_ssl_context() -> ssl.SSLContext:
    """Trusts the authorities of certifi, of the system, and of the file that $SSL_CERT_FILE names."""
    import certifi  # comes with httpx

    context = ssl.create_default_context(cafile=certifi.where())
    context.set_default_verify_paths()
    return context
