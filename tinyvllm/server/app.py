"""The ASGI application: routes, error bodies, and the middleware around every request."""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from typing import TYPE_CHECKING

from fastapi import FastAPI, HTTPException
from fastapi.exceptions import RequestValidationError
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException as AnyHTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tinyvllm import __version__
from tinyvllm.errors import TinyvllmError
from tinyvllm.profiling import measure
from tinyvllm.server import operations
from tinyvllm.server.content_encoding import ContentEncoding
from tinyvllm.server.context import RequestContext, as_current
from tinyvllm.server.failures import BodyInterrupted, ClientGone, answer_failure, failure_of
from tinyvllm.server.large_lane import LargeLane
from tinyvllm.server.openai.response_store import ResponseStore
from tinyvllm.server.request_limits import DrainingError
from tinyvllm.server.routes import include_routes
from tinyvllm.server.security import HostCheck, KeyCheck, KeyRing
from tinyvllm.server.settings import ServerSettings
from tinyvllm.server.shelf import SingleModel
from tinyvllm.server.state import ServerState

if TYPE_CHECKING:
    from tinyvllm.engine.async_engine import AsyncEngine
    from tinyvllm.server.front_ends import FrontEnds

_VALID_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")
_SAFE_METHODS = ("GET", "HEAD", "OPTIONS")  # in the sense of RFC 9110: they change nothing


def make_app(
    engine: AsyncEngine, settings: ServerSettings | None = None, front_ends: FrontEnds | None = None
) -> FastAPI:
    """The HTTP app of `engine`. The engine may still be loading, and the app does not shut it down.

    front_ends: what the app shares with the server's other front-ends; None if it is the only one.
    """
    settings = settings or ServerSettings()
    app = FastAPI(title="tinyvllm", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False)
    state = app.state.server = ServerState(engine, settings, front_ends)
    app.state.shelf = SingleModel(state)
    app.state.responses = ResponseStore(ask_others=state.front_ends.ask_others)
    include_routes(app, settings.apis)
    app.mount("/static", operations.PageFiles(directory=operations.STATIC))
    for kind in (TinyvllmError, ClientGone, RequestValidationError, AnyHTTPException):
        app.add_exception_handler(kind, answer_failure)
    # the middleware added last is the outermost
    if state.front_ends.large_lane is not None:
        app.add_middleware(LargeLane, uds=state.front_ends.large_lane, apis=settings.apis)
    app.add_middleware(ContentEncoding, max_bytes=settings.max_body_bytes)
    if settings.api_keys:
        app.add_middleware(KeyCheck, keys=KeyRing(settings.api_keys))
    if settings.cors.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors.origins,
            allow_methods=settings.cors.methods,
            allow_headers=settings.cors.headers,
            allow_credentials=settings.cors.credentials,
            expose_headers=("x-request-id", "retry-after"),
        )
    if settings.allowed_hosts is not None:
        app.add_middleware(HostCheck, hosts=settings.allowed_hosts)
    app.add_middleware(Envelope, state=state)
    return app


class SilentClientError(OSError):
    """The client has neither read nor sent a byte for --idle-timeout, so it counts as gone."""


class Envelope:
    """Middleware around every request: assigns its id, enforces limits, counts it, and answers unhandled errors."""

    def __init__(self, app: ASGIApp, state: ServerState) -> None:
        self._app = app
        self._state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        await _Exchange(self._app, self._state, scope, receive, send).run()


class _Exchange:
    """One HTTP request and its response."""

    def __init__(self, app: ASGIApp, state: ServerState, scope: Scope, receive: Receive, send: Send) -> None:
        self._app = app
        self._state = state
        self._scope = scope
        self._receive = receive
        self._send = send
        self._status = 499  # until a response starts: nginx's code for a client that left first
        self._has_started = False
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
                    if self._status >= 400:
                        state.metrics.count_refusal(self._status)
                route = self._scope.get("route")
                handler = getattr(route, "path", "none")
                if measure.is_on():
                    self._measure(start_s, handler)
                if is_counted:
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
            MutableHeaders(scope=message)["x-request-id"] = self._context.request_id
        elif self._context.times_own_events and message.get("more_body", False):
            await self._send(message)  # without a timer: a stream sends one event per token, and not always from a task
            return
        try:
            async with asyncio.timeout(self._state.settings.idle_timeout_s):
                await self._send(message)
        except TimeoutError as error:
            raise SilentClientError("the client does not read") from error

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
