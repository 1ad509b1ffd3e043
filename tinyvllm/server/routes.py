"""The files that have routes, and the APIs that they belong to."""

from __future__ import annotations

import importlib
from collections.abc import Collection, Iterator

from fastapi import APIRouter, FastAPI
from starlette.routing import BaseRoute, Match
from starlette.types import Scope

# Files below this directory, each with a `router`. Those in a directory of their own belong to that API, the others are
# the operator's. Requests look for their route in this order: the busiest come first.
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


def include_routes(app: FastAPI, apis: Collection[str]) -> None:
    """Add the operator's routes and those of `apis`."""
    for router in _routers(apis):
        app.include_router(router)


def find_route(scope: Scope, apis: Collection[str]) -> BaseRoute | None:
    """The route that a request will take, for those that need to know before the app looks for it."""
    routes = (route for router in _routers(apis) for route in router.routes)
    return next((route for route in routes if route.matches(scope)[0] is Match.FULL), None)


def _routers(apis: Collection[str]) -> Iterator[APIRouter]:
    for name in ROUTES:
        api = name.rpartition(".")[0]
        if not api or api in apis:
            yield importlib.import_module(f"tinyvllm.server.{name}").router
