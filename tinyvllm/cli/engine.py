"""An engine inside this process, with progress bars for its start."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tinyvllm.cli.terminal import Progress, progress_bars
from tinyvllm.config import EngineConfig

if TYPE_CHECKING:
    from tinyvllm.engine.async_engine import AsyncEngine


def start_engine(config: EngineConfig, progress: Progress) -> AsyncEngine:
    """Start loading and warming up on the engine's own thread. Returns immediately."""
    from tinyvllm.engine.async_engine import AsyncEngine

    return AsyncEngine.start(config, progress)


async def ready_engine(config: EngineConfig, *, uses_adapter: bool = False) -> AsyncEngine:
    """A warm engine, which the caller shuts down. uses_adapter: requests run with the last of its adapters. Raises
    whatever kept it from starting."""
    with progress_bars() as report:
        engine = start_engine(config, report)
        # Ctrl-C ends this wait without joining the engine's thread: it is a daemon and ends with the process
        await engine.wait_ready()
    if uses_adapter:
        engine.default_adapter = engine.adapters()[-1].key
    return engine
