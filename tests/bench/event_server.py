"""A server that streams pre-made events, as fast as it can or step by step: to test and to measure clients.

python -m tests.bench.event_server --port 8123 --lump 100
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from tinyvllm.bench.load_worker import run_loop

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n%s\r\n"
CHUNK = (
    '{"id":"cmpl-0123456789abcdef","object":"text_completion","created":1700000000,"model":"tiny","choices":[{"index":0,'
    '"text":" word","logprobs":null,"finish_reason":null,"stop_reason":null}]}'
)


def make_chunk(event: str) -> bytes:
    """An event as one chunk of a chunked body."""
    data = f"data: {event}\n\n".encode()
    return b"%x\r\n%s\r\n" % (len(data), data)


EVENT = make_chunk(CHUNK)


@dataclass
class EventServer:
    """Answers each request with `max_tokens` events, in writes of `lump` events: one write a step to each open answer.

    `hold`: no step before so many answers are open, or all that are left of `total`."""

    lump: int = 1
    interval_s: float = 0.0
    closes: bool = False  # Connection: close after each answer
    hold: int = 0
    total: int = 0
    bodies: list[dict[str, Any]] = field(default_factory=list)
    open: set[Answering] = field(default_factory=set)
    transports: set[asyncio.Transport] = field(default_factory=set)
    most_open: int = 0
    num_connections: int = 0
    num_answered: int = 0

    async def step(self) -> None:
        """Forever: write the next lump to every open answer."""
        while True:
            await asyncio.sleep(self.interval_s)
            if not self.hold or len(self.open) >= min(self.hold, self.total - self.num_answered):
                for answering in list(self.open):
                    answering.write_lump()

    async def run(self, started: Any, **where: Any) -> None:
        """Serve until canceled. `started` is called with the port."""
        loop = asyncio.get_running_loop()
        make = loop.create_unix_server if "path" in where else loop.create_server
        server = await make(lambda: Answering(self), **where)
        started(server.sockets[0].getsockname())
        async with server:
            try:
                await self.step()
            finally:
                for transport in [*self.transports]:  # of clients that were killed, whose end was not read yet
                    transport.abort()


class Answering(asyncio.Protocol):
    """A connection: one request after the other."""

    def __init__(self, server: EventServer) -> None:
        self.server = server
        self.data = b""
        self.left = self.num_tokens = 0
        self.is_full = self.closes = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.server.transports.add(self.transport)
        self.server.num_connections += 1

    def pause_writing(self) -> None:
        self.is_full = True

    def resume_writing(self) -> None:
        self.is_full = False

    def connection_lost(self, exc: Exception | None) -> None:
        self.server.open.discard(self)
        self.server.transports.discard(self.transport)

    def data_received(self, data: bytes) -> None:
        self.data += data
        head, found, body = self.data.partition(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0] or 0)
        if found and len(body) >= length:
            self.data = b""
            self.begin(head, body)

    def begin(self, head: bytes, body: bytes) -> None:
        if not head.startswith(b"POST"):
            self.transport.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
            return
        asked = json.loads(body)
        self.server.bodies.append(asked)
        self.left = self.num_tokens = asked["max_tokens"]
        self.num_input = len(asked.get("prompt") or asked.get("messages"))
        self.closes = self.server.closes or b"connection: close" in head.lower()
        self.transport.write(HEAD % (b"Connection: close\r\n" if self.closes else b""))
        self.server.open.add(self)
        self.server.most_open = max(self.server.most_open, len(self.server.open))

    def write_lump(self) -> None:
        if self.is_full:
            return
        count = min(self.server.lump, self.left)
        self.left -= count
        self.transport.write(EVENT * count)
        if not self.left:
            usage = {"prompt_tokens": self.num_input, "completion_tokens": self.num_tokens}
            last = make_chunk(json.dumps({"choices": [], "usage": usage})) + make_chunk("[DONE]")
            self.server.open.discard(self)
            self.server.num_answered += 1
            self.transport.write(last + b"0\r\n\r\n")
            if self.closes:
                self.transport.close()


@contextlib.contextmanager
def serving_events(server: EventServer, *, socket: Path | None = None, **more: Any) -> Iterator[str]:
    """The URL of `server`, which runs on a thread of its own."""
    started, names, where = threading.Event(), [], {"host": "127.0.0.1", "port": 0} | more
    if socket is not None:
        where = {"path": str(socket)}

    def note(name: Any) -> None:
        names.append(name)
        started.set()

    loop = asyncio.new_event_loop()
    task = loop.create_task(server.run(note, **where))

    def run() -> None:
        with contextlib.suppress(asyncio.CancelledError):
            loop.run_until_complete(task)
        loop.run_until_complete(asyncio.sleep(0))  # for the transports to close
        loop.close()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        started.wait()
        scheme = "https" if "ssl" in more else "http"
        yield f"unix:{socket}" if socket is not None else f"{scheme}://127.0.0.1:{names[0][1]}"
    finally:
        loop.call_soon_threadsafe(task.cancel)
        thread.join()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=8123)
    parser.add_argument("--lump", type=int, default=1, help="events in each write")
    parser.add_argument("--interval-ms", type=float, default=0.0, help="between steps; 0: as fast as possible")
    given = parser.parse_args()
    events = EventServer(lump=given.lump, interval_s=given.interval_ms / 1e3)
    with contextlib.suppress(KeyboardInterrupt):
        run_loop(events.run(lambda name: print(name, flush=True), host="127.0.0.1", port=given.port))
