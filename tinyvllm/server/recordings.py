"""Recordings of the server's processes, which travel as files: they may be larger than what a control link carries."""

from __future__ import annotations

import logging
import os
import tempfile
from pathlib import Path

from tinyvllm.errors import ProfilingError
from tinyvllm.faults import reach
from tinyvllm.profiling import measure
from tinyvllm.profiling.measure import Recording
from tinyvllm.profiling.recording_codec import decode_recordings, encode_recordings
from tinyvllm.server.control import Message

log = logging.getLogger(__name__)

START_PROFILE, STOP_PROFILE = "start_profile", "stop_profile"  # the routes' recording
START_FLAGS_PROFILE, STOP_FLAGS_PROFILE = "start_flags_profile", "stop_flags_profile"  # that of --profile and --trace
_STARTS = {START_PROFILE: measure.ROUTE, START_FLAGS_PROFILE: measure.FLAGS}
_STOPS = {STOP_PROFILE: measure.ROUTE, STOP_FLAGS_PROFILE: measure.FLAGS}


def answer(question: str) -> Message:
    """Start or stop this process's recording; {"error"} if that is not possible, and {"file"} for a recording."""
    try:
        if question in _STARTS:
            measure.start(watches=True, owner=_STARTS[question])
            return {}
        if question in _STOPS:
            return {"file": _write(measure.stop(_STOPS[question]))}
    except ProfilingError as error:
        return {"error": str(error)}
    except (OSError, MemoryError) as error:
        log.exception("the recording is lost")
        return {"error": f"the recording cannot be written: {error}"}
    return {"error": f"no question {question!r}"}


def read(answers: dict[str, Message]) -> dict[str, Recording]:
    """The recordings of the processes that had one. Their files are removed."""
    return {name: _read(Path(message["file"])) for name, message in answers.items() if "file" in message}


def _write(recording: Recording) -> str:
    handle, path = tempfile.mkstemp(prefix="tinyvllm-recording-")
    try:
        with os.fdopen(handle, "wb") as file:
            reach("disk.recording")
            file.write(encode_recordings([recording]))
    except BaseException:
        os.unlink(path)
        raise
    return path


def _read(path: Path) -> Recording:
    try:
        return decode_recordings(path.read_bytes())[0]
    finally:
        path.unlink()
