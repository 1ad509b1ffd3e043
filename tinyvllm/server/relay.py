"""Relay a request to another of our servers, on a Unix socket, and its answer back, as bytes and as they arrive.

Each request has its own connection, because connecting to a Unix socket takes less time than checking whether an old
connection is still usable. Bytes that arrive together are relayed together: a burst of tokens is one part.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field

from starlette.types import Message, Receive, Scope, Send

from tinyvllm.errors import TinyvllmError
from tinyvllm.server.context import TRAILERS, current
from tinyvllm.server.error_bodies import event_of
from tinyvllm.server.events import EVENT_STREAM, STREAM_TYPES
from tinyvllm.server.failures import ClientGone, failure_of
from tinyvllm.server.streaming import send_promptly

log = logging.getLogger(__name__)

Header = tuple[bytes, bytes]
Gone = Callable[[str], TinyvllmError]  # the error that clients get if the other server is gone, from the reason

# of one connection only (RFC 9110, section 7.6.1); the servers on both sides write their own
HOP_HEADERS = frozenset((b"connection", b"keep-alive", b"transfer-encoding", b"upgrade", b"te", b"trailer", b"date"))
# `expect` has been answered by the first server, and the id is the one that it has chosen
OWN_HEADERS = HOP_HEADERS | {b"expect", b"x-request-id"}
READ_BYTES = 64 * 2**10
FETCH_S = 10.0


class PeerGoneError(Exception):
    """The other server does not listen, or has closed the connection before its answer was complete."""


@dataclass
class Answer:
    """The answer of the other server, whose head has arrived."""

    status: int
    headers: list[Header]  # without those of the connection
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    length: int | None  # of the body; None: it is chunked
    has_trailers: bool = False  # fields follow the body, as the request allowed
    last_bytes: bytes = field(default=b"", init=False)  # of what has been read of the body
    trailers: list[Header] = field(default_factory=list, init=False)  # the fields after the body

    @property
    def stream_type(self) -> str | None:
        """The format of its events; None if it is not a stream of events."""
        value = next((value for name, value in self.headers if name == b"content-type"), b"").decode("latin-1")
        return next((kind for kind in STREAM_TYPES if value.startswith(kind)), None)

    async def parts(self) -> AsyncIterator[bytes]:
        """The body, in the parts in which it arrives. Raises PeerGoneError if it ends too early."""
        decoder, left = ChunkDecoder(), self.length
        while not decoder.is_complete and left != 0:
            try:
                data = await self.reader.read(READ_BYTES)
            except OSError as error:
                raise PeerGoneError(str(error)) from error
            if not data:
                raise PeerGoneError("it has closed the connection")
            if left is None:
                data = decoder.feed(data)
            else:
                left -= len(data)
            if data:
                self.last_bytes = data[-2:]
                yield data
        self.trailers = decoder.trailers

    async def aclose(self) -> None:
        self.writer.transport.abort()  # at once: the other server ends what it computes for this request


class ChunkDecoder:
    """Decodes a chunked body (RFC 9112, section 7.1)."""

    def __init__(self) -> None:
        self.is_complete = False
        self.trailers: list[Header] = []  # the fields after the last chunk
        self._num_left = 0  # bytes of the current chunk that are still to come, with the line end after it
        self._is_last = False
        self._line = b""  # the beginning of a line with a chunk's size

    def feed(self, data: bytes) -> bytes:
        """The body's next bytes, from those that have arrived."""
        if self._line:
            data = self._line + data
        parts, start = [], 0
        while start < len(data):
            if self._num_left == 0:
                end = data.find(b"\r\n", start)
                if end < 0:
                    break
                line, start = data[start:end], end + 2
                if self._is_last:
                    self.is_complete = not line
                    if self.is_complete:
                        break
                    name, _, value = line.partition(b":")
                    self.trailers.append((name.strip().lower(), value.strip()))
                    continue
                size = int(line.partition(b";")[0], 16)
                self._num_left, self._is_last = size + 2 if size else 0, size == 0
                continue
            num_bytes = min(max(self._num_left - 2, 0), len(data) - start)
            if num_bytes:
                parts.append(data[start : start + num_bytes])
            else:
                num_bytes = min(self._num_left, len(data) - start)
            start += num_bytes
            self._num_left -= num_bytes
        self._line = data[start:]
        return parts[0] if len(parts) == 1 else b"".join(parts)


async def ask(uds: str, scope: Scope, body: RequestBody) -> Answer:
    """Send a request; returns once the head of the answer has arrived. The caller closes the answer.

    Raises PeerGoneError, and ClientGone if the client leaves in the middle of its body."""
    try:
        reader, writer = await asyncio.open_unix_connection(uds)
    except OSError as error:
        raise PeerGoneError(f"it does not listen: {error}") from error
    try:
        writer.write(request_head(scope, body.length))
        async for part in body.parts():
            writer.write(part if body.length is not None else b"%x\r\n%b\r\n" % (len(part), part))
            await writer.drain()
        if body.length is None:
            writer.write(b"0\r\n\r\n")
        return _answer(scope["method"], await reader.readuntil(b"\r\n\r\n"), reader, writer)
    except (OSError, asyncio.IncompleteReadError) as error:
        writer.transport.abort()
        raise PeerGoneError(str(error)) from error
    except BaseException:
        writer.transport.abort()
        raise


def request_head(scope: Scope, length: int | None) -> bytes:
    """The head of the relayed request. length: of the body; None: it is chunked."""
    target = (scope.get("raw_path") or scope["path"].encode()).partition(b"?")[0]
    if scope["query_string"]:
        target += b"?" + scope["query_string"]
    lines = [b"%b %b HTTP/1.1" % (scope["method"].encode(), target)]
    lines += [b"%b: %b" % header for header in scope["headers"] if header[0] not in OWN_HEADERS | {b"content-length"}]
    lines += [b"connection: close", b"x-request-id: " + current().request_id.encode()]
    if TRAILERS in scope.get("extensions", {}):
        lines.append(b"te: trailers")
    if length is None:
        lines.append(b"transfer-encoding: chunked")
    elif length or scope["method"] not in ("GET", "HEAD"):
        lines.append(b"content-length: %d" % length)
    return b"\r\n".join([*lines, b"", b""])


def _answer(method: str, head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Answer:
    first, *lines = head[:-4].split(b"\r\n")
    status = int(first.split(b" ", 2)[1])
    pairs = (line.partition(b":")[::2] for line in lines)
    headers = [(name.strip().lower(), value.strip()) for name, value in pairs]
    fields = dict(headers)
    length = int(fields[b"content-length"]) if b"content-length" in fields else None
    if method == "HEAD" or status in (204, 304):
        length = 0
    kept = [(name, value) for name, value in headers if name not in HOP_HEADERS]
    return Answer(status, kept, reader, writer, length, has_trailers=b"trailer" in fields)


async def fetch(uds: str, path: str) -> bytes:
    """GET from another of our servers. Raises PeerGoneError, also for a status other than 200 and a late answer."""
    target, _, query = path.partition("?")
    scope: Scope = {
        "method": "GET",
        "path": target,
        "query_string": query.encode(),
        "headers": [(b"host", b"localhost")],
    }

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    try:
        async with asyncio.timeout(FETCH_S):
            answer = await ask(uds, scope, RequestBody.of(b"", receive))
            async with contextlib.aclosing(answer):
                body = b"".join([part async for part in answer.parts()])
    except TimeoutError as error:
        raise PeerGoneError(f"{path} is not answered within {FETCH_S:g} s") from error
    if answer.status != 200:
        raise PeerGoneError(f"{path} is answered with {answer.status}")
    return body


async def relay(
    uds: str,
    scope: Scope,
    body: RequestBody,
    send: Send,
    gone: Gone,
    *,
    has_started: bool = False,
    on_start: Callable[[], None] = lambda: None,
) -> None:
    """Relay a request, and its answer to the client.

    A stream that the other server does not complete ends with an error event; other answers break the connection.
    has_started: the client has got the head of a stream of events, so an answer of another kind becomes an event.
    on_start: called before the head is sent, because later errors have no status. Raises `gone` if there is no answer
    at all, and what `send` raises."""
    current().times.relayed_s = time.perf_counter()
    try:
        answer = await ask(uds, scope, body)
    except PeerGoneError as error:
        raise gone(str(error)) from error
    async with contextlib.aclosing(answer):
        if not has_started:
            on_start()
            await send(_start_of(answer))
        elif answer.stream_type is None:
            await send({"type": "http.response.body", "body": await _as_event(answer, scope, gone), "more_body": False})
            return
        if await relay_body(answer, scope["path"], send, gone):
            await send({"type": "http.response.body", "body": b"", "more_body": False})
            if answer.has_trailers and not has_started:
                await send({"type": TRAILERS, "headers": answer.trailers, "more_trailers": False})


def _start_of(answer: Answer) -> Message:
    """The head of an answer for the client."""
    start: Message = {"type": "http.response.start", "status": answer.status, "headers": answer.headers}
    if answer.has_trailers:
        start["headers"] = [*answer.headers, (b"trailer", b"server-timing")]
        start["trailers"] = True
    return start


async def _as_event(answer: Answer, scope: Scope, gone: Gone) -> bytes:
    """An error answer as an event, for a client that already reads a stream."""
    try:
        body = b"".join([part async for part in answer.parts()])
    except PeerGoneError as error:
        return failure_of(gone(str(error))).event(scope["path"])
    return event_of(scope["path"], body)


async def relay_body(answer: Answer, path: str, send: Send, gone: Gone) -> bool:
    """Pass on an answer's body, but not its end. Whether what the client got is complete, as a stream with an error
    at its end is, too."""
    context = current()
    context.times_own_events = True
    try:
        async for part in answer.parts():
            message: Message = {"type": "http.response.body", "body": part, "more_body": True}
            await send_promptly(send, message, context.idle_timeout_s)
    except PeerGoneError as error:
        failure = gone(str(error))
        log.error("an answer ends too early: %s", failure)
        if answer.stream_type is None:
            return False  # the server breaks the connection
        last = _event_end(answer) + failure_of(failure).event(path)
        await send({"type": "http.response.body", "body": last, "more_body": True})
    return True


def _event_end(answer: Answer) -> bytes:
    """What completes an event of which the client has received a part; nothing between two events."""
    end = b"\n\n" if answer.stream_type == EVENT_STREAM else b"\n"
    return b"" if not answer.last_bytes or answer.last_bytes.endswith(end) else end


class RequestBody:
    """A request's body: the parts that have been read, and those still to come."""

    def __init__(self, receive: Receive, read: Iterable[Message] = (), length: int | None = None) -> None:
        """length: in bytes, if it is known."""
        self._receive = receive
        self._read = list(read)
        self.length = length
        self._is_complete = asyncio.Event()

    @classmethod
    def of(cls, data: bytes, receive: Receive) -> RequestBody:
        """A body that has arrived."""
        return cls(receive, [{"type": "http.request", "body": data, "more_body": False}], len(data))

    async def read_beyond(self, limit: int) -> bool:
        """Read until there are more than `limit` bytes, or to the end. Returns whether there are more."""
        num_bytes = 0
        while num_bytes <= limit:
            message = await self._receive()
            self._read.append(message)
            num_bytes += len(message.get("body", b""))
            if not message.get("more_body", False):
                break
        return num_bytes > limit

    async def receive(self) -> Message:
        return self._read.pop(0) if self._read else await self._receive()

    async def parts(self) -> AsyncIterator[bytes]:
        """The body, as it comes. Raises ClientGone if the client leaves in the middle."""
        more = True
        while more:
            message = await self.receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            more = message.get("more_body", False)
            if message.get("body"):
                yield message["body"]
        self._is_complete.set()

    async def until_gone(self) -> None:
        """Return when the client leaves, after it has sent its body."""
        await self._is_complete.wait()
        while (await self._receive())["type"] != "http.disconnect":
            pass


async def relay_while_connected(uds: str, scope: Scope, body: RequestBody, send: Send, gone: Gone) -> None:
    """`relay`, but stop when the client leaves."""
    relaying = asyncio.ensure_future(relay(uds, scope, body, send, gone))
    watching = asyncio.ensure_future(body.until_gone())
    try:
        await asyncio.wait((relaying, watching), return_when=asyncio.FIRST_COMPLETED)
        if relaying.done():
            relaying.result()
    finally:
        relaying.cancel()
        watching.cancel()
        await asyncio.gather(relaying, watching, return_exceptions=True)
