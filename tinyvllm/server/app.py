"""The ASGI application: routes, error bodies, and the middleware around every request."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from tinyvllm import __version__
from tinyvllm.errors import TinyvllmError
from tinyvllm.server import operations
from tinyvllm.server.body_shape import BodyShape
from tinyvllm.server.content_encoding import ContentEncoding
from tinyvllm.server.envelope import AppState, Envelope
from tinyvllm.server.failures import ClientGone, answer_failure
from tinyvllm.server.gate import ConnectionCheck
from tinyvllm.server.large_lane import LargeLane
from tinyvllm.server.openai.response_store import ResponseStore
from tinyvllm.server.routes import include_routes
from tinyvllm.server.security import FramingCheck, HostCheck, KeyCheck, KeyRing
from tinyvllm.server.settings import ServerSettings
from tinyvllm.server.shelf import SingleModel
from tinyvllm.server.state import ServerState

if TYPE_CHECKING:
    from tinyvllm.engine.async_engine import AsyncEngine
    from tinyvllm.server.front_ends import FrontEnds


def make_app(
    engine: AsyncEngine, settings: ServerSettings | None = None, front_ends: FrontEnds | None = None
) -> FastAPI:
    """The HTTP app of `engine`. The engine may still be loading, and the app does not shut it down.

    front_ends: what the app shares with the server's other front-ends; None if it is the only one.
    """
    settings = settings or ServerSettings()
    app = bare_app()
    state = app.state.server = ServerState(engine, settings, front_ends)
    app.state.shelf = SingleModel(state)
    app.state.responses = ResponseStore(ask_others=state.front_ends.ask_others)
    include_routes(app, settings.apis)
    app.add_middleware(BodyShape)
    if state.front_ends.large_lane is not None:
        app.add_middleware(LargeLane, uds=state.front_ends.large_lane, apis=settings.apis)
    guard(app, state)
    return app


def bare_app() -> FastAPI:
    """An app that has the page's files and the bodies of errors, but no routes yet."""
    app = FastAPI(title="tinyvllm", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.mount("/static", operations.PageFiles(directory=operations.STATIC))
    for kind in (TinyvllmError, ClientGone, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, answer_failure)
    return app


def guard(app: FastAPI, state: AppState) -> None:
    """Add the middleware that every request passes before it reaches the app: limits and access control."""
    settings = state.settings
    # the middleware added last is the outermost
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
            expose_headers=("x-request-id", "retry-after", "server-timing"),
        )
    if settings.allowed_hosts is not None:
        app.add_middleware(HostCheck, hosts=settings.allowed_hosts)
    app.add_middleware(ConnectionCheck)
    app.add_middleware(FramingCheck)
    app.add_middleware(Envelope, state=state)
