"""The files that have routes, and the APIs that they belong to."""

from __future__ import annotations

import asyncio
import importlib
import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

from fastapi import APIRouter, FastAPI
from starlette.datastructures import URLPath
from starlette.routing import BaseRoute, Match, NoMatchFound
from starlette.types import Receive, Scope, Send

log = logging.getLogger(__name__)

# Files below this directory, each with a `router`. Those in a directory of their own belong to that API, the others are
# the operator's. Requests look for their route in this order, the late ones last: the busiest come first.
ROUTES = (
    "openai.completions",
    "openai.chat",
    "anthropic.messages",
    "openai.responses",
    "openai.embeddings",
    "openai.rerank",
    "anthropic.models",  # before OpenAI's: it takes requests with its own header only
    "openai.models",
    "openai.adapters",
    "ollama.chat",
    "ollama.generate",
    "ollama.embed",
    "ollama.models",
    "ollama.library",
    "cache_routes",
    "operations",
    "request_routes",
    "profile_routes",
)


# Those of ROUTES that a start does without: their protocols take 0.15 s to import, 5 % of a start on two cores
LATE = frozenset(
    {
        "anthropic.messages",
        "openai.responses",
        "openai.embeddings",
        "openai.rerank",
        "ollama.chat",
        "ollama.generate",
        "ollama.embed",
        "ollama.models",
        "ollama.library",
    }
)
IDLE_POLL_S = 1.0


def include_routes(app: FastAPI, apis: Collection[str]) -> None:
    """Add the operator's routes and those of `apis`: those of LATE when a request or the schema may need them."""
    late = LateRoutes(app, [name for name in _names(apis) if name in LATE])
    for name in _names(apis):
        if name not in LATE:
            app.include_router(_router(name))
    app.router.routes.append(late)
    make_schema = app.openapi

    def openapi() -> dict[str, Any]:
        late.load()
        return make_schema()

    app.openapi = openapi  # type: ignore[method-assign]


class LateRoutes(BaseRoute):
    """Stands behind all other routes. A request that gets here has none of them, so its own is added, with all that are
    late; the app's router, which looks at one route after the other, then finds it."""

    def __init__(self, app: FastAPI, names: Sequence[str]) -> None:
        self._app, self._names = app, list(names)

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        self.load()
        return Match.NONE, {}

    def load(self) -> None:
        """Add all that are not there yet."""
        while self.load_one():
            pass

    def load_one(self) -> bool:
        """Add the next. Returns whether there was one."""
        if not self._names:
            return False
        self._app.include_router(_router(self._names[0]))
        del self._names[0]
        return True

    @property
    def names(self) -> tuple[str, ...]:
        """Those of ROUTES that are not there yet."""
        return tuple(self._names)

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        raise AssertionError("it matches no request")

    def url_path_for(self, name: str, /, **path_params: Any) -> URLPath:
        raise NoMatchFound(name, path_params)


def late_routes(app: FastAPI) -> LateRoutes:
    """Those of an app that has passed `include_routes`."""
    return next(route for route in app.router.routes if isinstance(route, LateRoutes))


async def load_when_idle(late: LateRoutes, is_idle: Callable[[], bool]) -> None:
    """Add late routes while the server has nothing else to do, so that no stream waits when one is needed."""
    is_left = True
    while is_left:
        await asyncio.sleep(IDLE_POLL_S)
        while is_left and is_idle():
            try:
                is_left = late.load_one()
            except Exception:
                log.exception(
                    "the routes of %s cannot be loaded: until what the traceback names is mended, requests for them, "
                    "which try it again, are answered with status 500",
                    ", ".join(late.names),
                )
                return
            await asyncio.sleep(0)  # each takes up to 30 ms


def find_route(scope: Scope, apis: Collection[str]) -> BaseRoute | None:
    """The route that a request will take, for those that need to know before the app looks for it."""
    routes = (route for name in _names(apis) for route in _router(name).routes)
    return next((route for route in routes if route.matches(scope)[0] is Match.FULL), None)


def _names(apis: Collection[str]) -> Iterator[str]:
    for name in ROUTES:
        api = name.rpartition(".")[0]
        if not api or api in apis:
            yield name


def _router(name: str) -> APIRouter:
    router: APIRouter = importlib.import_module(f"tinyvllm.server.{name}").router
    return router
