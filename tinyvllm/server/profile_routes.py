"""/start_profile and /stop_profile: record where the server's time goes, if --enable-profiling allows it."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, HTTPException, Request

from tinyvllm.errors import ProfilingError
from tinyvllm.profiling import measure
from tinyvllm.profiling.profile_report import recording_as_json
from tinyvllm.profiling.trace_events import trace_events
from tinyvllm.server.state import ServerState

router = APIRouter()


@router.post("/start_profile")
async def start_profile(request: Request) -> dict[str, str]:
    """Start recording the named spans of all threads. 403 if profiling is off, 409 if a recording is running."""
    _require_profiling(request)
    try:
        measure.start()
    except ProfilingError as error:
        raise HTTPException(409, str(error)) from error
    return {"status": "recording", "next": "POST /stop_profile, with ?format=trace for a trace for Perfetto"}


@router.post("/stop_profile")
async def stop_profile(request: Request, format: str = "table") -> dict[str, Any]:
    """Stop recording, and answer with its times by name (`table`), or with every span for Perfetto (`trace`)."""
    _require_profiling(request)
    if format not in ("table", "trace"):
        raise HTTPException(400, f"format is {format!r}: give table or trace")
    try:
        recording = measure.stop()
    except ProfilingError as error:
        raise HTTPException(409, str(error)) from error
    return trace_events(recording) if format == "trace" else recording_as_json(recording)


def _require_profiling(request: Request) -> None:
    state: ServerState = request.app.state.server
    if not state.settings.enable_profiling:
        raise HTTPException(403, "profiling is off: start the server with --enable-profiling")
