"""The files that have routes: ours, OpenAI's, and the few of vLLM's that OpenAI clients use."""

from __future__ import annotations

import importlib
from collections.abc import Iterator

from fastapi import APIRouter, FastAPI
from starlette.routing import BaseRoute, Match
from starlette.types import Scope

# Files in this directory, each with a `router`. Requests look for their route in this order: the busiest come first.
ROUTES = (
    "openai.completions",
    "openai.chat",
    "openai.responses",
    "openai.embeddings",
    "openai.rerank",
    "openai.models",
    "operations",
    "profile_routes",
)


def include_routes(app: FastAPI) -> None:
    """Add the routes of every file in ROUTES."""
    for router in _routers():
        app.include_router(router)


def find_route(scope: Scope) -> BaseRoute | None:
    """The route that a request will take, for those that need to know before the app looks for it."""
    routes = (route for router in _routers() for route in router.routes)
    return next((route for route in routes if route.matches(scope)[0] is Match.FULL), None)


def _routers() -> Iterator[APIRouter]:
    for name in ROUTES:
        yield importlib.import_module(f"tinyvllm.server.{name}").router
