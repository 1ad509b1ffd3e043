"""Routes for operators: health, readiness, metrics, the engine's state, and the page that shows it.

Probes may send HEAD: the answer is GET's without its body, which the server leaves out.
"""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel
from starlette.responses import FileResponse, Response
from starlette.staticfiles import StaticFiles

from tinyvllm import __version__
from tinyvllm.server.failures import StalledError
from tinyvllm.server.live import EngineState, engine_state
from tinyvllm.server.state import state_of

STATIC = Path(__file__).parent / "static"
# The page runs and loads only its own files, and no other page may frame it.
PAGE_HEADERS = {
    "content-security-policy": "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'; "
    "form-action 'none'",
    "cache-control": "no-cache",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}

router = APIRouter()


class Version(BaseModel):
    version: str


class Readiness(BaseModel):
    """Progress of the background warm-up."""

    num_captures: int  # graphs captured so far
    num_captures_to_come: int
    num_failed_captures: int  # larger graphs take their place


@router.get("/health", response_class=Response)
@router.head("/health", include_in_schema=False)
async def health(request: Request) -> Response:
    """200 with an empty body while the engine works; 503 until it is warm, when it has died, and when it stalls."""
    state = state_of(request)
    state.require_engine()
    stalled_s = state.watchdog.stalled_s
    if stalled_s is not None:
        raise StalledError(f"the engine has work, but has completed no step for {stalled_s:.0f} s")
    return Response()


@router.get("/ping", response_class=Response)
@router.head("/ping", include_in_schema=False)
@router.post("/ping", response_class=Response, include_in_schema=False)
async def ping(request: Request) -> Response:
    """/health under the name that SageMaker requires."""
    return await health(request)


@router.get("/ready")
@router.head("/ready", include_in_schema=False)
async def ready(request: Request) -> Readiness:
    """200 while new requests are accepted; 503 from the first stop signal on, while /health may still be 200.

    The body says how many graphs are still to be captured between steps. Until that is 0, steps may be slower.
    """
    state = state_of(request)
    if state.drain.has_begun:
        state.require_ready()
    await health(request)  # and no more: a full queue must not take the server out of rotation
    stats = state.engine.stats()
    return Readiness(
        num_captures=stats.num_captures,
        num_captures_to_come=stats.num_captures_to_come,
        num_failed_captures=stats.num_failed_captures,
    )


@router.get("/version")
@router.head("/version", include_in_schema=False)
async def version() -> Version:
    return Version(version=__version__)


@router.get("/metrics", response_class=Response)
@router.head("/metrics", include_in_schema=False)
async def metrics(request: Request) -> Response:
    found = state_of(request).metrics
    await found.look_at_adapters()
    return Response(found.render(), headers={"content-type": CONTENT_TYPE_LATEST})


@router.get("/engine/state")
async def live_state(request: Request) -> EngineState:
    """What the engine is doing: queue, blocks, latest steps. Made for the page; its shape may change."""
    return await engine_state(state_of(request))


@router.get("/", include_in_schema=False)
@router.head("/", include_in_schema=False)
async def page() -> FileResponse:
    return FileResponse(STATIC / "index.html", headers=PAGE_HEADERS)


class PageFiles(StaticFiles):
    """The page's script, style and icon."""

    def file_response(self, *arguments: object, **options: object) -> Response:
        response = super().file_response(*arguments, **options)  # type: ignore[arg-type]
        response.headers.update(PAGE_HEADERS)
        return response
