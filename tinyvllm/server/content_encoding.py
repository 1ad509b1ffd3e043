"""Compressed request bodies: `Content-Encoding: gzip` and `deflate` (RFC 9110, section 8.4).

A few bytes can expand to gigabytes, so a body is decompressed in pieces and rejected as soon as it is too large.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Iterator

from fastapi import HTTPException
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tinyvllm.server.failures import INVALID_REQUEST, Failure

ENCODINGS = {"gzip": "gzip", "x-gzip": "gzip", "deflate": "deflate"}  # names of the header -> what they mean
ACCEPTED = "gzip, deflate"
MAX_ENCODINGS = 4  # of one body, applied one after the other; more serve only to use up memory
PIECE_BYTES = 64 * 2**10  # of decompressed data at a time: 0.2 ms
INLINE_BYTES = 2**10  # a longer message, which may expand to megabytes, is decompressed on a worker thread


class ContentEncoding:
    """Middleware that decompresses request bodies. Inner apps see plain bodies of unstated length."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        """max_bytes: of a decompressed body."""
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not any(name == b"content-encoding" for name, _ in scope["headers"]):
            await self._app(scope, receive, send)
            return
        names = [name for name in _names(scope) if name != "identity"]
        unknown = [name for name in names if name not in ENCODINGS]
        if unknown or len(names) > MAX_ENCODINGS:
            reason = f"{unknown[0][:40]!a} is not supported" if unknown else f"{len(names)} encodings are too many"
            await _refuse(f"Content-Encoding: {reason}: send gzip, deflate or a plain body", scope, receive, send)
            return
        dropped = {b"content-encoding"}
        if names:
            dropped.add(b"content-length")
            receive = _Decompressed(receive, [ENCODINGS[name] for name in reversed(names)], self._max_bytes).receive
        scope["headers"] = [(name, value) for name, value in scope["headers"] if name not in dropped]
        await self._app(scope, receive, send)


def _names(scope: Scope) -> list[str]:
    """The encodings, in the order in which they were applied."""
    values = ",".join(Headers(scope=scope).getlist("content-encoding"))
    return [name.strip().lower() for name in values.split(",") if name.strip()]


async def _refuse(message: str, scope: Scope, receive: Receive, send: Send) -> None:
    # read the body to its end: a client that is still writing would not see the answer
    while (incoming := await receive())["type"] == "http.request" and incoming.get("more_body", False):
        pass
    failure = Failure(415, message, INVALID_REQUEST, param="Content-Encoding", headers={"accept-encoding": ACCEPTED})
    await failure.response(scope["path"])(scope, receive, send)


class _Decompressed:
    """The messages of a request, decompressed."""

    def __init__(self, receive: Receive, encodings: list[str], max_bytes: int) -> None:
        """encodings: the one to undo first comes first."""
        self._receive = receive
        self._stages = [_Stage(encoding, max_bytes) for encoding in encodings]
        self._is_complete = False

    async def receive(self) -> Message:
        """The next message. Raises HTTPException at the end of the body: 400 if it is damaged, 413 if too large."""
        message = await self._receive()
        if message["type"] != "http.request" or self._is_complete:
            return message
        data, is_last = message.get("body", b""), not message.get("more_body", False)
        try:
            if len(data) <= INLINE_BYTES:
                plain = self._decompress(data, is_last)
            else:
                plain = await asyncio.to_thread(self._decompress, data, is_last)
        except HTTPException:
            while not is_last:  # a client that is still writing would not see the answer
                message = await self._receive()
                is_last = message["type"] != "http.request" or not message.get("more_body", False)
            raise
        self._is_complete = is_last
        return {"type": "http.request", "body": plain, "more_body": not is_last}

    def _decompress(self, data: bytes, is_last: bool) -> bytes:
        return b"".join(self._pieces(data, is_last, 0))

    def _pieces(self, data: bytes, is_last: bool, number: int) -> Iterator[bytes]:
        """The output of `data` from stage `number` and those after it."""
        if number == len(self._stages):
            yield data
            return
        for piece in self._stages[number].pieces(data):
            yield from self._pieces(piece, False, number + 1)
        if is_last:
            self._stages[number].finish()
            yield from self._pieces(b"", True, number + 1)


class _Stage:
    """Undoes one encoding. A gzip body may have several members, one after the other."""

    def __init__(self, encoding: str, max_bytes: int) -> None:
        self._is_gzip = encoding == "gzip"
        self._stream = zlib.decompressobj(wbits=31) if self._is_gzip else None
        self._head = b""  # of a deflated body, until it shows its format
        self._has_data = False
        self._max_bytes = max_bytes
        self._num_bytes = 0

    def pieces(self, data: bytes) -> Iterator[bytes]:
        """The decompressed data, at most PIECE_BYTES at a time. Raises HTTPException."""
        self._has_data |= bool(data)
        if self._stream is None:
            self._head += data
            if len(self._head) < 2:
                return
            self._stream = zlib.decompressobj(wbits=15 if _has_zlib_header(self._head) else -15)
            data = self._head
        is_full = False  # the last piece was, so zlib may hold more of what it has read
        while data or is_full:
            if self._stream.eof:
                data = data.lstrip(b"\0")  # padding, which gzip's tools accept
                if not data:
                    return
                if not self._is_gzip:
                    raise _damaged("data follows its end")
                self._stream = zlib.decompressobj(wbits=31)
            try:
                piece = self._stream.decompress(data, PIECE_BYTES)
            except zlib.error as error:
                raise _damaged(str(error)) from None
            has_ended = self._stream.eof
            data = self._stream.unused_data if has_ended else self._stream.unconsumed_tail
            is_full = not has_ended and len(piece) == PIECE_BYTES
            self._num_bytes += len(piece)
            if self._num_bytes > self._max_bytes:
                raise HTTPException(
                    413, f"the decompressed body is larger than {self._max_bytes} bytes: send less at a time"
                )
            yield piece

    def finish(self) -> None:
        """Raise HTTPException unless the data is complete. No data at all is no body."""
        if self._has_data and (self._stream is None or not self._stream.eof):
            raise _damaged("it ends too early")


def _has_zlib_header(data: bytes) -> bool:
    """Whether deflated data is in zlib's format (RFC 1950), as HTTP requires; some clients send it bare."""
    return data[0] & 0x0F == 8 and int.from_bytes(data[:2], "big") % 31 == 0


def _damaged(reason: str) -> HTTPException:
    # FastAPI's class, the only one that FastAPI passes on while it reads the body
    return HTTPException(400, f"the compressed body is damaged ({ascii(reason)[1:-1]}): send it again")
