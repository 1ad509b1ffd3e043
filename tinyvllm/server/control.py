"""The control link between `tinyvllm serve` and each of its processes: JSON lines over a socket pair, both ways.

The parent's end lives on its event loop. A child's end has a thread of its own, so that it works while the child's main
thread computes or waits in C. The end of the stream means that the other side is gone, whatever ended it, because the
kernel closes the sockets of a killed process. A child whose parent is gone ends at once, with its whole process group.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec

from tinyvllm.faults import reach

logger = logging.getLogger(__name__)

Message = dict[str, Any]  # "kind" says what it is

MAX_LINE_BYTES = 1 << 29  # of a message; the longest are stored conversations, for another front-end
EXIT_ORPHANED = 70  # a child's exit code when its parent is gone


def encode(kind: str, **facts: Any) -> bytes:
    """A message as a line. Dataclasses among the facts become objects."""
    return msgspec.json.encode({"kind": kind, **facts}) + b"\n"


def decode(line: bytes) -> Message:
    message: Message = msgspec.json.decode(line)
    return message


class ParentLink:
    """The parent's end. Used only on its event loop."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def open(cls, sock: socket.socket) -> ParentLink:
        return cls(*await asyncio.open_unix_connection(sock=sock, limit=MAX_LINE_BYTES))

    def send(self, kind: str, **facts: Any) -> None:
        """Send a message, without waiting. Does nothing if the child is gone: `messages` ends in that case. Raises what
        encoding the message raises."""
        if not self._writer.is_closing():
            reach("control.tell")
            self._writer.write(encode(kind, **facts))

    async def messages(self) -> AsyncIterator[Message]:
        """The child's messages, until it is gone. Raises for one that cannot be read."""
        with contextlib.suppress(ConnectionError):
            while (line := await self._reader.readline()).endswith(b"\n"):
                reach("control.hear")
                yield decode(line)

    def end(self) -> None:
        """The child has ended: end `messages` after those received, even if its own children hold its end open."""
        self._reader.feed_eof()

    def close(self) -> None:
        self._writer.close()


class ChildLink:
    """A child's end. `send` may be called from any thread."""

    def __init__(self, fd: int) -> None:
        os.set_inheritable(fd, False)
        self._sock = socket.socket(fileno=fd)
        self._lines = self._sock.makefile("rb")
        self._sending = threading.Lock()

    def receive(self) -> Message:
        """Wait for the next message. Ends the process if the parent is gone. Not to be called after `watch`."""
        try:
            line = self._lines.readline()
        except ConnectionError:
            line = b""
        if not line.endswith(b"\n"):
            end_orphan()
        return decode(line)

    def watch(self, handle: Callable[[Message], None]) -> None:
        """From now on, pass each message to `handle` on a thread of its own, and end the process with the parent."""

        def run() -> None:
            while True:
                _handle_twice(handle, self.receive())

        threading.Thread(target=run, name="tinyvllm-control", daemon=True).start()

    def send(self, kind: str, **facts: Any) -> None:
        """Send a message. If the parent is gone, the watching thread is about to end the process. If sending fails for
        another reason, the process ends, because its parent would wait for the message."""
        try:
            reach("control.send")
            with self._sending:
                self._sock.sendall(encode(kind, **facts))
        except ConnectionError:
            return
        except Exception:
            logger.exception("cannot send %r to the parent process: this process ends", kind)
            end_orphan()

    def close(self) -> None:
        self._lines.close()
        self._sock.close()


def _handle_twice(handle: Callable[[Message], None], message: Message) -> None:
    """Handle a message; if that fails, once more, since every message may be handled twice. The thread must go on,
    because it also watches for the parent's end."""
    for _ in range(2):
        try:
            reach("control.handle")
            handle(message)
            return
        except Exception:
            logger.exception("cannot handle the parent's message %r", message.get("kind"))


def end_orphan() -> None:
    """End this process and those that it started. A child of `tinyvllm serve` leads a process group of its own.

    By SIGTERM, which multiprocessing's resource tracker ignores: it removes semaphores once the others have ended."""
    if os.getpgrp() == os.getpid():
        with contextlib.suppress(PermissionError):
            os.killpg(0, signal.SIGTERM)  # this process ignores it
    os._exit(EXIT_ORPHANED)
