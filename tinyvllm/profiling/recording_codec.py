"""Recordings as bytes: what a server hands over, and a benchmark reads."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from tinyvllm.errors import ProfilingError
from tinyvllm.profiling.measure import Recording

MEDIA_TYPE = "application/msgpack"

_decoder = msgspec.msgpack.Decoder(list[Recording])


def encode_recordings(recordings: Sequence[Recording]) -> bytes:
    """MessagePack."""
    return msgspec.msgpack.encode(list(recordings))


def decode_recordings(data: bytes) -> list[Recording]:
    """The inverse of `encode_recordings`. Raises ProfilingError for other bytes, such as those of another version."""
    try:
        return _decoder.decode(data)
    except msgspec.MsgspecError as error:
        raise ProfilingError(f"these are not recordings of this version of tinyvllm: {error}") from error
