"""Trailers of chunked answers (RFC 9112, section 7.1.2), which uvicorn does not write over HTTP/1.1.

A client says with `TE: trailers` that it reads them. The app then finds the extension `http.response.trailers` in its
scope, as ASGI defines it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from tinyvllm.server.context import TRAILERS


def reads_trailers(headers: Iterable[tuple[bytes, bytes]]) -> bool:
    """Whether the client has announced that it reads trailers."""
    values = (value.lower() for name, value in headers if name == b"te")
    return any(coding.partition(b";")[0].strip() == b"trailers" for value in values for coding in value.split(b","))


class TrailerCycle(RequestResponseCycle):
    """A request and its answer, whose last chunk may be followed by trailers."""

    _has_trailers = False

    async def send(self, message: Any) -> None:
        kind = message["type"]
        if kind == "http.response.start":
            self._has_trailers = bool(message.get("trailers", False))
        elif self._has_trailers and kind == TRAILERS:
            self._finish(message["headers"])
            return
        elif self._has_trailers and not message.get("more_body", False):
            message = {**message, "more_body": True}  # the trailers end the body
        await super().send(message)

    def _finish(self, headers: Iterable[tuple[bytes, bytes]]) -> None:
        """Write the last chunk, which is empty, and the trailers; then end the answer as uvicorn ends any body."""
        if self.disconnected or self.response_complete:
            return
        lines = [b"0\r\n" if self.chunked_encoding else b""]
        if self.chunked_encoding:
            lines += [b"%b: %b\r\n" % (name, value) for name, value in headers] + [b"\r\n"]
        self.transport.write(b"".join(lines))
        self.response_complete = True
        self.message_event.set()
        if not self.keep_alive:
            self.transport.close()
        self.on_response()
