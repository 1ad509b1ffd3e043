"""Engines in processes of their own, as a front-end process sees them. Used on one event loop only."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import zmq

from tinyvllm.config import EngineConfig
from tinyvllm.engine.board import StatsRow
from tinyvllm.engine.client import Client
from tinyvllm.engine.constraints import GrammarCompiler
from tinyvllm.engine.hosts import Loaded
from tinyvllm.engine.loading import Text, load_text, prepare_grammars
from tinyvllm.engine.messages import (
    AdapterList,
    Goodbye,
    Hello,
    Lost,
    ToEngine,
    Welcome,
    decode_for_client,
    encode_message,
)
from tinyvllm.engine.placement import Placement
from tinyvllm.engine.socket_door import LINGER_MS
from tinyvllm.errors import EngineDeadError
from tinyvllm.faults import reach
from tinyvllm.scheduling.adapter_slots import AdapterInfo
from tinyvllm.scheduling.plan import StepStats

logger = logging.getLogger(__name__)

MAX_MESSAGES = 32  # read in one turn of the event loop; writes to clients come in between


@dataclass(frozen=True)
class Endpoint:
    """Where an engine process listens (a ZeroMQ address), and the file of its stats."""

    address: str
    stats_file: str


class ProcessHost:
    """Owns the connections to the engines. The supervisor tells it when an engine dies, or has been started again."""

    is_remote = True

    def __init__(self, config: EngineConfig, endpoints: Sequence[Endpoint], name: str, index: int = 0) -> None:
        """name: unique among all clients that the engines have ever had. index: of the front-end, from 0.

        Call it on the event loop. It loads the tokenizer on a thread, and returns immediately."""
        self.num_engines = len(endpoints)
        self.loaded: Loaded | None = None
        self._config = config
        self._index = index
        self.loop = asyncio.get_running_loop()
        self._rows = [StatsRow(Path(endpoint.stats_file)) for endpoint in endpoints]
        self.context = zmq.Context()
        self._lines = [
            _Line(self, number, endpoint.address, name.encode()) for number, endpoint in enumerate(endpoints)
        ]
        self._client: Client | None = None
        self._welcome: Welcome | None = None
        self._adapters: dict[int, list[AdapterInfo]] = {}  # of each engine
        self._start_error: BaseException | None = None
        self._dead: dict[int, str] = {}  # engines that have died, and why
        self._changed = asyncio.Event()  # set and replaced whenever an engine's state changes
        self._is_closed = False
        self._loading = self.loop.create_task(asyncio.to_thread(_load, config))
        self._loading.add_done_callback(self._finish_loading)
        for line in self._lines:
            line.open()

    # ---- Told by the supervisor ----

    def engine_died(self, engine: int, reason: str) -> None:
        """Its calls fail, or run on another engine if nothing of them has been sent yet."""
        self._dead[engine] = reason
        self._lines[engine].close()
        if self._client is not None:
            self._client.fail_engine(engine, reason)
        self._change()

    def engine_started(self, engine: int) -> None:
        """It has been started again. Requests reach it once it has loaded its model."""
        self._dead.pop(engine, None)
        self._lines[engine].close()
        self._lines[engine].open()

    # ---- Host ----

    @property
    def error(self) -> BaseException | None:
        if self._start_error is not None:
            return self._start_error
        if len(self._dead) == self.num_engines:
            return EngineDeadError("; ".join(dict.fromkeys(self._dead.values())))
        return None

    @property
    def is_ready(self) -> bool:
        return self.loaded is not None and not self._is_closed and any(line.is_ready for line in self._lines)

    async def wait_ready(self) -> None:
        while not self.is_ready:
            if self.error is not None:
                raise self.error
            if self._is_closed:
                raise EngineDeadError("the server is stopping")
            await self._changed.wait()

    def engine_stats(self) -> list[StepStats]:
        """Of each engine; one that is dead runs nothing, but its counters stay."""
        each = [row.read() for row in self._rows]
        for engine in self._dead:
            num_blocks = each[engine].num_free_blocks if self.loaded is None else self.loaded.capacity.num_blocks - 1
            each[engine] = replace(
                each[engine],
                num_running=0,
                num_waiting=0,
                num_free_blocks=num_blocks,
                num_live_states=0,
                num_checkpoints=0,
            )
        return each

    def adapters(self) -> list[AdapterInfo]:
        """Those of the first live engine that all live ones have."""
        lists = [lists for engine, lists in self._adapters.items() if engine not in self._dead]
        common = set.intersection(*({info.key for info in one} for one in lists)) if lists else set()
        return [info for info in lists[0] if info.key in common] if lists else []

    def client(self, loop: asyncio.AbstractEventLoop) -> Client:
        assert loop is self.loop, "a process host serves one event loop"
        if self._client is None or self._is_closed:
            raise EngineDeadError("the engine is shut down" if self.error is None else str(self.error))
        return self._client

    def clients(self) -> list[tuple[asyncio.AbstractEventLoop, Client]]:
        return [] if self._client is None else [(self.loop, self._client)]

    async def shutdown(self, drain_s: float) -> None:
        """Abort this process's requests and disconnect. The engines live on."""
        if self._is_closed:
            return
        if drain_s:
            await self._wait_until_idle(drain_s)
        self._is_closed = True
        if self._client is not None:
            for request_id in list(self._client.calls):
                self._client.abort(request_id)
        for line in self._lines:
            line.close(says=Goodbye())
        self._change()
        await asyncio.to_thread(self.context.term)  # waits until the messages are sent, at most LINGER_MS

    # ---- Inside ----

    def deliver(self, engine: int, data: bytes) -> None:
        """Take a message of an engine."""
        reach("hop.read")
        message = decode_for_client(data)
        if isinstance(message, Welcome):
            self._lines[engine].is_ready = True
            if self._client is not None and self._client.placement is not None:
                self._client.placement.add(engine)
            self._welcome = message
            self._adapters[engine] = message.adapters
            self._complete()
        elif isinstance(message, AdapterList):
            self._adapters[engine] = message.adapters
        elif isinstance(message, Lost):
            self.lose(engine, message.reason)
        elif self._client is not None:
            self._client.receive(message, engine)

    def lose(self, engine: int, reason: str) -> None:
        """End the calls of an engine, since a message from it or to it was lost. That may have been the Hello or the
        Welcome: say Hello again if there was no Welcome."""
        if self._client is not None:
            self._client.lose(engine, reason)
        if not self._lines[engine].is_ready:
            self._lines[engine].introduce()

    def _finish_loading(self, task: asyncio.Task[tuple[Text, GrammarCompiler | None]]) -> None:
        if task.cancelled():
            return
        self._start_error = task.exception()
        self._complete()

    def _complete(self) -> None:
        """Become ready once the tokenizer is loaded and an engine has said what it is."""
        welcome = self._welcome
        if self.loaded is None and welcome is not None and self._loading.done() and self._start_error is None:
            # each front-end draws seeds of its own
            seed = self._config.seed if self._index == 0 else f"{self._config.seed}/{self._index}"
            text, grammars = self._loading.result()
            self.loaded = text.for_callers(welcome.model_config, welcome.capacity, seed, grammars)
            placement = None
            if self.num_engines > 1:
                placement = Placement(self.loaded.capacity, self.engine_stats)
                for engine, line in enumerate(self._lines):
                    if line.is_ready:
                        placement.add(engine)
            self._client = Client(self._lines, self.loaded.tokenizer, placement)
        self._change()

    def _change(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _wait_until_idle(self, seconds: float) -> None:
        deadline_s = self.loop.time() + seconds
        while self._client is not None and self._client.calls and self.loop.time() < deadline_s:
            await asyncio.sleep(0.01)


def _load(config: EngineConfig) -> tuple[Text, GrammarCompiler | None]:
    """The model's text part, and a compiler of grammars that has read its tokenizer. Runs on a thread."""
    text = load_text(config)
    text.tokenizer.encode_long_texts_elsewhere()
    return text, prepare_grammars(config, text)


class _Line:
    """The connection to one engine: a DEALER socket, read by the event loop whenever ZeroMQ signals a message."""

    def __init__(self, host: ProcessHost, engine: int, address: str, name: bytes) -> None:
        self.is_ready = False  # the engine has said Welcome
        self._host = host
        self._engine = engine
        self._address = address
        self._name = name
        self._socket: zmq.Socket[bytes] | None = None

    def open(self) -> None:
        """Connect, and introduce this client. The engine may not listen yet."""
        self._socket = socket = self._host.context.socket(zmq.DEALER)
        socket.set_hwm(0)
        socket.setsockopt(zmq.IDENTITY, self._name)
        socket.setsockopt(zmq.LINGER, LINGER_MS)
        socket.connect(self._address)
        self._host.loop.add_reader(socket, self._read)
        self.introduce()

    def introduce(self) -> None:
        self.send(Hello(routes=self._host.num_engines > 1))

    def close(self, says: ToEngine | None = None) -> None:
        """Disconnect, after a last message if there is one. What the engine has not read is lost otherwise."""
        if self._socket is None:
            return
        if says is not None:
            self.send(says)
        self._host.loop.remove_reader(self._socket)
        self._socket.close(linger=LINGER_MS if says is not None else 0)
        self._socket = None
        self.is_ready = False

    def send(self, message: ToEngine) -> None:
        if self._socket is None:
            raise EngineDeadError("the engine has stopped")
        self._socket.send(encode_message(message), zmq.NOBLOCK)
        events = self._socket.getsockopt(zmq.EVENTS)
        if isinstance(events, int) and events & zmq.POLLIN:  # the file descriptor signals each arrival only once
            self._host.loop.call_soon(self._read)

    def _read(self) -> None:
        for _ in range(MAX_MESSAGES):
            if self._socket is None:
                return
            try:
                data = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                self._host.deliver(self._engine, data)
            except Exception as error:  # must not stop the reading: the file descriptor signals each only once
                logger.exception("a message of engine %d cannot be read: its requests are ended", self._engine)
                reason = f"a message of the engine could not be read: {type(error).__name__}: {error}"
                self._host.lose(self._engine, reason)
        self._host.loop.call_soon(self._read)
