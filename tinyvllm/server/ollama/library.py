"""POST /api/pull, and the routes that change which models a server has, which are refused with what to do instead."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import NoReturn

from pydantic import BaseModel, ConfigDict
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from tinyvllm.errors import RequestError
from tinyvllm.server.events import NDJSON
from tinyvllm.server.failures import failure_of
from tinyvllm.server.intake import json_response
from tinyvllm.server.model_names import is_name_of
from tinyvllm.server.ollama.models import NamedRequest
from tinyvllm.server.ollama.pulls import Progress, Pull, pulled_name, pulls_of
from tinyvllm.server.ollama.wire import make_router, openapi_lines, unknown_model
from tinyvllm.server.shelf import all_names, shelf_of

router = make_router()


class PullRequest(NamedRequest):
    """POST /api/pull. `insecure` has no effect."""

    stream: bool | None = None  # null: true
    insecure: bool | None = None


class CopyRequest(BaseModel):
    """POST /api/copy."""

    model_config = ConfigDict(extra="ignore", strict=True)

    source: str
    destination: str


@router.post("/api/pull", response_model=Progress, responses=openapi_lines(Progress))
async def pull_model(body: PullRequest, request: Request) -> Response:
    """Download a model, unless it is there. This does not make the server serve it."""
    lines = _progress(request, body.model_name)
    if body.stream is not False:
        return StreamingResponse(_as_json(lines, request.url.path), media_type=NDJSON)
    last = Progress(status="success")
    async for line in lines:
        last = line
    return json_response(last)


def _progress(request: Request, name: str) -> AsyncIterator[Progress]:
    """Lines of progress, which raise what the download raises. Raises UnknownModelError for an unknown name."""
    known = all_names(shelf_of(request).models())
    if is_name_of(name, known):
        return _progress_of(None)
    return _progress_of(pulls_of(request).start(pulled_name(name)))


async def _progress_of(pull: Pull | None) -> AsyncIterator[Progress]:
    """Lines until a download is complete; without one, for a model that is served already."""
    if pull is None:
        yield Progress(status="pulling manifest")
    else:
        async for line in pull.follow():
            yield line
        yield Progress(status=f"it is on this machine, but not served: run `tinyvllm serve {pull.name}`")
    yield Progress(status="success")


async def _as_json(lines: AsyncIterator[Progress], path: str) -> AsyncIterator[bytes]:
    try:
        async for line in lines:
            yield line.model_dump_json().encode() + b"\n"
    except Exception as error:  # any error: a stream that simply ended would look complete
        yield failure_of(error).event(path)


@router.delete("/api/delete")
async def delete_model(body: NamedRequest, request: Request) -> None:
    """Refused."""
    _require(request, body.model_name)
    _refuse("delete", "remove its files on the server's machine")


@router.post("/api/copy")
async def copy_model(body: CopyRequest, request: Request) -> None:
    """Refused."""
    _require(request, body.source)
    _refuse("copy", "start the server with --served-model-name to give a model other names")


@router.post("/api/create")
async def create_model(body: NamedRequest) -> None:
    """Refused."""
    _refuse("create", "start the server with the model's files, and send its system message and options in requests")


@router.post("/api/push")
async def push_model(body: NamedRequest) -> None:
    """Refused."""
    _refuse("push", "upload the model's files yourself")


@router.head("/api/blobs/{digest}", include_in_schema=False)
async def has_blob(digest: str) -> Response:
    """404: there are none."""
    return Response(status_code=404)


@router.post("/api/blobs/{digest}")
async def add_blob(digest: str, request: Request) -> None:
    """Refused."""
    async for _ in request.stream():  # a client that is still sending would not see the answer
        pass
    _refuse("blobs", "pull a model, or start the server with its files")


def _require(request: Request, name: str) -> None:
    known = all_names(shelf_of(request).models())
    if not is_name_of(name, known):
        raise unknown_model(name, known)


def _refuse(what: str, remedy: str) -> NoReturn:
    raise RequestError(f"/api/{what} is not supported: {remedy}", param="model")
