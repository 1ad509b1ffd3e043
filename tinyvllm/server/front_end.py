"""The main function of a front-end: HTTP for engines that run in other processes."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import math
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import uvicorn

from tinyvllm.engine.async_engine import AsyncEngine
from tinyvllm.engine.heap import settle_heap
from tinyvllm.engine.process_host import ProcessHost
from tinyvllm.server import event_loop, recordings, request_routes
from tinyvllm.server.app import make_app
from tinyvllm.server.board import Board
from tinyvllm.server.child import read_pids, start_child
from tinyvllm.server.connections import Connections, Intake
from tinyvllm.server.control import ChildLink, Message
from tinyvllm.server.counters import Counters
from tinyvllm.server.endpoints import endpoint_of
from tinyvllm.server.file_limit import default_max_connections
from tinyvllm.server.front_ends import FrontEnds
from tinyvllm.server.openai.response_store import ResponseStore
from tinyvllm.server.output_queue import exit_now
from tinyvllm.server.questions import GET_REQUEST, LIST_REQUESTS, OF_RESPONSES, Asker
from tinyvllm.server.routes import late_routes, load_when_idle
from tinyvllm.server.serve import make_gate, uvicorn_config
from tinyvllm.server.sockets import bind_unix
from tinyvllm.server.specs import FrontEndSpec, client_name
from tinyvllm.server.status_log import log_status

if TYPE_CHECKING:
    from tinyvllm.server.state import ServerState

log = logging.getLogger(__name__)

# How long a thread that renders a template or prepares a schema may keep the interpreter from the event loop. Python's
# default of 5 ms is longer than a step, and each stream would feel it.
SWITCH_S = 0.0005


class EngineWatch(Protocol):
    """Hears what the supervisor knows of the engine processes."""

    def engine_died(self, engine: int, reason: str) -> None: ...

    def engine_started(self, engine: int) -> None: ...


Connect = Callable[[FrontEndSpec], tuple[AsyncEngine, EngineWatch]]


def connect_engine(spec: FrontEndSpec) -> tuple[AsyncEngine, EngineWatch]:
    """The engine in the processes that the spec names. Returns before they are ready."""
    endpoints = [endpoint_of(spec.run_dir, engine) for engine in range(spec.num_engines)]
    host = ProcessHost(spec.config, endpoints, client_name(spec.index, spec.generation), spec.index)
    return AsyncEngine(spec.config, host), host


def main(connect: Connect = connect_engine) -> None:
    """connect: makes the engine that is served; called on the event loop.

    Never returns: the exit does not wait for threads, which may still be reading a tokenizer."""
    spec, link = start_child(FrontEndSpec)
    sys.setswitchinterval(SWITCH_S)
    event_loop.run(_run_and_exit(_FrontEnd(spec, link), connect))


async def _run_and_exit(served: _FrontEnd, connect: Connect) -> None:
    """Serve, and end the process on its event loop, whose end would wait for the threads."""
    code = 1
    try:
        await served.run(connect)
        code = 0
    except BaseException:
        log.critical("the front-end ends with an unexpected error", exc_info=True)
    exit_now(code)


class _FrontEnd:
    """One front-end, on its event loop."""

    def __init__(self, spec: FrontEndSpec, link: ChildLink) -> None:
        self._spec = spec
        self._link = link
        self._asker = Asker(link)

    async def run(self, connect: Connect) -> None:
        """Serve until the supervisor says stop."""
        spec, directory = self._spec, Path(self._spec.run_dir)
        self._engine, self._watch = connect(spec)
        front_ends = FrontEnds(
            board=Board.open(directory / "board", spec.num_front_ends, spec.index),
            counters=Counters.shared(directory, spec.num_front_ends, spec.index),
            name=spec.name,
            large_lane=None if spec.is_large_lane else spec.large_lane,
            is_large_lane=spec.is_large_lane,
            ask_others=self._asker.ask_others,
            pids=functools.partial(read_pids, directory),
        )
        self._app = app = make_app(self._engine, spec.settings, front_ends)
        self._state: ServerState = app.state.server
        self._responses: ResponseStore = app.state.responses
        self._server = FrontEndServer(
            uvicorn_config(
                app,
                None if spec.is_large_lane else spec.tls,
                access_log=spec.access_log and not spec.is_large_lane,  # the others log what they pass on
            ),
            self._state,
            socket.socket(fileno=spec.connections_fd),
            spec.num_front_ends,
            on_serving=lambda: self._link.send("serving"),
        )
        loop = asyncio.get_running_loop()

        def pass_on(message: Message) -> None:
            loop.call_soon_threadsafe(self._handle, message)

        self._link.watch(pass_on)
        tasks = [loop.create_task(self._announce())]
        if spec.index == 0 and spec.settings.stats_interval_s is not None:  # it speaks for all
            tasks.append(
                loop.create_task(log_status(self._engine, self._state.metrics, spec.settings.stats_interval_s))
            )
        try:
            is_lane = spec.is_large_lane and spec.large_lane is not None
            await self._server.serve(sockets=[bind_unix(str(spec.large_lane))] if is_lane else [])
        finally:
            for task in tasks:
                task.cancel()

    async def _announce(self) -> None:
        with contextlib.suppress(Exception):  # the supervisor knows why an engine does not start
            await self._engine.wait_ready()
            settle_heap()
            self._link.send("ready", can_chat=self._engine.chat_template is not None)
            await load_when_idle(late_routes(self._app), lambda: not self._state.drain.num_requests)

    def _handle(self, message: Message) -> None:
        """Do what the supervisor says."""
        match message["kind"]:
            case "drain":
                self._state.drain.has_begun = True
                self._link.send("draining")
            case "stop":
                self._state.drain.has_begun = True
                self._server.should_exit = True
            case "engine_died":
                self._watch.engine_died(message["engine"], message["reason"])
            case "engine_started":
                self._watch.engine_started(message["engine"])
            case "question":
                self._link.send("answer", number=message["number"], answer=self._answer(message))
            case "answers":
                self._asker.take_answers(message)

    def _answer(self, message: Message) -> Message:
        question = message["question"]
        if question in OF_RESPONSES:
            return self._responses.answer(question, message["about"])
        if question in (GET_REQUEST, LIST_REQUESTS):
            return request_routes.answer(self._state.requests, question, message["about"], self._spec.name)
        return recordings.answer(question)


class FrontEndServer(uvicorn.Server):
    """uvicorn's server, which gets its connections from the supervisor, and which only that can stop."""

    def __init__(
        self,
        config: uvicorn.Config,
        state: ServerState,
        connections: socket.socket,
        num_front_ends: int,
        on_serving: Callable[[], None],
    ) -> None:
        """num_front_ends: those that share the connections."""
        super().__init__(config)
        self.server_state.connections = Connections(state.board)
        self._state = state
        self._connections = connections
        self._num_front_ends = num_front_ends
        self._on_serving = on_serving

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        limit = self._state.settings.max_connections or default_max_connections()
        gate = make_gate(self, math.ceil(limit / self._num_front_ends))
        self._intake = Intake(self._connections, gate, self._state.board)
        self._on_serving()

    async def on_tick(self, counter: int) -> bool:
        self._state.metrics.process.observe(len(self.server_state.connections))
        self._state.watchdog.observe()
        self._state.drain.observe()
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End the open requests with an error that says so, and wait until their clients have read it."""
        self._intake.close()
        await self._state.engine.shutdown()
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """The supervisor handles signals."""
        yield


if __name__ == "__main__":
    main()
