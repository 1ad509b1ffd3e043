"""The main function of a model's process: the server of one model, on a Unix socket that the door chose.

It reports what the model needs, waits until the door has room for it, and serves until the door tells it to stop. If
each model has several front-ends, this process is their supervisor.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import sys
import traceback
from collections.abc import Callable

from tinyvllm.config import EngineConfig
from tinyvllm.door.needs import Examine, examine_in_process, within
from tinyvllm.door.policy import Need
from tinyvllm.door.specs import EXAMINE, ModelSpec
from tinyvllm.engine.async_engine import AsyncEngine
from tinyvllm.engine.loading import LoadedEngine
from tinyvllm.errors import TinyvllmError
from tinyvllm.processes import explain_limit
from tinyvllm.server import event_loop, serve, supervisor
from tinyvllm.server.child import find, start_child
from tinyvllm.server.control import ChildLink, Message
from tinyvllm.server.engine_placement import Placement
from tinyvllm.server.output_queue import exit_now
from tinyvllm.server.sockets import bind_unix
from tinyvllm.server.stop_clock import StopClock
from tinyvllm.server.stop_requests import StopRequests

log = logging.getLogger(__name__)

WATCH_S = 0.5  # how often it is checked that the engine is alive
Report = Callable[[str, int, int], None]


def main() -> None:
    """Ends like a single server, which ends its compiling processes first. The door kills it if it does not end."""
    spec, link = start_child(ModelSpec)
    code = 1
    try:
        code = _ModelProcess(spec, link).run()
    except BaseException as error:
        if (advice := explain_limit(error)) is None:
            log.critical("the model's server ends with an unexpected error", exc_info=True)
        link.send("failed", error=advice or "".join(traceback.format_exception_only(error)).strip())
    sys.exit(code)


class _ModelProcess:
    """Serves on the main thread, and receives the door's messages on the control link's thread."""

    def __init__(self, spec: ModelSpec, link: ChildLink) -> None:
        self._spec = spec
        self._link = link
        self._stops = StopRequests()
        self._is_ready = False
        self._orders: queue.SimpleQueue[Message] = queue.SimpleQueue()  # until the model is loaded

    def run(self) -> int:
        """Serve until the door says stop; returns the exit code."""
        self._link.watch(self._handle)
        try:
            if self._spec.num_front_ends:
                self._supervise()
            else:
                self._serve()
        except TinyvllmError as error:
            self._link.send("failed", error=str(error))
            return 1
        return 0

    def _serve(self) -> None:
        """With the engine in this process."""
        event_loop.run(
            serve.serve(
                lambda: AsyncEngine.start(self._spec.config, self._report, self._load),
                bind_unix(self._spec.uds),
                on_ready=self._watch_engine,
                settings=self._spec.settings,
                access_log=False,  # the door logs each request
                stops=self._stops,
                clock=StopClock(),
            )
        )

    def _watch_engine(self, engine: AsyncEngine) -> None:
        """The model is loaded. If its engine dies, end this process, so that the next request starts another."""
        self._announce()

        async def watch() -> None:
            while engine.error is None:
                await asyncio.sleep(WATCH_S)
            self._link.send("failed", error=f"its engine has stopped: {engine.error}")
            await asyncio.sleep(WATCH_S)  # clients get their answers
            self._stops.request()

        self._watching = asyncio.get_running_loop().create_task(watch())

    def _load(self, config: EngineConfig, progress: Report) -> LoadedEngine:
        """Load the model when the door says so. On the engine's thread, the only one that may use the device."""
        config = self._wait_for_room(config, find(self._spec.examine))
        loaded: LoadedEngine = find(self._spec.load)(config, progress)
        return loaded

    def _supervise(self) -> None:
        spec = self._spec
        config = self._wait_for_room(spec.config, examine_in_process if spec.examine == EXAMINE else find(spec.examine))
        plan = supervisor.ServePlan(
            engines=[Placement(config)],
            settings=spec.settings,
            num_front_ends=spec.num_front_ends,
            access_log=False,
            log_level=spec.log_level,
            log_prefix=f"{spec.log_prefix}{spec.name} ",
            load=spec.load,
        )
        event_loop.run(
            supervisor.supervise(
                plan,
                bind_unix(spec.uds),
                self._report,
                lambda can_chat: self._announce(),
                stops=self._stops,
                clock=StopClock(),
            )
        )

    def _wait_for_room(self, config: EngineConfig, examine: Examine) -> EngineConfig:
        """Report what the model needs until there is room for it. Returns settings with which it fits."""
        while True:
            need: Need = examine(config)
            self._link.send("need", need=need)
            order = self._orders.get()
            if order["kind"] == "load":
                return within(config, order["num_bytes"], need)

    def _report(self, stage: str, done: int, total: int) -> None:
        self._link.send("progress", stage=stage, done=done, total=total)

    def _announce(self) -> None:
        self._is_ready = True
        self._link.send("ready")

    def _handle(self, message: Message) -> None:
        """Handle a message from the door. Runs on the link's thread."""
        if message["kind"] != "stop":
            self._orders.put(message)
        elif self._is_ready:
            self._stops.request()
        else:  # nothing is lost, and loading could take minutes
            exit_now(0)


if __name__ == "__main__":
    main()
