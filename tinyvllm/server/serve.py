"""Starting and stopping: the socket first, then HTTP and the engine beside each other, and a clean end."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import uvicorn

from tinyvllm.errors import TinyvllmError
from tinyvllm.server.app import make_app

if TYPE_CHECKING:
    from tinyvllm.engine.async_engine import AsyncEngine

KEEP_ALIVE_S = 75  # longer than clients' pools keep connections, so that they seldom write into one that just closed
GRACE_S = 5  # for answers that are being written when the server stops
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def bind(host: str, port: int) -> socket.socket:
    """A socket on host:port (0: any free port). Done before a model is loaded, so that a port in use costs no wait."""
    if not 0 <= port < 2**16:  # the system would take the lower 16 bits without a word
        raise TinyvllmError(f"--port is {port}: give a number between 0 (any free port) and 65535")
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise TinyvllmError(f"--host {host} --port {port} is no address of this machine: {error}") from error
    sock = socket.socket(family, kind, proto)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind(address)
        sock.listen(2048)  # SO_REUSEADDR lets two bind; the second to listen is told
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            remedy = "stop the program that has it, or choose another with --port"
            raise TinyvllmError(f"port {port} of {host} is in use: {remedy}") from error
        raise TinyvllmError(f"cannot listen on --host {host} --port {port}: {error}") from error
    return sock


def address_of(sock: socket.socket) -> str:
    """The URL that reaches `sock` from this machine."""
    host, port = sock.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


async def serve(
    start_engine: Callable[[], AsyncEngine],
    sock: socket.socket,
    *,
    on_ready: Callable[[AsyncEngine], None],
    access_log: bool = True,
) -> None:
    """Answer on `sock` until SIGINT or SIGTERM, while the engine warms up and after.

    Raises what kept the engine from starting. On a signal, running requests are aborted and the engine is shut down.
    """
    engine = start_engine()
    config = uvicorn.Config(
        make_app(engine),
        log_config=None,  # the command line has set logging up
        access_log=access_log,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=GRACE_S,
    )
    server = _Server(config, engine)

    async def announce() -> None:
        try:
            await engine.wait_ready()
        except Exception:
            if server.should_exit:  # we are being stopped, and that is why
                return
            server.should_exit = True
            raise
        if not server.should_exit:
            on_ready(engine)

    announcement = asyncio.create_task(announce())
    try:
        await server.serve(sockets=[sock])
    finally:
        if not announcement.done():
            announcement.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await announcement


class _Server(uvicorn.Server):
    """uvicorn's server, which stops the engine first, so that no answer runs on for minutes after a signal."""

    def __init__(self, config: uvicorn.Config, engine: AsyncEngine) -> None:
        super().__init__(config)
        self._engine = engine

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # While it loads there is nothing to abort, and it could not be waited for: a graph takes long to capture. Its
        # thread is a daemon and ends with the process.
        if self._engine.is_ready:
            await self._engine.shutdown()
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn's, but the signal is not raised again at the end: a clean stop is exit code 0."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in _STOP_SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
