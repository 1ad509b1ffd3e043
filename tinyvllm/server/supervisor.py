"""The parent process of `tinyvllm serve`: starts engines and front-ends, watches them, and stops them together.

It accepts connections and hands them to front-ends, but reads no HTTP, and loads neither models nor tinygrad. A
front-end that dies ends its own requests, and is started again. An engine that dies ends the server once no engine is
left, unless it is to be restarted. Every process ends when this one does, whatever ends it: their control links close.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import socket
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from dataclasses import dataclass

from tinyvllm.errors import EngineDeadError, TinyvllmError
from tinyvllm.processes import STOP_SIGNALS, hears_stop
from tinyvllm.profiling.measure import Recording
from tinyvllm.server import recordings
from tinyvllm.server.board import ALIVE_MS, NUM_REQUESTS, Board
from tinyvllm.server.child import write_pids
from tinyvllm.server.connections import Handover
from tinyvllm.server.control import Message
from tinyvllm.server.engine_placement import Placement
from tinyvllm.server.process import Process, Restarts, start_process
from tinyvllm.server.questions import OF_ONE_FRONT_END, Questions
from tinyvllm.server.run_directory import run_directory
from tinyvllm.server.settings import ServerSettings
from tinyvllm.server.sockets import TlsFiles, end_silent_peers
from tinyvllm.server.specs import LOAD_ENGINE, EngineSpec, FrontEndSpec, client_name, engine_name, front_end_name
from tinyvllm.server.stop_clock import StopClock
from tinyvllm.server.stop_requests import StopRequests

log = logging.getLogger(__name__)

TICK_S = 0.05  # how often the end of the drain, and of processes, is checked
DRAIN_NOTICE_S = 1.0  # how long front-ends have to say that they refuse new requests
# How long front-ends write their last answers, and engines compute their last step; together less than the 5 s that a
# stop may take after the drain. HASTE_S: each after a second signal.
FRONT_ENDS_END_S, ENGINES_END_S, HASTE_S = 2.0, 1.5, 0.5
MESSAGE_DELAY_S = 1.0  # how long messages of a dead front-end may take to reach an engine
UNSEEN_S = 60.0  # a front-end that has not been seen for so long is ended: the engines' messages to it pile up
ENGINE_EXIT_S = 1.0  # how long clients hear 503 after the last engine has died, before the server ends

Report = Callable[[str, int, int], None]  # stage, done, total
_FRONT_END, _ENGINE = "tinyvllm.server.front_end", "tinyvllm.server.engine_process"


@dataclass(frozen=True, kw_only=True)
class ServePlan:
    """The processes of a server, and what they are told."""

    engines: Sequence[Placement]
    settings: ServerSettings
    num_front_ends: int  # that get connections
    has_large_lane: bool = True  # one more, for requests with large bodies
    restart_engine: bool = False
    tls: TlsFiles | None = None
    access_log: bool = True
    log_level: str = "info"
    log_prefix: str = ""  # of every process's name in the log
    records: bool = False  # record where every process's time goes, from when all are ready until the stop
    load: str = LOAD_ENGINE
    front_end_module: str = _FRONT_END
    engine_module: str = _ENGINE

    @property
    def num_engines(self) -> int:
        return len(self.engines)

    @property
    def num_http(self) -> int:
        """All front-ends. The large lane is the last."""
        return self.num_front_ends + self.has_large_lane


async def supervise(
    plan: ServePlan,
    listener: socket.socket,
    report: Report,
    on_ready: Callable[[bool], None],
    *,
    stops: StopRequests | None = None,
    clock: StopClock | None = None,
) -> dict[str, Recording]:
    """Serve by `plan` until a stop signal; returns the processes' recordings by name, if the plan has any made.

    report: progress of loading. on_ready: called once all is ready, with whether the model has a chat template. stops:
    who asks the server to stop, if it is not the system's signals. clock: limits the time of the stop. Takes over the
    listening socket. Raises TinyvllmError if an engine cannot start, or if the server cannot go on.
    """
    supervisor = Supervisor(plan, listener, report, on_ready, stops, clock or StopClock.without_end())
    await supervisor.run()
    return supervisor.recordings


class Supervisor:
    """Owns the processes of one server."""

    def __init__(
        self,
        plan: ServePlan,
        listener: socket.socket,
        report: Report,
        on_ready: Callable[[bool], None],
        stops: StopRequests | None,
        clock: StopClock,
    ) -> None:
        """For the arguments see `supervise`. Made and used on one event loop."""
        self._stops = stops
        self._clock = clock
        clock.before_end(lambda: self._kill(self._processes.values()))
        self._plan = plan
        self._listener = listener
        self._report = report
        self._on_ready = on_ready
        self._end: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._processes: dict[str, Process] = {}  # those that run, by name
        self._engines: dict[int, Process] = {}  # those that are ready
        self._have_been_ready: set[int] = set()  # engines
        self._dead_engines: dict[int, str] = {}  # how each ended
        self._loss: EngineDeadError | None = None  # of the last engine, which ends the server
        self._front_ends: dict[int, Process] = {}
        self._ready_front_ends: set[int] = set()  # that have been ready once
        self._draining: set[int] = set()  # front-ends that refuse new requests
        self._num_signals = 0
        self._stopping = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._questions = Questions(self._processes)
        self.recordings: dict[str, Recording] = {}

    async def run(self) -> None:
        """Serve until a stop signal, or until the server cannot go on."""
        with run_directory() as directory, self._stop_signals():
            self._directory = directory
            self._board = Board.create(directory / "board", self._plan.num_http)
            end_silent_peers(self._listener, self._plan.settings.idle_timeout_s)
            self._handover = Handover(self._listener, self._board)
            engines = [self._spawn(self._keep_engine(index)) for index in range(self._plan.num_engines)]
            front_ends = [self._spawn(self._keep_front_end(index)) for index in range(self._plan.num_http)]
            self._spawn(self._end_unseen())
            try:
                await self._end
            finally:
                await self._stop(front_ends, engines)

    def _spawn(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        """Run `work` in the background. An error ends the server."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)
        return task

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None and not self._end.done():
            self._end.set_exception(error)
        elif isinstance(error, TinyvllmError):
            log.error("while the server stops: %s", error)
        elif error is not None:
            log.error("an error while the server stops", exc_info=error)

    # ---- Engines ----

    async def _keep_engine(self, index: int) -> None:
        """Run engine `index`, and restart it if the plan says so. Raises TinyvllmError if the server cannot go on."""
        restarts = Restarts(engine_name(index), self._stopping)
        while not self._stopping.is_set():
            try:
                process = await self._start_engine(index)
            except TinyvllmError as failure:
                if index not in self._have_been_ready:
                    raise
                log.error("%s: trying again", failure)
                await restarts.wait(None)
                continue
            error = await self._follow_engine(index, process)
            reason = f"{process.name} {await process.how_it_ended()}"
            has_been_ready = index in self._have_been_ready
            if has_been_ready and not self._stopping.is_set():
                self._lose_engine(index, reason if error is None else f"{reason}: {error}")
            await self._remove(process)
            if self._stopping.is_set():
                return
            announced, reason = reason, f"{process.name} {await process.how_it_ended()}"
            if reason != announced:  # its exit took long
                log.critical("%s", reason)
            if not has_been_ready:
                raise EngineDeadError(f"{reason} before it was ready") if error is None else TinyvllmError(error)
            if self._plan.restart_engine:
                await restarts.wait(process)
                continue
            if self._loss is not None:
                with contextlib.suppress(TimeoutError):  # clients get their answers, and probes see it
                    await asyncio.wait_for(self._stopping.wait(), ENGINE_EXIT_S)
                self._end_server()
            return

    async def _start_engine(self, index: int) -> Process:
        plan = self._plan
        place = plan.engines[index]
        spec = EngineSpec(
            index=index,
            run_dir=str(self._directory),
            config=place.config,
            log_level=plan.log_level,
            log_prefix=plan.log_prefix,
            cores=place.cores,
            load=plan.load,
        )
        process = await start_process(plan.engine_module, spec, environment=place.environment)
        self._add(process)
        if self._stopping.is_set():
            process.send("stop")
        return process

    async def _follow_engine(self, index: int, process: Process) -> str | None:
        """Until the process ends. Returns the error that it gave as the cause, if it gave any."""
        error = None
        async for message in process.messages():
            match message["kind"]:
                case "progress":
                    suffix = f" {index}" if self._plan.num_engines > 1 else ""
                    self._report(message["stage"] + suffix, message["done"], message["total"])
                case "ready":
                    self._gain_engine(index, process)
                case "failed":
                    error = message["error"]
                case "answer":
                    self._questions.take_answer(process.name, message)
        return error

    def _gain_engine(self, index: int, process: Process) -> None:
        process.ready_s = time.monotonic()
        self._engines[index] = process
        self._have_been_ready.add(index)
        if self._dead_engines.pop(index, None) is not None:
            log.warning("%s has been started again", process.name)
            self._tell_front_ends("engine_started", engine=index)

    def _lose_engine(self, index: int, reason: str) -> None:
        log.critical("%s: its requests are ended", reason)
        self._engines.pop(index, None)
        self._dead_engines[index] = reason
        self._tell_front_ends("engine_died", engine=index, reason=reason)
        is_another_loading = len(self._have_been_ready) < self._plan.num_engines
        if not (self._engines or is_another_loading or self._plan.restart_engine):
            self._loss = EngineDeadError(f"{reason}: the server stops. --restart-engine would start it again")

    # ---- Front-ends ----

    async def _keep_front_end(self, index: int) -> None:
        """Run front-end `index`, and restart it whenever it dies. Raises TinyvllmError if it dies again and again."""
        restarts = Restarts(front_end_name(index), self._stopping)
        for generation in itertools.count():
            try:
                process, connections = await self._start_front_end(index, generation)
            except TinyvllmError as error:
                if not generation:
                    raise
                log.error("%s: it is tried again", error)
                await restarts.wait(None)
                if self._stopping.is_set():
                    return
                continue
            await self._follow_front_end(index, process, connections)
            end = await process.how_it_ended()
            if not self._stopping.is_set():
                log.error("%s %s: its requests are ended, and it is started again", process.name, end)
                self._tell_engines_of_death(client_name(index, generation))
            await self._remove(process)
            self._board.rows[index].clear()
            if self._stopping.is_set():
                return
            await restarts.wait(process)
            if self._stopping.is_set():
                return

    def _tell_engines_of_death(self, client: str) -> None:
        """Have the engines end a front-end's requests: now, and those whose messages are still on their way."""

        def tell() -> None:
            for engine in self._engines.values():
                engine.send("client_gone", client=client)

        tell()
        asyncio.get_running_loop().call_later(MESSAGE_DELAY_S, tell)

    async def _start_front_end(self, index: int, generation: int) -> tuple[Process, socket.socket]:
        """The process, and the socket over which it gets connections."""
        plan = self._plan
        here, there = socket.socketpair()
        with there:
            spec = FrontEndSpec(
                index=index,
                run_dir=str(self._directory),
                connections_fd=there.fileno(),
                config=plan.engines[0].config,
                num_engines=plan.num_engines,
                num_front_ends=plan.num_http,
                large_lane=str(self._directory / "large") if plan.has_large_lane else None,
                is_large_lane=index == plan.num_front_ends,
                settings=plan.settings,
                tls=plan.tls,
                access_log=plan.access_log,
                log_level=plan.log_level,
                log_prefix=plan.log_prefix,
                generation=generation,
            )
            try:
                process = await start_process(plan.front_end_module, spec, fds=(there.fileno(),))
            except BaseException:
                here.close()
                raise
        self._front_ends[index] = process
        self._add(process)
        for engine, reason in self._dead_engines.items():
            process.send("engine_died", engine=engine, reason=reason)
        if self._num_signals:
            process.send("drain")
        if self._stopping.is_set():
            process.send("stop")
        return process, here

    async def _follow_front_end(self, index: int, process: Process, connections: socket.socket) -> None:
        """Until the process ends."""
        async for message in process.messages():
            match message["kind"]:
                case "serving":
                    process.ready_s = time.monotonic()
                    if index < self._plan.num_front_ends:
                        self._handover.add(index, connections)
                case "ready":
                    self._greet(index, message["can_chat"])
                case "draining":
                    self._draining.add(index)
                case "ask":
                    self._spawn(self._answer(process, message))
                case "answer":
                    self._questions.take_answer(process.name, message)
        self._handover.remove(index)
        connections.close()
        del self._front_ends[index]
        self._draining.discard(index)

    async def _end_unseen(self) -> None:
        """Kill front-ends whose event loop has stood still for UNSEEN_S, so that they are started again."""
        period_s = UNSEEN_S / 12
        while not self._stopping.is_set():
            start_s = time.monotonic()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), period_s)
            now_s = time.monotonic()
            if now_s - start_s > 2 * period_s:  # the whole machine stood still
                continue
            for index in self._serving():
                process = self._front_ends[index]
                unseen_s = now_s - max(process.ready_s or 0.0, self._board.rows[index].cells[ALIVE_MS] / 1000)
                if unseen_s > UNSEEN_S and not self._stopping.is_set():
                    log.error("%s has stood still for %.0f s, and is killed", process.name, unseen_s)
                    process.kill()

    async def _answer(self, process: Process, message: Message) -> None:
        question, about = message["question"], message["about"]
        if question in OF_ONE_FRONT_END:
            others = [other for index in self._serving() if (other := self._front_ends[index]) is not process]
            answers = await self._questions.ask_first(others, question, about)
        else:
            answers = await self._questions.ask_all(question, about, but=process.name)
        process.send("answers", number=message["number"], answers=answers)

    def _greet(self, index: int, can_chat: bool) -> None:
        """A front-end is ready: once all have been, say so."""
        if index in self._ready_front_ends or self._num_signals:
            return
        self._ready_front_ends.add(index)
        if len(self._ready_front_ends) == self._plan.num_http:
            if self._plan.records:
                for process in self._processes.values():
                    process.send("question", number=0, question=recordings.START_FLAGS_PROFILE, about="")
            self._on_ready(can_chat)

    def _serving(self) -> set[int]:
        """The front-ends that serve. The others are still being started, and have no requests."""
        return {index for index, process in self._front_ends.items() if process.ready_s is not None}

    def _tell_front_ends(self, kind: str, **facts: object) -> None:
        for process in self._front_ends.values():
            process.send(kind, **facts)

    # ---- All processes ----

    def _add(self, process: Process) -> None:
        self._processes[process.name] = process
        self._write_pids()

    async def _remove(self, process: Process) -> None:
        """Collect a process that has closed its link, and what it started."""
        self._questions.forget(process.name)
        await process.wait()
        process.close()
        del self._processes[process.name]
        self._questions.forget(process.name)
        self._write_pids()

    def _write_pids(self) -> None:
        pids = {name: process.pid for name, process in self._processes.items()}
        write_pids(self._directory, {"supervisor": os.getpid(), **pids})

    # ---- Stopping ----

    @contextlib.contextmanager
    def _stop_signals(self) -> Iterator[None]:
        if self._stops is not None:
            with self._stops.heard_by(self._on_signal):
                yield
            return
        loop = asyncio.get_running_loop()
        numbers = [number for number in STOP_SIGNALS if hears_stop(number)]
        for number in numbers:
            loop.add_signal_handler(number, self._on_signal)
        try:
            yield
        finally:
            for number in numbers:
                loop.remove_signal_handler(number)

    def _on_signal(self) -> None:
        """The first signal starts the drain, the second ends it, and any later one kills what does not end."""
        self._clock.on_signal(self._plan.settings.shutdown_timeout_s)
        self._num_signals += 1
        if self._num_signals == 1:
            self._spawn(self._drain())
        else:
            self._end_server()

    async def _drain(self) -> None:
        """Have new requests refused, and wait for the running ones until they are answered or the time is over."""
        self._tell_front_ends("drain")
        timeout_s = self._plan.settings.shutdown_timeout_s
        start_s = time.monotonic()
        while time.monotonic() < start_s + DRAIN_NOTICE_S and self._serving() - self._draining:
            await asyncio.sleep(TICK_S)  # one that does not know of the drain yet may still take a request
        if not self._engines:  # the requests wait for an engine that is still loading
            self._end_server()
            return
        num_requests = self._board.sum(NUM_REQUESTS)
        if num_requests and timeout_s:
            log.warning(
                "stopping: %d requests may continue for up to %g s; a second signal stops at once",
                num_requests,
                timeout_s,
            )
        while self._board.sum(NUM_REQUESTS) and time.monotonic() < start_s + timeout_s:
            await asyncio.sleep(TICK_S)
        self._end_server()

    def _end_server(self) -> None:
        """End the server; with an error, if it has lost its last engine."""
        if self._end.done():
            return
        if self._loss is not None:
            self._end.set_exception(self._loss)
        else:
            self._end.set_result(None)

    async def _stop(self, front_ends: list[asyncio.Task[None]], engines: list[asyncio.Task[None]]) -> None:
        """Stop front-ends, then engines. Raises TinyvllmError if a signal asked for haste and a step did not end."""
        self._stopping.set()
        if num_requests := self._board.sum(NUM_REQUESTS):
            log.warning("stopping: aborting %d requests", num_requests)
        self._handover.close()
        self._kill(self._front_ends[index] for index in self._front_ends.keys() - self._serving())
        if self._plan.records:
            self.recordings = recordings.read(await self._questions.ask_all(recordings.STOP_FLAGS_PROFILE))
        self._tell_front_ends("stop")
        if not await self._have_ended(front_ends, FRONT_ENDS_END_S):
            log.error("a front-end does not end, and is killed")
            self._kill(self._front_ends.values())
            await asyncio.wait(front_ends)
        for process in self._processes.values():
            process.send("stop")
        is_clean = not self._end.cancelled() and self._end.exception() is None
        if not await self._have_ended(engines, ENGINES_END_S if self._num_signals < 2 else HASTE_S):
            self._kill(self._processes.values())
            await asyncio.wait(engines)
            if is_clean:
                raise TinyvllmError("the engine's current step does not end: its process was killed")

    async def _have_ended(self, tasks: Sequence[asyncio.Task[None]], limit_s: float) -> bool:
        """Wait for the tasks until the time is over. Returns whether all have ended."""
        start_s, num_signals = time.monotonic(), self._num_signals
        while not all(task.done() for task in tasks):
            if self._num_signals > num_signals:  # in haste now
                limit_s = min(limit_s, HASTE_S)
            if time.monotonic() - start_s >= limit_s:
                return False
            await asyncio.wait(tasks, timeout=TICK_S)
        return True

    def _kill(self, processes: Iterable[Process]) -> None:
        for process in processes:
            process.kill()
