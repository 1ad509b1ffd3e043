"""What went wrong, as HTTP: the one place where errors become status codes and OpenAI's error body."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from tinyvllm.errors import EngineDeadError, RequestError, TinyvllmError
from tinyvllm.server.protocol import ErrorBody, ErrorDetail

log = logging.getLogger(__name__)

RETRY_AFTER_S = 5  # what clients are told to wait while the engine warms up
INVALID = "invalid_request_error"
SERVER = "server_error"


class UnknownModelError(TinyvllmError):
    """The request names a model that this server does not serve: HTTP 404."""


class NotReadyError(TinyvllmError):
    """The engine is still loading or warming up: HTTP 503, and worth another try."""


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

    def body(self) -> str:
        """OpenAI's error body. ASCII, since messages quote what clients send, and that need not encode as UTF-8."""
        detail = ErrorDetail(message=self.message, type=self.type, param=self.param, code=self.code)
        return json.dumps(ErrorBody(error=detail).model_dump())

    def response(self) -> Response:
        return Response(self.body(), self.status, headers=self.headers, media_type="application/json")


def failure_of(error: BaseException) -> Failure:
    """What to answer to `error`. Errors that are not ours are logged and told without their text."""
    match error:
        case RequestError():
            return Failure(400, str(error), INVALID, error.param, error.code)
        case RequestValidationError():
            return _of_validation(error.errors())
        case UnknownModelError():
            return Failure(404, str(error), INVALID, "model", "model_not_found")
        case HTTPException():
            kind = INVALID if error.status_code < 500 else SERVER
            return Failure(error.status_code, str(error.detail), kind, headers=error.headers or {})
        case NotReadyError():
            headers = {"retry-after": str(RETRY_AFTER_S)}
            return Failure(503, str(error), SERVER, code="engine_not_ready", headers=headers)
        case AbortedError():
            return Failure(503, str(error), SERVER, code="request_aborted", headers={"retry-after": str(RETRY_AFTER_S)})
        case EngineDeadError():
            return Failure(500, str(error), SERVER, code="engine_dead", headers={"x-should-retry": "false"})
        case TinyvllmError():
            return Failure(500, str(error), SERVER, code="generation_failed", headers={"x-should-retry": "false"})
        case _:
            log.error("a request failed with an error that nobody expected", exc_info=error)
            return Failure(500, "internal error: the server's log has the details", SERVER, code="internal_error")


def _of_validation(errors: Sequence[Mapping[str, Any]]) -> Failure:
    """The first of pydantic's complaints; `param` is its path in the body, such as messages.0.content."""
    first = errors[0]
    if first["type"] == "json_invalid":
        position = first["loc"][-1]
        reason = first.get("ctx", {}).get("error", "it cannot be parsed")
        return Failure(400, f"the body is not JSON: {reason} at character {position}", INVALID)
    path = [str(part) for part in first["loc"] if part != "body"]
    if not path:
        remedy = "send an object of JSON with the header Content-Type: application/json"
        return Failure(400, f"the body is missing or is not an object of JSON: {remedy}", INVALID)
    param = ".".join(path)
    if first["type"] == "missing":
        return Failure(400, f"{param} is required and missing", INVALID, param)
    return Failure(400, f"{param} is {_shown(first.get('input'))}: {_rule(first)}", INVALID, param)


def _shown(value: object) -> str:
    """A short form of what was sent; containers by their kind alone."""
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    text = ascii(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _rule(error: Mapping[str, Any]) -> str:
    """pydantic's sentence in our words: "Input should be a valid integer" -> "it must be a valid integer"."""
    message = str(error["msg"]).removeprefix("Value error, ").replace(" after validation", "")
    return message.replace("Input should be", "it must be").replace("List should have", "it must have")


async def answer_failure(request: Request, error: Exception) -> Response:
    """Starlette's handler for every error that a route raises, and for paths and methods that no route has."""
    if isinstance(error, ClientGone):
        return Response(status_code=499)  # nobody reads it; the number is what access logs know for this
    if isinstance(error, HTTPException) and error.status_code in (404, 405):
        error = HTTPException(error.status_code, _unrouted(request, error), error.headers)
    return failure_of(error).response()


def _unrouted(request: Request, error: HTTPException) -> str:
    path = ascii(request.url.path)[1:-1]
    if error.status_code == 405:
        return f"{path} does not take {request.method}: use {(error.headers or {}).get('Allow', 'another method')}"
    routes = "/v1/models, /v1/completions, /v1/chat/completions, /health, /metrics, /version"
    return f"no route {request.method} {path}: there are {routes}"
