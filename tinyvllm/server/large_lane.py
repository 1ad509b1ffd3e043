"""Large requests go to a front-end of their own, because parsing one stops a process's event loop.

A body of 16 MiB takes 100 ms or more to parse and validate, in calls that hold the interpreter lock, which would stall
every stream of the process. So a front-end relays large bodies, as bytes, to one that serves nothing else.
"""

from __future__ import annotations

from collections.abc import Collection

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from tinyvllm.server.failures import ClientGone, LaneGoneError, failure_of
from tinyvllm.server.relay import RequestBody, relay_while_connected
from tinyvllm.server.routes import find_route

LARGE_BYTES = 256 * 2**10  # of a body: up to 2 ms to parse


class LargeLane:
    """Middleware that passes requests with large bodies on to the front-end that listens on a Unix socket.

    It is innermost, so that the checks of the others come first: access, time, size and the drain.
    """

    def __init__(self, app: ASGIApp, uds: str, apis: Collection[str]) -> None:
        self._app = app
        self._uds = uds
        self._apis = apis

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        length = _stated_length(scope)
        if scope["method"] in ("GET", "HEAD", "OPTIONS") or (length is not None and length <= LARGE_BYTES):
            await self._app(scope, receive, send)
            return
        scope["route"] = find_route(scope, self._apis)  # requests are counted by it
        body = RequestBody(receive, length=length)
        try:
            if length is not None or await body.read_beyond(LARGE_BYTES):
                await relay_while_connected(self._uds, scope, body, send, _gone)
                return
        except (HTTPException, LaneGoneError) as error:  # all come before the answer's start
            await failure_of(error).response(scope["path"])(scope, receive, send)
            return
        except (ClientGone, OSError):  # OSError: the client does not read
            return
        await self._app(scope, body.receive, send)


def _gone(reason: str) -> LaneGoneError:
    return LaneGoneError("the front-end for large bodies has died: try again later")


def _stated_length(scope: Scope) -> int | None:
    """Of the body, in bytes. 0 if it is not a number, which HTTP servers refuse."""
    lengths = [value for name, value in scope["headers"] if name == b"content-length"]
    return (int(lengths[0]) if lengths[0].isdigit() else 0) if lengths else None
