"""Errors as HTTP: the one place that turns them into status codes, types and codes."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

import fastapi
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute

from tinyvllm.errors import EngineDeadError, RequestError, TinyvllmError
from tinyvllm.server.error_bodies import ErrorDetail, error_body, error_event, path_of
from tinyvllm.server.request_limits import DrainingError, QueueFullError, RequestTimeoutError

log = logging.getLogger(__name__)

RETRY_AFTER_S = 5  # while the engine warms up, or until another server has taken over
QUEUE_RETRY_AFTER_S = 1  # while the queue is full: a place is free as soon as one answer is complete
MAX_MESSAGE_CHARS = 8192
INVALID_REQUEST = "invalid_request_error"
SERVER_ERROR = "server_error"


class UnknownModelError(TinyvllmError):
    """The request names a model that this server does not serve: HTTP 404."""


class UnknownResponseError(TinyvllmError):
    """The request's field `param` names a response that is not stored: HTTP 404."""

    def __init__(self, message: str, param: str) -> None:
        super().__init__(message)
        self.param = param


class NotReadyError(TinyvllmError):
    """The engine is still loading or warming up: HTTP 503, worth a retry."""


class BodyInterrupted(fastapi.HTTPException):
    """The server does not wait for the rest of a body. FastAPI passes on no other class while it reads a body."""

    def __init__(self, reason: TinyvllmError) -> None:
        super().__init__(503, str(reason))
        self.reason = reason


class LaneGoneError(TinyvllmError):
    """The front-end for large bodies has died, and is being started again: HTTP 503, worth a retry."""


class LoadFailedError(TinyvllmError):
    """One of several models could not be loaded: HTTP 503. A later request tries again."""


class DoesNotFitError(TinyvllmError):
    """One of several models does not fit in memory or within --max-loaded: HTTP 503, with the numbers."""


class ModelGoneError(TinyvllmError):
    """The process of one of several models has died: HTTP 503. The next request restarts it."""


class StalledError(TinyvllmError):
    """The engine has work, but its current step does not end: HTTP 503."""


class StepFailedError(TinyvllmError):
    """The engine ended the request with finish_reason "error": HTTP 500."""


class AbortedError(TinyvllmError):
    """The engine ended the request with finish_reason "abort", as it does when the server stops: HTTP 503."""


class ClientGone(Exception):
    """The client closed its connection before the answer was complete."""


@dataclass(frozen=True)
class Failure:
    """An answer of 400 or above."""

    status: int
    message: str
    type: str
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def detail(self) -> ErrorDetail:
        message = self.message
        if len(message) > MAX_MESSAGE_CHARS:  # most likely what the client has sent, which it knows
            message = message[: MAX_MESSAGE_CHARS - 3] + "..."
        return ErrorDetail(message=message, type=self.type, param=self.param, code=self.code)

    def response(self, path: str) -> Response:
        """In the format of the API that `path` belongs to."""
        body = error_body(path, self.status, self.detail())
        return Response(body, self.status, headers=self.headers, media_type="application/json")

    def event(self, path: str) -> bytes:
        """The end of a stream that has begun with status 200, in the format of the API that `path` belongs to."""
        return error_event(path, self.status, self.detail())


_UNREADABLE = "There was an error parsing the body"  # FastAPI, for what json.loads raises, as RecursionError
_RETRY_LATER = {"retry-after": str(RETRY_AFTER_S)}
_NO_RETRY = {"x-should-retry": "false"}  # OpenAI's clients retry otherwise

# The status, type, code and headers for states of the server. The first class that the error belongs to applies.
_STATES: tuple[tuple[type[TinyvllmError], int, str, str, Mapping[str, str]], ...] = (
    (QueueFullError, 429, "rate_limit_error", "queue_full", {"retry-after": str(QUEUE_RETRY_AFTER_S)}),
    (NotReadyError, 503, SERVER_ERROR, "engine_not_ready", _RETRY_LATER),
    (DrainingError, 503, SERVER_ERROR, "server_draining", {**_RETRY_LATER, "connection": "close"}),
    (LaneGoneError, 503, SERVER_ERROR, "front_end_gone", {"retry-after": str(QUEUE_RETRY_AFTER_S)}),
    (LoadFailedError, 503, SERVER_ERROR, "model_load_failed", _RETRY_LATER),
    (DoesNotFitError, 503, SERVER_ERROR, "model_does_not_fit", _RETRY_LATER),
    (ModelGoneError, 503, SERVER_ERROR, "model_gone", {"retry-after": str(QUEUE_RETRY_AFTER_S)}),
    (AbortedError, 503, SERVER_ERROR, "request_aborted", _RETRY_LATER),
    (StalledError, 503, SERVER_ERROR, "engine_stalled", _RETRY_LATER),
    (EngineDeadError, 503, SERVER_ERROR, "engine_dead", _NO_RETRY),
    (RequestTimeoutError, 504, SERVER_ERROR, "request_timeout", _NO_RETRY),
    (TinyvllmError, 500, SERVER_ERROR, "generation_failed", _NO_RETRY),
)


def failure_of(error: BaseException) -> Failure:
    """The answer to `error`. Errors that are not ours are logged, and answered without their text."""
    match error:
        case RequestError():
            return Failure(400, str(error), INVALID_REQUEST, param=error.param, code=error.code)
        case RequestValidationError():
            return _of_validation(error.errors())
        case UnknownResponseError():
            return Failure(404, str(error), INVALID_REQUEST, param=error.param, code="response_not_found")
        case UnknownModelError():
            return Failure(404, str(error), INVALID_REQUEST, param="model", code="model_not_found")
        case BodyInterrupted():
            return _of_state(error.reason)
        case HTTPException():
            kind = INVALID_REQUEST if error.status_code < 500 else SERVER_ERROR
            message = str(error.detail).replace(_UNREADABLE, "the body cannot be read: is it nested too deeply?")
            return Failure(error.status_code, message, kind, headers=error.headers or {})
        case TinyvllmError():
            return _of_state(error)
        case MemoryError():
            log.error("a request ran out of memory", exc_info=error)
            message = "out of memory: send less, or try again later"
            return Failure(503, message, SERVER_ERROR, code="out_of_memory", headers=_RETRY_LATER)
        case _:
            log.error("a request failed with an unexpected error", exc_info=error)
            return Failure(500, "internal error: the server's log has the details", SERVER_ERROR, code="internal_error")


def _of_state(error: TinyvllmError) -> Failure:
    status, kind, code, headers = next(row[1:] for row in _STATES if isinstance(error, row[0]))
    return Failure(status, _without_paths(error), kind, code=code, headers=headers)


_PATH = re.compile(r"(?<![\w/:.])~?(?:/[\w.+@-]+){2,}/?")


def _without_paths(error: BaseException) -> str:
    """The error's text without file paths of this machine, which clients need not know."""
    return _PATH.sub("(a file of the server)", str(error))


def _of_validation(errors: Sequence[Mapping[str, Any]]) -> Failure:
    """The first of pydantic's errors; `param` is its path in the body, such as messages.0.content."""
    first = errors[0]
    if first["type"] == "json_invalid":
        position = first["loc"][-1]
        reason = first.get("ctx", {}).get("error", "it cannot be parsed")
        return Failure(400, f"the body is not JSON: {reason} at character {position}", INVALID_REQUEST)
    path = [str(part) for part in first["loc"][1:]]  # the first says where: body, query or path
    if not path:
        remedy = "send a JSON object with the header Content-Type: application/json"
        return Failure(400, f"the body is missing or is not a JSON object: {remedy}", INVALID_REQUEST)
    param = ".".join(path)
    if first["type"] == "missing":
        return Failure(400, f"{param} is required and missing", INVALID_REQUEST, param=param)
    return Failure(400, f"{param} is {_shown(first.get('input'))}: {_rule(first)}", INVALID_REQUEST, param=param)


def _shown(value: object) -> str:
    """A short form of a value that was sent; of a container only its kind."""
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    text = ascii(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _rule(error: Mapping[str, Any]) -> str:
    """pydantic's message in our words: "Input should be a valid integer" -> "it must be a valid integer"."""
    message = str(error["msg"]).removeprefix("Value error, ").replace(" after validation", "")
    return re.sub(r"^(Input|List|String|Dictionary) should ", "it must ", message)


async def answer_failure(request: Request, error: Exception) -> Response:
    """Starlette's handler for errors that routes raise, and for paths and methods that no route has."""
    if isinstance(error, ClientGone):
        return Response(status_code=499)  # nobody reads it; the status is nginx's for a client that left
    if isinstance(error, HTTPException) and error.status_code in (404, 405) and _is_from_router(error):
        error = HTTPException(error.status_code, _unrouted(request, error), error.headers)
    return failure_of(error).response(path_of(request.scope))


def _is_from_router(error: HTTPException) -> bool:
    """Starlette's router raises errors without a text of their own; routes of ours have one."""
    return error.detail == HTTPStatus(error.status_code).phrase


def _unrouted(request: Request, error: HTTPException) -> str:
    path = ascii(request.url.path)[1:-1]
    path = path if len(path) <= 200 else path[:197] + "..."
    if error.status_code == 405:
        return f"{path} does not take {request.method}: use {(error.headers or {}).get('Allow', 'another method')}"
    # not from app.openapi(): building it stops the event loop for half a second
    paths = sorted(set(_paths(request.app.routes)))
    return f"no route {request.method} {path}: there are {', '.join(paths)}"


def _paths(routes: Iterable[BaseRoute]) -> Iterator[str]:
    """The paths of routes that the schema has, also of routers that FastAPI keeps whole."""
    for route in routes:
        if isinstance(route, APIRoute):
            if route.include_in_schema:
                yield route.path_format
        elif (router := getattr(route, "original_router", None)) is not None:
            yield from _paths(router.routes)
