"""What belongs to one HTTP request, wherever its handling has got to: its id, and what it holds of the queue."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass


@dataclass
class RequestContext:
    """Made when a request arrives and closed when its answer has been sent, whatever happened in between."""

    request_id: str
    is_own_id: bool = True  # we chose it, so it is unique; a client may send one twice
    keepalive_s: float | None = 15.0
    num_seqs: int = 0  # choices it was admitted with
    num_waiting_tokens: int = 0  # prompt tokens of those that have no output yet


_current: ContextVar[RequestContext | None] = ContextVar("request", default=None)


@contextlib.contextmanager
def entered(context: RequestContext) -> Iterator[None]:
    """Inside, in this task and those that it starts, `current` is this context."""
    token = _current.set(context)
    try:
        yield
    finally:
        _current.reset(token)


def current() -> RequestContext:
    """The request that is being handled; a nameless one outside of all requests."""
    return _current.get() or RequestContext(request_id="-")


class RequestIdFilter(logging.Filter):
    """Puts the request's id before the text of every log record that is written while it is handled.

    The engine's thread serves many requests at once; its records name requests by ids that contain these.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        context = _current.get()
        if context is not None and not getattr(record, "has_request_id", False):
            record.msg = f"[{context.request_id}] {record.msg}"
            record.has_request_id = True  # a record passes one filter a handler
        return True


class QuietPollsFilter(logging.Filter):
    """Drops access log lines of probes and scrapes that went well: they come every second and say nothing."""

    PATHS = ("/health", "/ready", "/ping", "/metrics", "/engine/state")

    def filter(self, record: logging.LogRecord) -> bool:
        arguments = record.args  # uvicorn's: client, method, path, HTTP version, status
        if record.name != "uvicorn.access" or not isinstance(arguments, tuple) or len(arguments) != 5:
            return True
        return not (str(arguments[2]).partition("?")[0] in self.PATHS and arguments[4] == 200)
