"""The middleware around every request: its id, limits on body and client, counts, and unhandled errors."""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from typing import Protocol

from fastapi import HTTPException
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tinyvllm.profiling import measure
from tinyvllm.server.context import TRAILERS, RequestContext, as_current
from tinyvllm.server.error_bodies import api_of, path_of
from tinyvllm.server.failures import BodyInterrupted, failure_of
from tinyvllm.server.front_ends import FrontEnds
from tinyvllm.server.request_limits import Admission, Drain, DrainingError
from tinyvllm.server.request_log import RequestLog
from tinyvllm.server.request_times import server_timing
from tinyvllm.server.settings import ServerSettings

_VALID_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")
BODY = "http.response.body"
_SAFE_METHODS = ("GET", "HEAD", "OPTIONS")  # in the sense of RFC 9110: they change nothing


class HttpCounts(Protocol):
    """Counts responses."""

    def count_http(self, method: str, handler: str, status: int, duration_s: float) -> None: ...

    def count_refusal(self, status: int) -> None: ...


class AppState(Protocol):
    """What the envelope needs of its app."""

    @property
    def settings(self) -> ServerSettings: ...

    @property
    def front_ends(self) -> FrontEnds: ...

    @property
    def admission(self) -> Admission: ...

    @property
    def drain(self) -> Drain: ...

    @property
    def metrics(self) -> HttpCounts: ...

    @property
    def requests(self) -> RequestLog: ...


class SilentClientError(OSError):
    """The client has neither read nor sent a byte for --idle-timeout, so it counts as gone."""


class Envelope:
    """Middleware around every request: assigns its id, enforces limits, counts it, and answers unhandled errors."""

    def __init__(self, app: ASGIApp, state: AppState) -> None:
        self._app = app
        self._state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        await _Exchange(self._app, self._state, scope, receive, send).run()


class _Exchange:
    """One HTTP request and its response."""

    def __init__(self, app: ASGIApp, state: AppState, scope: Scope, receive: Receive, send: Send) -> None:
        self._app = app
        self._state = state
        self._scope = scope
        self._receive = receive
        self._send = send
        self._status = 499  # until a response starts: nginx's code for a client that left first
        self._has_started = False
        self._has_trailer = False  # the answer's end has fields, too
        self._num_body_bytes = 0
        self._has_whole_body = False
        self._start_s = asyncio.get_running_loop().time()
        asked_id = Headers(scope=scope).get("x-request-id", "")
        is_valid = _VALID_REQUEST_ID.fullmatch(asked_id) is not None
        self._context = RequestContext(
            request_id=asked_id if is_valid else uuid.uuid4().hex,
            is_own_id=not is_valid,
            keepalive_s=state.settings.keepalive_s,
            idle_timeout_s=state.settings.idle_timeout_s,
        )

    async def run(self) -> None:
        state, method = self._state, self._scope["method"]
        is_counted = not state.front_ends.is_large_lane  # the front-end that passed it on counts it
        asks_for_work = is_counted and method not in _SAFE_METHODS
        start_s = time.perf_counter()
        if asks_for_work:
            state.drain.begin_request()
        with as_current(self._context):
            try:
                await self._app(self._scope, self.receive, self.send)
            except Exception as error:
                if self._has_started:
                    raise
                await failure_of(error).response(self._scope["path"])(self._scope, self.receive, self.send)
            finally:
                for close in self._context.closers:
                    close()
                state.admission.release(self._context)
                if asks_for_work:
                    state.drain.end_request()
                    if self._status >= 400 and not self._context.is_counted_elsewhere:
                        state.metrics.count_refusal(self._status)
                route = self._scope.get("route")
                handler = getattr(route, "path", "none")
                if self._context.times.has_call:
                    state.requests.add(self._context.request_id, self._context.times, handler, self._status)
                if measure.is_on():
                    self._measure(start_s, handler)
                if is_counted and not self._context.is_counted_elsewhere:
                    state.metrics.count_http(method, handler, self._status, time.perf_counter() - start_s)

    def _measure(self, start_s: float, handler: str) -> None:
        """Record the whole request."""
        facts: dict[str, measure.Fact] = {"route": handler, "status": self._status}
        http_id = self._context.request_id
        measure.add(measure.REQUEST, int(start_s * 1e9), time.perf_counter_ns(), http=http_id, **facts)

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._has_started = True
            self._status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["x-request-id"] = self._context.request_id
            if api_of(path_of(self._scope)) == "anthropic":
                headers["request-id"] = self._context.request_id  # its clients show this one
            self._add_timing(message, headers)
        elif self._context.times_own_events and message.get("more_body", False):
            await self._send(message)  # without a timer: a stream sends one event per token, and not always from a task
            return
        try:
            async with asyncio.timeout(self._state.settings.idle_timeout_s):
                await self._send(message)
                if self._has_trailer and not message.get("more_body", False) and message["type"] == BODY:
                    self._has_trailer = False
                    await self._send({"type": TRAILERS, "headers": [self._timing()], "more_trailers": False})
        except TimeoutError as error:
            raise SilentClientError("the client does not read") from error

    def _add_timing(self, message: Message, headers: MutableHeaders) -> None:
        """Add `Server-Timing` with the time so far. A stream, which has no length, gets a trailer with the time of the
        whole, if the client and the HTTP server support trailers (RFC 9110, section 6.5)."""
        headers.append(*(part.decode() for part in self._timing()))
        if "content-length" in headers or TRAILERS not in self._scope.get("extensions", {}):
            return
        if self._context.times.has_call and self._scope["method"] != "HEAD":
            headers["trailer"] = "server-timing"
            message["trailers"] = self._has_trailer = True

    def _timing(self) -> tuple[bytes, bytes]:
        return b"server-timing", server_timing(self._context.times, time.perf_counter()).encode()

    async def receive(self) -> Message:
        """The next message. Raises HTTPException 413 at the end of a body that is too large.

        Not before its end: if the server answered and closed while the client was still writing, the connection would
        be reset and the client would never see the answer. The excess is discarded as it arrives.
        """
        message = await self._timed_receive()
        if message["type"] != "http.request":
            return message
        self._num_body_bytes += len(message.get("body", b""))
        limit = self._state.settings.max_body_bytes
        if self._num_body_bytes <= limit:
            return message
        while message["type"] == "http.request" and message.get("more_body", False):
            message = await self._timed_receive()
        # FastAPI's class, the only one that FastAPI passes on while it reads the body
        raise HTTPException(413, f"the body is larger than {limit} bytes: send less at a time")

    async def _timed_receive(self) -> Message:
        """The next message. Raises HTTPException: 408 if the client stops sending in the middle of its body, 503 if the
        server stops before the body is complete.
        """
        if self._has_whole_body:
            return await self._receive()
        drain = self._state.drain
        try:
            async with drain.body_wait(self._state.settings.idle_timeout_s, self._start_s):
                message = await self._receive()
        except TimeoutError as error:
            self._has_whole_body = True  # nothing more will come
            if drain.has_begun:
                reason = "the server is stopping and reads no more of the body: try again later"
                raise BodyInterrupted(DrainingError(reason)) from error
            raise HTTPException(408, "the body did not arrive in time: send it without pauses") from error
        self._has_whole_body = not message.get("more_body", False)
        return message
