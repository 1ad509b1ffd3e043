"""What Ollama's routes share: how bodies are read, answers are written, and models are named."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Collection
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from tinyvllm.server.failures import UnknownModelError
from tinyvllm.server.intake import chooses

if TYPE_CHECKING:
    from tinyvllm.server.state import ServerState

API_VERSION = "0.32.15"  # of Ollama's API that these routes follow; clients require a minimum
DEFAULT_TAG = ":latest"
_JSON_TYPE = (b"content-type", b"application/json")


class OllamaError(BaseModel):
    """The body of every answer with a status of 400 or above, and the last line of a stream that fails."""

    error: str


class UntypedBodyRoute(APIRoute):
    """A route that reads any body as JSON, whatever its Content-Type says: Ollama does so, and its documents' examples
    send what curl says by default.

    Not for a browser's page of another origin. A page may send such a type without asking the server first (CORS), and
    an Origin header with it.
    """

    def get_route_handler(self) -> Callable[[Request], Awaitable[Response]]:  # type: ignore[override]
        handle = super().get_route_handler()

        async def handle_as_json(request: Request) -> Response:
            if "origin" not in request.headers:
                others = [header for header in request.scope["headers"] if header[0] != b"content-type"]
                request = Request({**request.scope, "headers": [*others, _JSON_TYPE]}, request.receive)
            return await handle(request)

        return handle_as_json


def make_router() -> APIRouter:
    return APIRouter(
        route_class=UntypedBodyRoute, responses={"4XX": {"model": OllamaError}, "5XX": {"model": OllamaError}}
    )


def openapi_lines(model: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """The OpenAPI entry of a route that may answer with a stream of `model`."""
    schema = {"type": "string", "description": f"Lines, each a {model.__name__} as JSON; the last has done=true."}
    return {200: {"content": {"application/x-ndjson": {"schema": schema}}}}


def require_model(state: ServerState, name: str) -> None:
    """Raise UnknownModelError if `name` is neither the served model nor an adapter of it."""
    if not chooses(state, name):
        raise unknown_model(name, state.all_names)


def unknown_model(name: object, known: Collection[str]) -> UnknownModelError:
    """The error in Ollama's wording, which clients look for, with the served names."""
    return UnknownModelError(f"model {name!a:.200} not found: this server has {', '.join(map(repr, known))}")


def tagged(name: str) -> str:
    """The name as Ollama lists it: with a tag, which requests may leave out if it is `latest`."""
    return name if ":" in name.rpartition("/")[2] else name + DEFAULT_TAG


def now() -> str:
    """The time, as RFC 3339: every line of a stream has it, so the seconds are formatted once."""
    seconds, rest_ns = divmod(time.time_ns(), 1_000_000_000)
    return f"{_up_to_seconds(seconds)}.{rest_ns // 1000:06}Z"


@lru_cache(maxsize=1)
def _up_to_seconds(unix_s: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(unix_s))
