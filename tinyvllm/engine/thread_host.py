"""An engine on a thread of this process. The thread loads the model and runs the step loop."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future

from tinyvllm.config import EngineConfig
from tinyvllm.engine.client import Client
from tinyvllm.engine.hosts import Loaded
from tinyvllm.engine.loading import LoadedEngine, Progress
from tinyvllm.engine.local_door import LocalDoor
from tinyvllm.engine.loop import EngineLoop
from tinyvllm.engine.messages import ToEngine
from tinyvllm.errors import EngineDeadError
from tinyvllm.scheduling.adapter_slots import AdapterInfo
from tinyvllm.scheduling.plan import StepStats

logger = logging.getLogger(__name__)

JOIN_POLL_S = 0.01


class ThreadHost:
    """Owns the engine's thread, and one client for each event loop that uses it."""

    num_engines = 1
    is_remote = False

    def __init__(
        self, config: EngineConfig, progress: Progress | None, load: Callable[[EngineConfig, Progress], LoadedEngine]
    ) -> None:
        """Start the thread. `progress` and `load` are called on it."""
        self.error: BaseException | None = None
        self.engine: LoadedEngine | None = None
        self.loaded: Loaded | None = None
        self.door = LocalDoor()
        self._config = config
        self._progress = progress
        self._load = load
        self._loop: EngineLoop | None = None
        self._started: Future[None] = Future()
        self._started.set_running_or_notify_cancel()  # so a caller that stops waiting does not cancel it for the others
        self._lock = threading.Lock()
        self._clients: dict[asyncio.AbstractEventLoop, Client] = {}
        self._is_stopping = self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="tinyvllm-engine", daemon=True)
        self._thread.start()

    async def wait_ready(self) -> None:
        await asyncio.wrap_future(self._started)
        if self.error is not None:
            raise self.error

    @property
    def is_ready(self) -> bool:
        return self.loaded is not None and not self._is_closed and not self._is_stopping

    def engine_stats(self) -> list[StepStats]:
        return [StepStats() if self.engine is None else self.engine.core.stats]

    def adapters(self) -> list[AdapterInfo]:
        adapters = None if self.engine is None else self.engine.core.adapters
        return [] if adapters is None else adapters.infos

    def client(self, loop: asyncio.AbstractEventLoop) -> Client:
        if self._is_closed or self._is_stopping:
            raise EngineDeadError("the engine is shut down" if self.error is None else str(self.error))
        client = self._clients.get(loop)
        return self._connect(loop) if client is None else client

    def clients(self) -> list[tuple[asyncio.AbstractEventLoop, Client]]:
        with self._lock:
            for closed in [loop for loop in self._clients if loop.is_closed()]:
                del self._clients[closed]  # the step loop drops its requests when it next sends to it
            return list(self._clients.items())

    async def shutdown(self, drain_s: float) -> None:
        self._is_stopping = True
        if self._loop is not None:
            self._loop.stop(drain_s)
        while self._thread.is_alive():  # not join() on another thread, for which an event loop's end would wait
            await asyncio.sleep(JOIN_POLL_S)

    def _connect(self, loop: asyncio.AbstractEventLoop) -> Client:
        if self.loaded is None:
            raise EngineDeadError("the model is not loaded: await wait_ready() first")
        client = Client([_Line(self, loop)], self.loaded.tokenizer)
        with self._lock:
            self._clients[loop] = client
        self.door.connect(loop, loop, client.receive)
        return client

    def _run(self) -> None:
        """The thread's main function: load, serve, close. However it ends, no caller is left waiting."""
        try:
            engine = self._load(self._config, self._report)
            engine.tokenizer.encode_long_texts_elsewhere()
            loop = EngineLoop(engine.core, engine.grammars, self.door)
        except BaseException as error:
            self._close(error)
            self._started.set_exception(error)
            return
        self.engine, self._loop = engine, loop
        self.loaded = engine
        if self._is_stopping:
            loop.stop()
        self._started.set_result(None)
        cause: BaseException | None = None
        try:
            loop.run()
        except EngineDeadError as error:
            cause = error
        except BaseException as error:
            cause = EngineDeadError(f"the engine's thread has stopped: {type(error).__name__}: {error}")
            cause.__cause__ = error
        if cause is not None:
            logger.critical("the engine's thread stops", exc_info=cause)
        self._close(cause)
        engine.runner.close()
        engine.tokenizer.close()

    def _report(self, stage: str, done: int, total: int) -> None:
        """Report progress. A shutdown requested during start-up takes effect here."""
        if self._is_stopping:
            raise EngineDeadError("the engine was shut down before it was ready")
        if self._progress is not None:
            self._progress(stage, done, total)

    def _close(self, error: BaseException | None) -> None:
        self.error = error
        self._is_closed = True
        self.door.close("the engine was shut down" if error is None else str(error))


class _Line:
    """An event loop's way to the engine's thread."""

    def __init__(self, host: ThreadHost, loop: asyncio.AbstractEventLoop) -> None:
        self._host = host
        self._loop = loop

    def send(self, message: ToEngine) -> None:
        if not self._host.door.put(self._loop, message):
            raise EngineDeadError(str(self._host.error or "the engine was shut down"))
