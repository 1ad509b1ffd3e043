"""`tinyvllm serve` in a process that reports on itself: for each line on stdin, a line of JSON on stdout.

    python -m tests.server.soak_server DEVICE serve MODEL ...

DEVICE is `model` for a real model, or `fake` for the tests' device, which computes tokens by hashing.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

from tests.engine.fakes import make_loaded
from tests.faults.rounds import make_runner
from tinyvllm.cli import engine as engines
from tinyvllm.cli import main
from tinyvllm.cli.terminal import Progress
from tinyvllm.config import EngineConfig
from tinyvllm.engine.async_engine import AsyncEngine
from tinyvllm.engine.loading import LoadedEngine, load_engine


def start_engine(config: EngineConfig, progress: Progress) -> AsyncEngine:
    """AsyncEngine.start, plus a thread that answers stdin. Runs on the server's event loop."""
    load = load_fake if device == "fake" else load_engine
    engine = AsyncEngine.start(config, progress, load)
    threading.Thread(target=answer, args=(engine, asyncio.get_running_loop()), daemon=True).start()
    return engine


def load_fake(config: EngineConfig, progress: Progress | None) -> LoadedEngine:
    return make_loaded(
        make_runner(
            2 if config.async_scheduling else 1,
            num_blocks=config.num_gpu_blocks_override or 64,
            block_size=16,
            max_num_seqs=config.max_num_seqs or 8,
        )
    )


def answer(engine: AsyncEngine, loop: asyncio.AbstractEventLoop) -> None:
    for _ in sys.stdin:
        print(json.dumps(asyncio.run(report(engine, loop))), flush=True)


async def report(engine: AsyncEngine, loop: asyncio.AbstractEventLoop) -> dict[str, Any]:
    """What the process holds. Raises what BlockManager.audit raises, which ends stdout for the reader."""
    stats = engine.stats()
    [counts] = await engine.audit()
    counts |= {"steps": int(stats.extra["num_steps"]), "preemptions": stats.num_preemptions}
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) if sys.platform == "linux" else 0
    return counts | {
        "calls": sum(len(client.calls) for _, client in engine._host.clients()),
        "tasks": len(asyncio.all_tasks(loop)),
        "threads": threading.active_count(),
        "rss_mib": pages * os.sysconf("SC_PAGE_SIZE") / 2**20,
    }


if __name__ == "__main__":
    device = sys.argv.pop(1)
    engines.start_engine = start_engine
    main()
