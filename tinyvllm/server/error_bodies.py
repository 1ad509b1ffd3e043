"""How each API writes an error: as the body of an answer, and as the last event of a stream that fails.

A request's path determines its API, so that errors before any route (keys, limits, unknown paths) have the format that
its client reads.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel
from starlette.types import Scope

from tinyvllm.server.context import current

DONE = b"data: [DONE]\n\n"
ANTHROPIC_PATH = "/v1/messages"


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """OpenAI's body of every answer with a status of 400 or above."""

    error: ErrorDetail


def error_body(path: str, status: int, detail: ErrorDetail) -> str:
    """ASCII, because messages quote client input that may not be encodable as UTF-8."""
    return json.dumps(_body(path, status, detail))


def error_event(path: str, status: int, detail: ErrorDetail) -> bytes:
    """The end of a stream, in the format that `path` streams."""
    return event_of(path, error_body(path, status, detail).encode())


def event_of(path: str, body: bytes) -> bytes:
    """The body of an error as the end of a stream."""
    match api_of(path):
        case "anthropic":
            return b"event: error\ndata: " + body + b"\n\n"
        case "ollama":
            return body + b"\n"
        case _:
            return b"data: " + body + b"\n\n" + DONE


def path_of(scope: Scope) -> str:
    """The request's path, or for /v1/models, which two APIs have, one of the API that the request's headers name."""
    path: str = scope["path"]
    return ANTHROPIC_PATH if path.startswith("/v1/models") and names_anthropic(scope) else path


def names_anthropic(scope: Scope) -> bool:
    """Whether the request has the header that Anthropic's API requires."""
    return any(name == b"anthropic-version" for name, _ in scope["headers"])


def api_of(path: str) -> str:
    if path == ANTHROPIC_PATH or path.startswith(f"{ANTHROPIC_PATH}/"):
        return "anthropic"
    return "ollama" if path.startswith("/api/") else "openai"


def _body(path: str, status: int, detail: ErrorDetail) -> Mapping[str, Any]:
    match api_of(path):
        case "anthropic":
            kind = _ANTHROPIC_TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
            error: dict[str, Any] = {"type": kind, "message": detail.message}
            if detail.code is not None:
                error["details"] = {"error_code": detail.code}
            return {"type": "error", "error": error, "request_id": current().request_id}
        case "ollama":
            return {"error": detail.message}
        case _:
            return ErrorBody(error=detail).model_dump()


# https://docs.anthropic.com/en/api/errors
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
