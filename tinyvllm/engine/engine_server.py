"""An engine for clients in other processes: the main function of an engine process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tinyvllm.config import EngineConfig
from tinyvllm.engine.board import StatsRow
from tinyvllm.engine.heap import keep_imports, settle_heap
from tinyvllm.engine.loading import LoadedEngine, Progress, load_for_clients
from tinyvllm.engine.loop import EngineLoop
from tinyvllm.engine.process_host import Endpoint
from tinyvllm.engine.socket_door import SocketDoor
from tinyvllm.errors import EngineDeadError


class EngineServer:
    """Owns the socket, which takes messages from the start on, and the step loop once the model is loaded."""

    def __init__(self, config: EngineConfig, endpoint: Endpoint) -> None:
        self._config = config
        self._door = SocketDoor(endpoint.address)
        self._row = StatsRow(Path(endpoint.stats_file))
        self._loop: EngineLoop | None = None
        self._is_stopping = False

    def run(
        self,
        progress: Progress,
        on_ready: Callable[[LoadedEngine], None],
        load: Callable[[EngineConfig, Progress], LoadedEngine] = load_for_clients,
    ) -> None:
        """Load, then serve on this thread until `stop`. Raises what loading raises, and EngineDeadError."""

        def report(stage: str, done: int, total: int) -> None:
            if self._is_stopping:
                raise EngineDeadError("the engine was stopped before it was ready")
            progress(stage, done, total)

        keep_imports()
        engine = load(self._config, report)
        self._row.write(engine.core.stats)
        self._loop = EngineLoop(engine.core, engine.grammars, self._door, self._row.write)
        if self._is_stopping:
            self._loop.stop()
        settle_heap()
        on_ready(engine)
        reason = "the engine was shut down"
        try:
            self._loop.run()
        except BaseException as error:
            reason = str(error) if isinstance(error, EngineDeadError) else f"{type(error).__name__}: {error}"
            raise
        finally:
            self._door.close(reason)
            engine.runner.close()

    # ---- From any thread ----

    def stop(self, drain_s: float = 0.0) -> None:
        """Give the running requests `drain_s` seconds, abort the rest, and let `run` return. May be called again."""
        self._is_stopping = True
        if self._loop is not None:
            self._loop.stop(drain_s)

    def drop_client(self, name: str) -> None:
        """End the requests of a client whose process has died."""
        if self._loop is not None:
            self._loop.drop_client(name.encode())
