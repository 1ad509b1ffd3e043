"""The ASGI application: routes, error bodies, request ids and the limit on a body's size."""

from __future__ import annotations

import re
import uuid
from typing import TYPE_CHECKING

from fastapi import FastAPI, HTTPException
from fastapi.exceptions import RequestValidationError
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException as AnyHTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tinyvllm import __version__
from tinyvllm.errors import TinyvllmError
from tinyvllm.server.failures import ClientGone, answer_failure, failure_of
from tinyvllm.server.metrics import Metrics
from tinyvllm.server.routes import router
from tinyvllm.server.state import ServerState

if TYPE_CHECKING:
    from tinyvllm.engine.async_engine import AsyncEngine

MAX_BODY_BYTES = 16 * 2**20  # some million tokens of text, above any context that a laptop serves
_SANE_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")


def make_app(engine: AsyncEngine, *, max_body_bytes: int = MAX_BODY_BYTES) -> FastAPI:
    """The HTTP side of `engine`, which need not be ready yet and is not shut down here."""
    app = FastAPI(title="tinyvllm", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.server = ServerState(engine, Metrics(engine))
    app.include_router(router)
    for kind in (TinyvllmError, ClientGone, RequestValidationError, AnyHTTPException):
        app.add_exception_handler(kind, answer_failure)
    app.add_middleware(Envelope, max_body_bytes=max_body_bytes)
    return app


class Envelope:
    """Middleware around all requests: x-request-id in and out, 413 for large bodies, 500 for what nobody caught."""

    def __init__(self, app: ASGIApp, max_body_bytes: int) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        request_id = headers.get("x-request-id", "")
        if not _SANE_REQUEST_ID.fullmatch(request_id):
            request_id = uuid.uuid4().hex
        has_started = False

        async def send_with_id(message: Message) -> None:
            nonlocal has_started
            if message["type"] == "http.response.start":
                has_started = True
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            await self._app(scope, self._limited(receive), send_with_id)
        except Exception as error:
            if has_started:
                raise
            await failure_of(error).response()(scope, receive, send_with_id)

    def _limited(self, receive: Receive) -> Receive:
        """`receive` that reads a body of any size and raises 413 at its end if it was too large.

        To its end, because a server that answers and closes while the client still writes resets the connection, and
        the client never sees the answer. What is too much is thrown away as it comes.
        """
        num_bytes = 0

        async def limited() -> Message:
            nonlocal num_bytes
            message = await receive()
            if message["type"] != "http.request":
                return message
            num_bytes += len(message.get("body", b""))
            if num_bytes <= self._max_body_bytes:
                return message
            while message["type"] == "http.request" and message.get("more_body", False):
                message = await receive()
            # FastAPI's own class: its reading of the body lets that one through
            raise HTTPException(413, f"the body is larger than {self._max_body_bytes} bytes: send less at a time")

        return limited
