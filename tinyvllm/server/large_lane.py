"""Large requests go to a front-end of their own, because parsing one stops a process's event loop.

A body of 16 MiB takes 100 ms or more to parse and validate, in calls that hold the interpreter lock: every stream of
the process would stand still. So a front-end passes large bodies on, as bytes, to one that serves nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Collection

import httpx
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tinyvllm.server.context import current
from tinyvllm.server.events import STREAM_TYPES
from tinyvllm.server.failures import ClientGone, LaneGoneError, failure_of
from tinyvllm.server.routes import find_route

log = logging.getLogger(__name__)

LARGE_BYTES = 256 * 2**10  # of a body: up to 2 ms to parse
# of one connection only (RFC 9110, section 7.6.1); the servers on both sides write their own
HOP_HEADERS = frozenset((b"connection", b"keep-alive", b"transfer-encoding", b"upgrade", b"te", b"trailer", b"date"))


class LargeLane:
    """Middleware that passes requests with large bodies on to the front-end that listens on a Unix socket.

    It is the innermost, so that what others enforce holds before a body is passed on: access, time, size and the drain.
    """

    def __init__(self, app: ASGIApp, uds: str, apis: Collection[str]) -> None:
        self._app = app
        self._apis = apis
        # no limit of time: both front-ends have the server's own limits
        self._client = httpx.AsyncClient(
            transport=httpx.AsyncHTTPTransport(uds=uds, limits=httpx.Limits(max_connections=None)), timeout=None
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            try:
                await self._app(scope, receive, send)
            finally:
                await self._client.aclose()
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        length = _stated_length(scope)
        if scope["method"] in ("GET", "HEAD", "OPTIONS") or (length is not None and length <= LARGE_BYTES):
            await self._app(scope, receive, send)
            return
        scope["route"] = find_route(scope, self._apis)  # requests are counted by it
        body = _Body(receive)
        try:
            if await body.is_large(scope):
                await self._pass_on(scope, body, send)
                return
        except (HTTPException, LaneGoneError) as error:  # all come before the answer's start
            await failure_of(error).response(scope["path"])(scope, receive, send)
            return
        except (ClientGone, OSError):  # OSError: the client does not read
            return
        await self._app(scope, body.receive, send)

    async def _pass_on(self, scope: Scope, body: _Body, send: Send) -> None:
        """Relay the request and its response, until the client leaves."""
        relaying = asyncio.ensure_future(self._relay(scope, body, send))
        watching = asyncio.ensure_future(body.until_gone())
        try:
            await asyncio.wait((relaying, watching), return_when=asyncio.FIRST_COMPLETED)
            if relaying.done():
                relaying.result()
        finally:
            relaying.cancel()
            watching.cancel()
            await asyncio.gather(relaying, watching, return_exceptions=True)

    async def _relay(self, scope: Scope, body: _Body, send: Send) -> None:
        try:
            response = await self._client.send(self._request(scope, body), stream=True)
        except httpx.TransportError as error:
            raise LaneGoneError(
                f"the front-end for large bodies does not answer ({type(error).__name__}): try again later"
            ) from error
        async with contextlib.aclosing(response):
            kept = [(name.lower(), value) for name, value in response.headers.raw if name.lower() not in HOP_HEADERS]
            await send({"type": "http.response.start", "status": response.status_code, "headers": kept})
            try:
                async for chunk in response.aiter_raw():
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
            except httpx.TransportError as error:
                reason = type(error).__name__
                log.error("the front-end for large bodies has ended in the middle of an answer (%s)", reason)
                if not response.headers.get("content-type", "").startswith(STREAM_TYPES):
                    return  # the server breaks the connection
                gone = LaneGoneError("the front-end for large bodies has died: try again later")
                last = b"\n\n" + failure_of(gone).event(scope["path"])
                await send({"type": "http.response.body", "body": last, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _request(self, scope: Scope, body: _Body) -> httpx.Request:
        query = b"?" + scope["query_string"] if scope["query_string"] else b""
        url = httpx.URL("http://large-lane").copy_with(
            raw_path=(scope.get("raw_path") or scope["path"].encode()) + query
        )
        request = self._client.build_request(scope["method"], url, content=body.chunks())
        has_length = any(name == b"content-length" for name, _ in scope["headers"])
        request.headers = httpx.Headers(
            [(name, value) for name, value in scope["headers"] if name not in HOP_HEADERS and name != b"x-request-id"]
            + ([] if has_length else [(b"transfer-encoding", b"chunked")])
            + [(b"x-request-id", current().request_id.encode())]
        )
        return request


def _stated_length(scope: Scope) -> int | None:
    """Of the body, in bytes. 0 if it is not a number, which HTTP servers refuse."""
    lengths = [value for name, value in scope["headers"] if name == b"content-length"]
    return (int(lengths[0]) if lengths[0].isdigit() else 0) if lengths else None


class _Body:
    """The messages of a request: those that were read to see how large it is, and the rest."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._read: list[Message] = []
        self._is_complete = asyncio.Event()

    async def is_large(self, scope: Scope) -> bool:
        """Reads the body's beginning if its length is not stated."""
        length = _stated_length(scope)
        if length is not None:
            return length > LARGE_BYTES
        num_bytes = 0
        while num_bytes <= LARGE_BYTES:
            message = await self._receive()
            self._read.append(message)
            num_bytes += len(message.get("body", b""))
            if not message.get("more_body", False):
                break
        return num_bytes > LARGE_BYTES

    async def receive(self) -> Message:
        return self._read.pop(0) if self._read else await self._receive()

    async def chunks(self) -> AsyncIterator[bytes]:
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
