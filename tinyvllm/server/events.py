"""Server-sent events as bytes, made from models, or from bytes that a model made once."""

from __future__ import annotations

import uuid
from abc import ABC, abstractmethod
from typing import Any, Protocol

import msgspec
from pydantic import BaseModel

from tinyvllm.server.answers import Tally
from tinyvllm.server.body_timings import Timings, timings_of
from tinyvllm.server.error_bodies import DONE
from tinyvllm.server.failures import failure_of
from tinyvllm.server.generation import Item
from tinyvllm.server.request_times import RequestTimes

EVENT_STREAM = "text/event-stream"
NDJSON = "application/x-ndjson"
STREAM_TYPES = (EVENT_STREAM, NDJSON)
KEEPALIVE = b": keep-alive\n\n"  # a comment, which clients of server-sent events skip

# A string as JSON in UTF-8: the same bytes as pydantic's for every string, in 0.1 us. Both refuse lone surrogates,
# which a detokenizer never makes.
json_string = msgspec.json.Encoder().encode

_MARK = uuid.uuid4().hex  # stands for a text that is not known yet; no model's name or id contains it


class Events(Protocol):
    """Formats the events of one answer. Each method returns the bytes of any number of events."""

    @property
    def media_type(self) -> str:
        """One of STREAM_TYPES."""

    def keepalive(self) -> bytes:
        """What is sent when the stream has been silent for a while, because proxies end silent streams. Nothing, if the
        format has no event without a meaning."""

    def begin(self) -> bytes:
        """The events before the first item."""

    def take(self, item: Item) -> bytes:
        """The events of an item."""

    def end(self) -> bytes:
        """The events after the last item."""

    def fail(self, error: BaseException) -> bytes:
        """The events that end an answer early. Status 200 has already been sent, so an event reports the error."""


def frame(chunk: BaseModel, *, omit: set[str] | None = None) -> bytes:
    """`chunk` as one server-sent event."""
    return b"data: " + chunk.model_dump_json(exclude=omit).encode() + b"\n\n"


class TextEvent:
    """An event that differs from others in one text only: its bytes before and after the text, made once.

    A token's event is `event.head + json_string(text) + event.tail`.
    """

    MARK = _MARK

    def __init__(self, example: bytes, quoted_mark: bytes = json_string(_MARK)) -> None:
        """example: an event whose text is MARK."""
        parts = example.split(quoted_mark)
        assert len(parts) == 2, f"the event has {len(parts) - 1} marks instead of one"
        self.head, self.tail = parts


class ServerSentEvents:
    """What all formats of server-sent events share."""

    media_type = EVENT_STREAM

    def keepalive(self) -> bytes:
        return KEEPALIVE


class ChunkEvents(ServerSentEvents, ABC):
    """What the events of completions and chats share: a token's event from bytes made once, the rest from models, and
    the usage at the end if requested. Owns the token counts."""

    def __init__(self, *, include_usage: bool, continuous_usage: bool, times: RequestTimes | None = None) -> None:
        """times: the request's, for `timings` in every chunk."""
        self._times = times
        self._include_usage = include_usage
        self._continuous_usage = continuous_usage
        self._tally = Tally()
        self._texts: dict[int, TextEvent] = {}  # by choice, once it has begun: the event of a text

    def take(self, item: Item) -> bytes:
        delta = item.delta
        event = self._texts.get(item.choice)
        if event is None or delta.finish_reason is not None or delta.logprobs:
            return self._write(item)
        if not delta.text:
            return b""
        return event.head + json_string(delta.text) + event.tail

    def end(self) -> bytes:
        return (self._frame([], has_usage=True) if self._include_usage else b"") + DONE

    def fail(self, error: BaseException) -> bytes:
        return failure_of(error).event("")  # OpenAI's

    def _timings(self) -> Timings | None:
        """`timings` of a chunk, if they were asked for and there are any."""
        return None if self._times is None else timings_of(self._times, self._tally.num_outputs)

    @abstractmethod
    def _write(self, item: Item) -> bytes:
        """The events of an item, made from models."""

    @abstractmethod
    def _frame(self, choices: list[Any], *, has_usage: bool) -> bytes:
        """A chunk with these choices as an event."""
