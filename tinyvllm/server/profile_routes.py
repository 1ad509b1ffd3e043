"""/start_profile and /stop_profile: record where the server's time goes, if --enable-profiling allows it."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, HTTPException, Request
from starlette.responses import Response

from tinyvllm.errors import ProfilingError
from tinyvllm.profiling import measure
from tinyvllm.profiling.profile_report import recording_as_json
from tinyvllm.profiling.recording_codec import MEDIA_TYPE, encode_recordings
from tinyvllm.profiling.request_stages import assemble
from tinyvllm.profiling.stage_rows import served_as_json
from tinyvllm.profiling.trace_events import trace_events
from tinyvllm.server.state import ServerState

router = APIRouter()

FORMATS = ("table", "trace", "recordings")


@router.post("/start_profile")
async def start_profile(request: Request) -> dict[str, str]:
    """Start recording the named spans of all threads. 403 if profiling is off, 409 if a recording is running."""
    _require_profiling(request)
    try:
        measure.start(watches=True)
    except ProfilingError as error:
        raise HTTPException(409, str(error)) from error
    return {"status": "recording", "next": "POST /stop_profile, with ?format=trace for a trace for Perfetto"}


@router.post("/stop_profile")
async def stop_profile(request: Request, format: str = "table") -> Any:
    """Stop recording, and answer with its times by name and those of requests (`table`), with every span for Perfetto
    (`trace`), or with all there is in MessagePack (`recordings`), which `bench breakdown --served` reads."""
    _require_profiling(request)
    if format not in FORMATS:
        raise HTTPException(400, f"format is {format!r}: choose one of {', '.join(FORMATS)}")
    try:
        recording = measure.stop()
    except ProfilingError as error:
        raise HTTPException(409, str(error)) from error
    if format == "recordings":
        return Response(encode_recordings([recording]), media_type=MEDIA_TYPE)
    if format == "trace":
        return trace_events(recording)
    return recording_as_json(recording) | {"requests": served_as_json(assemble([recording]))}


def _require_profiling(request: Request) -> None:
    state: ServerState = request.app.state.server
    if not state.settings.enable_profiling:
        raise HTTPException(403, "profiling is off: start the server with --enable-profiling")
