"""Limits the number of connections: accepted sockets become connections here, or are refused.

A connection costs an open file, and anyone who can reach the port can open thousands without sending a byte. At the
maximum, a new connection replaces the one that has been idle longest. If none is idle, a few more are accepted for
probes such as /health; other requests on them are refused, and further connections are refused at once.
"""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import ssl
import time
from collections.abc import Callable, Sequence
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from tinyvllm.server.error_bodies import path_of
from tinyvllm.server.failures import QUEUE_RETRY_AFTER_S, SERVER_ERROR, Failure

log = logging.getLogger(__name__)

MAX_ACCEPTS = 16  # per turn of the event loop, which serves open connections in between
RETRY_S = 0.1  # after an accept that failed, for example because of too many open files
NUM_EXTRA = 32  # connections for probes, beyond the maximum
IDLE_SHARE = 16  # one in so many connections is closed at a time, so that the search for idle ones is rare
FIRST_BYTES_S = 75.0  # how long a connection may be open before its first request
LOG_PERIOD_S = 60.0
IS_OVER_LIMIT = "is_over_connection_limit"  # in a connection's state
MESSAGE = "the server has reached its limit of connections: try again later, or raise --max-connections"
_CODE = "too_many_connections"
_BODY = json.dumps({"error": {"message": MESSAGE, "type": SERVER_ERROR, "param": None, "code": _CODE}}).encode()
REFUSAL = (
    b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nretry-after: 1\r\nconnection: close\r\n"
    b"content-length: %d\r\n\r\n%b" % (len(_BODY), _BODY)
)

MakeProtocol = Callable[[dict[str, Any]], asyncio.Protocol]  # of the state that its requests get


class RareLog:
    """Logs an event that may happen thousands of times a second: once in LOG_PERIOD_S, with its count so far."""

    def __init__(self, level: int, text: str) -> None:
        """text: has %d for the count, and %s for the latest detail."""
        self._level = level
        self._text = text
        self._count = 0
        self._next_s = 0.0  # monotonic clock

    def add(self, detail: object) -> None:
        self._count += 1
        now_s = time.monotonic()
        if now_s >= self._next_s:
            self._next_s = now_s + LOG_PERIOD_S
            log.log(self._level, self._text, self._count, detail)


class Gate:
    """Owns the number of open connections. `connections` is uvicorn's set of them. Used on one event loop."""

    def __init__(
        self,
        make_protocol: MakeProtocol,
        connections: set[Any],
        tls: ssl.SSLContext | None,
        max_connections: int,
    ) -> None:
        self._make_protocol = make_protocol
        self._connections = connections
        self._tls = tls
        self._max = max_connections
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()  # of connections that are not in the set yet
        self._num_closed = 0  # idle connections that were closed, and whose places nobody has taken yet
        self._refused = RareLog(logging.WARNING, "connections are refused (%d so far): %s")
        self._closed = RareLog(logging.WARNING, "idle connections make room for new ones (%d times so far): %s")

    def admit(self, sock: socket.socket) -> asyncio.Task[None] | None:
        """Serve an accepted connection; the task ends once it is a connection or is lost. None if it was refused."""
        num_open = len(self._connections) + len(self._tasks)
        state: dict[str, Any] = {}
        if num_open >= self._max and not self.make_room():
            if num_open >= self._max + NUM_EXTRA:
                self._refuse(sock)
                return None
            state[IS_OVER_LIMIT] = True
        task = self._loop.create_task(self._serve(sock, state))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def make_room(self) -> bool:
        """Close the connections that have been idle longest. Returns whether there is room now."""
        if not self._num_closed:
            idle = sorted(filter(_is_idle, self._connections), key=_idle_since)
            oldest = idle[: len(self._connections) // IDLE_SHARE + 1]
            for connection in oldest:
                connection.transport.close()
            if not oldest:
                return False
            self._closed.add(f"{len(self._connections)} are open, the limit is {self._max}")
            self._num_closed = len(oldest)
        self._num_closed -= 1
        return True

    async def _serve(self, sock: socket.socket, state: dict[str, Any]) -> None:
        try:
            sock.setblocking(False)
            if sock.family != socket.AF_UNIX:  # uvloop would do it for connections that it accepts itself only
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            _, protocol = await self._loop.connect_accepted_socket(
                lambda: self._make_protocol(state), sock, ssl=self._tls
            )
            _close_without_request(protocol, self._loop)
        except OSError as error:  # it was closed in the meantime, or is not TLS
            log.debug("a connection ended before its first request: %s", error)
            sock.close()

    def _refuse(self, sock: socket.socket) -> None:
        """Answer without reading the request, so that a refusal costs next to nothing."""
        try:
            sock.setblocking(False)
            self._refused.add(f"{len(self._connections)} are open, the limit is {self._max}: --max-connections")
            if self._tls is None:
                sock.send(REFUSAL)
                sock.shutdown(socket.SHUT_WR)
                sock.recv(1 << 16)  # with unread bytes, closing it would discard the answer
        except OSError:
            pass
        finally:
            sock.close()


def _is_idle(connection: Any) -> bool:
    """Whether one of uvicorn's connections has no request. The TLS handshake is over by then."""
    cycle, transport = connection.cycle, connection.transport
    return transport is not None and not transport.is_closing() and (cycle is None or cycle.response_complete)


def _idle_since(connection: Any) -> float:
    """Orders idle connections. One in the middle of a request's head has no timer, and is closed last."""
    timer = connection.timeout_keep_alive_task
    return float("inf") if timer is None else timer.when()


def _close_without_request(protocol: Any, loop: asyncio.AbstractEventLoop) -> None:
    """Limit the time before the first request. uvicorn only limits the time between two: its timer is used for both."""
    if protocol.cycle is None and protocol.timeout_keep_alive_task is None:
        protocol.timeout_keep_alive_task = loop.call_later(FIRST_BYTES_S, protocol.timeout_keep_alive_handler)


class Acceptor:
    """Accepts connections for a server of one process."""

    def __init__(self, listeners: Sequence[socket.socket], gate: Gate) -> None:
        self._listeners = list(listeners)
        self._gate = gate
        self._loop = asyncio.get_running_loop()
        self._failed = RareLog(logging.ERROR, "connections cannot be accepted (%d times so far): %s")
        self._is_closed = False
        self._resume()

    def close(self) -> None:
        """Accept no more. The sockets stay open."""
        self._is_closed = True
        self._pause()

    def _resume(self) -> None:
        if not self._is_closed:
            for listener in self._listeners:
                listener.setblocking(False)
                self._loop.add_reader(listener, self._accept, listener)

    def _pause(self) -> None:
        for listener in self._listeners:
            if listener.fileno() >= 0:
                self._loop.remove_reader(listener)

    def _accept(self, listener: socket.socket) -> None:
        for _ in range(MAX_ACCEPTS):
            try:
                connection = listener.accept()[0]
            except (BlockingIOError, ConnectionAbortedError, InterruptedError):
                return
            except OSError as error:  # for example, too many open files
                self._failed.add(error)
                self._gate.make_room()
                self._pause()
                self._loop.call_later(RETRY_S, self._resume)
                return
            self._gate.admit(connection)


class ConnectionCheck:
    """Middleware that refuses work on a connection beyond the maximum, which is open for probes."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD") or IS_OVER_LIMIT not in scope.get("state", ()):
            await self._app(scope, receive, send)
            return
        headers = {"retry-after": str(QUEUE_RETRY_AFTER_S), "connection": "close"}
        failure = Failure(503, MESSAGE, SERVER_ERROR, code=_CODE, headers=headers)
        await failure.response(path_of(scope))(scope, receive, send)
