"""A limit on the number of values in a request's JSON.

Parsing holds the interpreter lock, so every stream of the process waits for it. Its time depends on the values in a
body more than on its length: 16 MiB of text take 40 ms, but as many bytes of empty objects take a second.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Iterable

from fastapi import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tinyvllm.server.context import current

MAX_VALUES = 400_000  # so many token ids take 50 ms to parse, and 50 ms to validate
MAX_CONTAINERS = 20_000  # objects and lists, which take ten times as long
MANY_CONTAINERS = 2000
_PIECE_BYTES = 2**20


class BodyShape:
    """Middleware that refuses bodies with too many values, and notes how large they are."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            receive = _Counted(receive).receive
        await self._app(scope, receive, send)


class _Counted:
    """The messages of a request, counted."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._parts: list[bytes] = []  # Starlette keeps them too
        self._num_commas = self._num_containers = 0
        self._is_complete = False

    async def receive(self) -> Message:
        """The next message. Raises HTTPException 413 at the end of a body that has too many values."""
        message = await self._receive()
        if message["type"] != "http.request" or self._is_complete:
            return message
        data = message.get("body", b"")
        self._parts.append(data)
        current().num_body_bytes += len(data)
        self._num_commas += data.count(b",")  # also those inside strings: the exact count is only taken if it matters
        self._num_containers += data.count(b"{") + data.count(b"[")
        if not message.get("more_body", False):
            self._is_complete = True
            parts, self._parts = self._parts, []
            if self._num_commas > MAX_VALUES or self._num_containers > MAX_CONTAINERS:
                _check(*await asyncio.to_thread(count_values, b"".join(parts)))
            if self._num_containers > MANY_CONTAINERS:
                _pause_collector()
        return message


def _pause_collector() -> None:
    """Pause Python's cyclic garbage collector for the rest of this turn of the event loop, in which the body is parsed
    and validated: otherwise it would take two thirds of the time to visit the new objects again and again."""
    if gc.isenabled():
        gc.disable()
        asyncio.get_running_loop().call_soon(gc.enable)


def _check(num_values: int, num_containers: int) -> None:
    for count, limit, what in (
        (num_values, MAX_VALUES, "values"),
        (num_containers, MAX_CONTAINERS, "objects and lists"),
    ):
        if count > limit:
            # FastAPI's class, the only one that FastAPI passes on while it reads the body
            raise HTTPException(413, f"the body has {count} {what}, but the limit is {limit}: send less at a time")


def count_values(data: bytes) -> tuple[int, int]:
    """(values, of these objects and lists) in a JSON text, which need not be valid: the commas and the brackets outside
    of strings."""
    commas, brackets = 0, 0
    for text in _outside_of_strings(data.replace(b"\\\\", b"").replace(b'\\"', b"")):
        commas += text.count(b",")
        brackets += text.count(b"{") + text.count(b"[")
    return commas + brackets, brackets


def _outside_of_strings(data: bytes) -> Iterable[bytes]:
    """The parts of a JSON text between its strings. A piece at a time, so that the interpreter is not held for long."""
    is_inside = False
    for start in range(0, len(data), _PIECE_BYTES):
        parts = data[start : start + _PIECE_BYTES].split(b'"')
        yield b"".join(parts[is_inside::2])  # one text for a million keys: counting in each takes seconds
        is_inside ^= len(parts) % 2 == 0
