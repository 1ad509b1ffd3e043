"""/start_profile and /stop_profile: record where the server's time goes, if --enable-profiling allows it."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, HTTPException, Request
from starlette.responses import Response

from tinyvllm.errors import ProfilingError
from tinyvllm.profiling import measure
from tinyvllm.profiling.recording_codec import MEDIA_TYPE, encode_recordings
from tinyvllm.profiling.request_stages import assemble
from tinyvllm.profiling.stage_rows import served_as_json
from tinyvllm.profiling.trace_events import trace_events
from tinyvllm.server import recordings
from tinyvllm.server.state import ServerState

router = APIRouter()

FORMATS = ("table", "trace", "recordings")


@router.post("/start_profile")
async def start_profile(request: Request) -> dict[str, str]:
    """Start recording the named spans of all threads and processes. 403 if profiling is off, 409 if it is running, also
    for --profile or --trace."""
    state = _require_profiling(request)
    answer = recordings.answer(recordings.START_PROFILE)
    if "error" in answer:
        raise HTTPException(409, answer["error"])
    await state.front_ends.ask_others(recordings.START_PROFILE)
    return {"status": "recording", "next": "POST /stop_profile, with ?format=trace for a trace for Perfetto"}


@router.post("/stop_profile")
async def stop_profile(request: Request, format: str = "table") -> Any:
    """Stop recording, and answer with its times by name and those of requests (`table`), with every span for Perfetto
    (`trace`), or with all there is in MessagePack (`recordings`), which `bench breakdown --served` reads.

    A server of several processes answers with a table for each, and with one trace that has rows for each. 409 if no
    recording runs that /start_profile started."""
    state = _require_profiling(request)
    if format not in FORMATS:
        raise HTTPException(400, f"format is {format!r}: choose one of {', '.join(FORMATS)}")
    try:
        own = measure.stop(measure.ROUTE)
    except ProfilingError as error:
        raise HTTPException(409, str(error)) from error
    others = recordings.read(await state.front_ends.ask_others(recordings.STOP_PROFILE))
    found = [own, *others.values()]
    if format == "recordings":
        return Response(encode_recordings(found), media_type=MEDIA_TYPE)
    if format == "trace":
        return trace_events(found)
    from tinyvllm.profiling.profile_report import recording_as_json  # here: its tables take 30 ms of a start to import

    requests = {"requests": served_as_json(assemble(found))}
    if not others:
        return recording_as_json(own) | requests
    return {"processes": {recording.process: recording_as_json(recording) for recording in found}} | requests


def _require_profiling(request: Request) -> ServerState:
    state: ServerState = request.app.state.server
    if not state.settings.enable_profiling:
        raise HTTPException(403, "profiling is off: start the server with --enable-profiling")
    return state
