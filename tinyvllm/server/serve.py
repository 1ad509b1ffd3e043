"""Run the HTTP server and the engine in one process, and stop both without losing answers."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any

import uvicorn

from tinyvllm.engine.heap import keep_imports, settle_heap
from tinyvllm.processes import STOP_SIGNALS, hears_stop
from tinyvllm.profiling import measure
from tinyvllm.server.app import make_app
from tinyvllm.server.event_loop import http_protocol
from tinyvllm.server.file_limit import default_max_connections
from tinyvllm.server.gate import Acceptor, Gate
from tinyvllm.server.output_queue import exit_now
from tinyvllm.server.routes import late_routes, load_when_idle
from tinyvllm.server.settings import ENGINE_END_S, LAST_WRITES_S, ServerSettings
from tinyvllm.server.sockets import TlsFiles, end_silent_peers
from tinyvllm.server.status_log import log_status
from tinyvllm.server.stop_clock import StopClock
from tinyvllm.server.stop_requests import StopRequests

if TYPE_CHECKING:
    from starlette.types import ASGIApp

    from tinyvllm.engine.async_engine import AsyncEngine
    from tinyvllm.server.request_limits import Drain
    from tinyvllm.server.state import ServerState

log = logging.getLogger(__name__)

STOP_ARRIVES_S = 1.0  # until all processes of a group, and the loop that asks for signals, have heard of one
KEEP_ALIVE_S = 75  # longer than clients' pools keep idle connections, so they rarely reuse one that has just closed


async def serve(
    start_engine: Callable[[], AsyncEngine],
    sock: socket.socket,
    *,
    on_ready: Callable[[AsyncEngine], None],
    settings: ServerSettings | None = None,
    tls: TlsFiles | None = None,
    access_log: bool = True,
    stops: StopRequests | None = None,
    clock: StopClock | None = None,
) -> None:
    """Serve on `sock` until a stop signal (or what `stops` hears), starting before the engine is warm.

    After the first signal, /ready returns 503 and new requests are refused. Running requests may continue for the
    settings' shutdown_timeout_s; then they are aborted and the engine is shut down. A second signal skips the wait.
    clock: ends the process if any of this takes too long. Raises the error that kept the engine from starting.
    """
    settings = settings or ServerSettings()
    measure.name_process("server")
    keep_imports()
    engine = start_engine()
    app = make_app(engine, settings)
    end_silent_peers(sock, settings.idle_timeout_s)
    server = Server(uvicorn_config(app, tls, access_log=access_log), app.state.server, stops, clock)

    async def announce() -> None:
        try:
            await engine.wait_ready()
        except Exception:
            # a signal to the whole group may have ended a process that loading needs before this one hears of it
            await asyncio.sleep(STOP_ARRIVES_S)
            if server.should_exit:  # the engine stopped because the server is stopping
                return
            server.should_exit = True
            raise
        settle_heap()
        if server.should_exit:
            return
        on_ready(engine)
        await load_when_idle(late_routes(app), lambda: not server.drain.num_requests)

    announcement = asyncio.create_task(announce())
    tasks = [announcement]
    if settings.stats_interval_s is not None:
        tasks.append(asyncio.create_task(log_status(engine, app.state.server.metrics, settings.stats_interval_s)))
    try:
        await server.serve(sockets=[sock])
    finally:
        for task in tasks:
            if not task.done():
                task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await announcement


def uvicorn_config(app: ASGIApp, tls: TlsFiles | None, *, access_log: bool) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=http_protocol(),
        lifespan="off",  # nothing hears of it, and uvicorn logs a traceback if a second signal cuts it off
        log_config=None,  # the process has configured logging
        access_log=access_log,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=LAST_WRITES_S,
        ssl_certfile=tls.certfile if tls else None,
        ssl_keyfile=tls.keyfile if tls else None,
        server_header=False,
    )


def make_gate(server: uvicorn.Server, max_connections: int) -> Gate:
    """The gate of a server that has started."""
    config: Any = server.config

    def make_protocol(state: dict[str, Any]) -> asyncio.Protocol:
        protocol: asyncio.Protocol = config.http_protocol_class(
            config=config, server_state=server.server_state, app_state={**server.lifespan.state, **state}
        )
        return protocol

    return Gate(make_protocol, server.server_state.connections, config.ssl, max_connections)


class DrainingServer(uvicorn.Server):
    """uvicorn's server, which also drains before it stops, and ends what computes answers before it waits for them.

    It accepts connections itself: uvicorn's event loops accept without a limit, and fail when they are out of files."""

    def __init__(
        self,
        config: uvicorn.Config,
        drain: Drain,
        settings: ServerSettings,
        stops: StopRequests | None = None,
        clock: StopClock | None = None,
    ) -> None:
        """stops: who asks the server to stop, if it is not the system's signals. clock: limits the time of the stop."""
        super().__init__(config)
        self.drain = drain
        self._shutdown_timeout_s = settings.shutdown_timeout_s
        self._max_connections = settings.max_connections or default_max_connections()
        self._acceptor: Acceptor | None = None
        self._stops = stops
        self._clock = clock
        self._drain_until_s: float | None = None  # monotonic clock; None until the drain's time limit starts

    def observe(self) -> None:
        """Called at every tick."""

    def can_answer(self) -> bool:
        """Whether running requests can come to an end."""
        return True

    async def end_work(self) -> None:
        """End whatever still computes answers, and tell those who wait for them."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Handle a stop signal: the first starts draining, any later one ends it."""
        if self._clock is not None:
            self._clock.on_signal(self._shutdown_timeout_s)
        if self.should_exit:
            self.force_exit = True
        self.should_exit = True
        self.drain.has_begun = True  # here, so that /ready shows it at once

    async def on_tick(self, counter: int) -> bool:
        """Whether to stop now. Sockets stay open during the drain, so that refusals and /ready are still answered."""
        self.observe()
        self.drain.observe()
        if not await super().on_tick(counter):
            return False
        if self.force_exit or not self.drain.num_requests or not self.can_answer():
            return True
        if self._drain_until_s is None:
            timeout_s = self._shutdown_timeout_s
            self._drain_until_s = time.monotonic() + timeout_s
            if timeout_s:
                log.warning(
                    "stopping: %d requests may continue for up to %g s; a second signal stops at once",
                    self.drain.num_requests,
                    timeout_s,
                )
        return time.monotonic() >= self._drain_until_s

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup([])
        self._acceptor = Acceptor(sockets or [], make_gate(self, self._max_connections))

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self._acceptor is not None:
            self._acceptor.close()
        if self.drain.num_requests:
            log.warning("stopping: aborting %d requests", self.drain.num_requests)
        await self.end_work()
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Like uvicorn's, but without raising the signal again at the end, so that a clean stop has exit code 0."""
        if self._stops is not None:
            with self._stops.heard_by(lambda: self.handle_exit(signal.SIGTERM, None)):
                yield
            return
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in STOP_SIGNALS if hears_stop(number)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class Server(DrainingServer):
    """The server of an engine in this process."""

    def __init__(
        self,
        config: uvicorn.Config,
        state: ServerState,
        stops: StopRequests | None = None,
        clock: StopClock | None = None,
    ) -> None:
        super().__init__(config, state.drain, state.settings, stops, clock)
        self._state = state

    def observe(self) -> None:
        self._state.metrics.process.observe(len(self.server_state.connections))
        self._state.watchdog.observe()

    def can_answer(self) -> bool:
        return self._state.engine.is_ready

    async def end_work(self) -> None:
        engine = self._state.engine
        # While the engine loads there is nothing to abort, and waiting could take as long as a graph's capture. Its
        # thread is a daemon, so it ends with the process.
        if engine.is_ready:
            ended = asyncio.create_task(engine.shutdown())
            if (await asyncio.wait((ended,), timeout=ENGINE_END_S))[0] or self._clock is None:
                await ended
            elif self.drain.num_requests:
                log.critical("the engine's current step does not end: terminating the process")
                exit_now(1)
            # otherwise it is capturing a graph, which is no longer needed
