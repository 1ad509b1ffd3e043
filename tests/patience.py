"""How long tests wait for other threads and processes. On a busy machine anything may take long: a limit of time in a
test ends a hang, and never decides."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import sys
import time
from collections.abc import Callable
from typing import Any

PATIENCE_S = 120.0  # less than the limit of a test, whose failure would not say what it waited for

# The program's own limits of this kind, by module: processes that are starved pass them though nothing hangs. Tests of
# such a limit set it, or call `as_for_users` in the process that has it.
LIMITS: dict[str, tuple[str, ...]] = {
    "tinyvllm.bench.load_processes": ("EXIT_TIMEOUT_S",),
    "tinyvllm.door.fleet": ("CLOSE_S", "END_S", "KILL_S"),
    "tinyvllm.execution.kv_tiers.disk_tier": ("CLOSE_S",),
    "tinyvllm.execution.kv_tiers.tiers": ("CLOSE_S", "FETCH_S"),
    "tinyvllm.execution.tune_process": ("END_S",),
    "tinyvllm.server.process": ("EXIT_CODE_S",),
    "tinyvllm.server.questions": ("ALL_TIMEOUT_S", "FIRST_TIMEOUT_S"),
    "tinyvllm.server.relay": ("FETCH_S",),
    "tinyvllm.server.serve": ("ENGINE_END_S",),
    "tinyvllm.server.stop_clock": ("END_S", "HASTE_S"),
    "tinyvllm.server.supervisor": ("DRAIN_NOTICE_S", "ENGINES_END_S", "FRONT_ENDS_END_S", "HASTE_S"),
}
_for_users: dict[tuple[str, str], float] = {}


def be_patient() -> None:
    """Set LIMITS to PATIENCE_S in the modules that this process has imported, and what it forks has."""
    for name in LIMITS.keys() & sys.modules.keys():
        module: Any = sys.modules[name]
        for limit in LIMITS[name]:
            _for_users.setdefault((name, limit), getattr(module, limit))
            setattr(module, limit, PATIENCE_S)
    if "httpx" in sys.modules:  # whose clients give up after 5 s
        default: Any = sys.modules["httpx"]._config.DEFAULT_TIMEOUT_CONFIG
        default.connect = default.read = default.write = default.pool = PATIENCE_S


def as_for_users() -> None:
    """Take back `be_patient` in a process whose limits are what is tested."""
    for (name, limit), seconds in _for_users.items():
        setattr(importlib.import_module(name), limit, seconds)


def users_limit(name: str, limit: str) -> float:
    """A limit of the module `name` as users have it."""
    seconds: float = _for_users.get((name, limit), getattr(importlib.import_module(name), limit))
    return seconds


def wait_for(condition: Callable[[], object], *ignored: type[Exception]) -> None:
    """Wait until the condition is true. Errors of the types `ignored` say that it is not yet."""
    end_s = time.monotonic() + PATIENCE_S
    while True:
        with contextlib.suppress(*ignored):
            if condition():
                return
        assert time.monotonic() < end_s, "what the test waits for did not come true"
        time.sleep(0.01)


def jump_over_waits() -> None:
    """From here on, the clock of the running event loop stands still while there is anything to do, and jumps to the
    next timer when there is nothing: timers end in their order, and at once. For loops that wait for no thread."""
    loop: Any = asyncio.get_running_loop()
    now_s, select = loop.time(), loop._selector.select

    def select_now(timeout: float | None) -> Any:
        nonlocal now_s
        if timeout is None:
            return select(None)
        events = select(0)
        if not events:
            now_s += timeout
        return events

    loop.time, loop._selector.select = lambda: now_s, select_now


async def until(condition: Callable[[], object]) -> None:
    """`wait_for` on an event loop, which goes on meanwhile."""
    end_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end_s, "what the test waits for did not come true"
        await asyncio.sleep(0.005)
