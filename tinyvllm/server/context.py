"""The context of one HTTP request, wherever it is handled: its id and its share of the queue."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field

from tinyvllm.engine.async_engine import AdapterInfo
from tinyvllm.profiling import measure
from tinyvllm.server.request_times import RequestTimes

# ASGI's extension and message for fields at the end of an answer; offered if the client reads them
TRAILERS = "http.response.trailers"


@dataclass
class RequestContext:
    """The state of one request, from its arrival until its answer has been sent."""

    request_id: str
    is_own_id: bool = True  # we chose it, so it is unique; clients may repeat theirs
    keepalive_s: float | None = 15.0
    idle_timeout_s: float | None = 60.0
    is_counted_elsewhere: bool = False  # another server of ours answers it, and counts it
    times_own_events: bool = False  # its response applies idle_timeout_s to its parts by itself
    closers: list[Callable[[], None]] = field(default_factory=list)  # called once it has been answered or has failed
    num_body_bytes: int = 0  # of what has arrived, decompressed
    num_seqs: int = 0  # sequences admitted for it
    num_waiting_tokens: int = 0  # prompt tokens of those without output
    adapter: AdapterInfo | None = None  # the adapter that its field `model` names
    times: RequestTimes = field(default_factory=RequestTimes)


_current: ContextVar[RequestContext | None] = ContextVar("request", default=None)


@contextlib.contextmanager
def as_current(context: RequestContext) -> Iterator[None]:
    """Within the block, in this task and those that it starts, `current()` is `context`."""
    token = _current.set(context)
    try:
        yield
    finally:
        _current.reset(token)


def current() -> RequestContext:
    """The context of the request that is being handled; outside of all requests, one with the id "-"."""
    return _current.get() or RequestContext(request_id="-")


@contextlib.contextmanager
def request_span(name: str) -> Iterator[None]:
    """A span that names the request that is being handled, and counts among its times."""
    context, start_s = current(), time.perf_counter()
    try:
        with measure.span(name, http=context.request_id):
            yield
    finally:
        context.times.add(name, time.perf_counter() - start_s)


class RequestIdFilter(logging.Filter):
    """Prefixes log records with the id of the request that is being handled.

    The engine's thread serves many requests at once; its records name requests by ids that contain these.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        context = _current.get()
        if context is not None and not getattr(record, "has_request_id", False):
            record.msg = f"[{context.request_id}] {record.msg}"
            record.has_request_id = True  # a record passes one filter per handler
        return True


class AccessLogFilter(logging.Filter):
    """Drops access log lines of successful probes and scrapes, which come every second and carry no information, and
    removes query strings from the others, because these may contain keys (`?api_key=`)."""

    PATHS = ("/health", "/ready", "/ping", "/metrics", "/engine/state")

    def filter(self, record: logging.LogRecord) -> bool:
        arguments = record.args  # uvicorn's: client, method, path, HTTP version, status
        if record.name != "uvicorn.access" or not isinstance(arguments, tuple) or len(arguments) != 5:
            return True
        client, method, target, version, status = arguments
        path = str(target).partition("?")[0]
        record.args = (client, method, path, version, status)
        return not (path in self.PATHS and status == 200)
