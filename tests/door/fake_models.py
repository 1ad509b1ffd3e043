"""Models for a door in tests: their processes are real, and the device in them is fake.

What a model does is in its name: "size 30" needs 30 of the device's 100 GiB, "slow" is loaded once the file that
TINYVLLM_TEST_GO names is there, "broken" cannot be loaded, "failing" fails at every step, "endless" never ends an
answer, and "held" goes on with it once that file is there.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx

from tests.forking import forking_instead_of
from tests.server import fake_load
from tinyvllm.config import EngineConfig
from tinyvllm.door.fleet import Plan
from tinyvllm.door.policy import Need
from tinyvllm.door.serve import DoorServer, serve_door
from tinyvllm.door.settings import DoorSettings, ModelSettings
from tinyvllm.engine.loading import LoadedEngine
from tinyvllm.errors import DeviceError, ModelError
from tinyvllm.server import event_loop
from tinyvllm.server.settings import ServerSettings
from tinyvllm.server.sockets import bind

ROOT = Path(__file__).parents[2]
GIB = 2**30
GO_VARIABLE = "TINYVLLM_TEST_GO"
EXAMINE, LOAD = "tests.door.fake_models:examine", "tests.door.fake_models:load"


def examine(config: EngineConfig) -> Need:
    size = re.search(r"size (\d+)", config.model)
    weights = GIB * int(size[1] if size else 1)
    return Need(device="FAKE", weights=weights, scratch=0, kv=0, context=256, free=100 * GIB, share=1.0, is_total=True)


def load(config: EngineConfig, progress: Callable[[str, int, int], None]) -> LoadedEngine:
    if "broken" in config.model:
        raise ModelError("its file is damaged")
    if "slow" in config.model:
        _wait_for_go()
    loaded = (fake_load.slow if "endless" in config.model else fake_load.answering)(config, progress)
    runner: Any = loaded.runner
    if "failing" in config.model:
        runner.before_step = _fail
    if "held" in config.model:
        runner.before_step = _wait_for_go
    return loaded


def _fail(plan: object) -> None:
    raise DeviceError("the device has fallen off")


def _wait_for_go(plan: object = None) -> None:
    while not Path(os.environ[GO_VARIABLE]).exists():
        time.sleep(0.01)


def model(name: str, kind: str = "", **options: Any) -> ModelSettings:
    return ModelSettings(name=name, config=EngineConfig(kind or name, served_model_name=name), **options)


class RunningDoor:
    """A door on a thread of this process."""

    def __init__(self, url: str, server: DoorServer) -> None:
        self.url = url
        self.server = server
        self.fleet = server.state.fleet

    def client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=self.url)

    def stop(self) -> None:
        """A stop signal."""
        self.server.handle_exit(15, None)

    def pids(self) -> dict[str, int]:
        return {name: child.process.pid for name, child in dict(self.fleet.children).items()}

    def states(self) -> dict[str, str]:
        return {name: self.fleet.state_of(name).value for name in self.fleet.counts}


@contextlib.contextmanager
def running_door(
    *models: ModelSettings,
    door: dict[str, Any] | None = None,
    plan: dict[str, str] | None = None,
    is_forked: bool = True,
    **settings: Any,
) -> Iterator[RunningDoor]:
    """door: DoorSettings' other fields. plan: Plan's; without it, devices are fake. settings: ServerSettings'.

    `is_forked`: its processes have this process's modules, instead of importing their own."""
    sock = bind("127.0.0.1", 0)
    found: list[DoorServer] = []
    is_serving = threading.Event()

    def on_serving(server: DoorServer) -> None:
        found.append(server)
        is_serving.set()

    how = Plan(
        settings=ServerSettings(**{"stats_interval_s": None, **settings}),
        **(plan or {"examine": EXAMINE, "load": LOAD}),
    )
    work = serve_door(DoorSettings(models=models, **(door or {})), how, sock, on_serving=on_serving, access_log=False)
    start = asyncio.create_subprocess_exec
    if is_forked:  # uvloop has no function that runs in the child
        asyncio.create_subprocess_exec = forking_instead_of(start)
    thread = threading.Thread(target=asyncio.run if is_forked else event_loop.run, args=(work,))
    thread.start()
    try:
        is_serving.wait()
        yield RunningDoor(f"http://127.0.0.1:{sock.getsockname()[1]}", found[0])
    finally:
        if found:
            found[0].handle_exit(15, None)
            found[0].handle_exit(15, None)  # at once
        thread.join()
        asyncio.create_subprocess_exec = start
