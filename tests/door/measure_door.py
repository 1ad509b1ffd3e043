"""What the door costs: the same streams directly from a model's server and through the door, in turns.

python -m tests.door.measure_door --streams 64 --tokens 200

The model has a fake device, whose steps take `--step-ms`, so that what is measured is the servers. Prints tokens a
second, the median time to the first token and between tokens, and the processor time that the door's process takes for
a token, which does not depend on what else the machine does.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from tests.door.fake_models import EXAMINE, ROOT
from tests.engine.fakes import FakeModelRunner, make_loaded
from tinyvllm.config import EngineConfig
from tinyvllm.engine.async_engine import AsyncEngine
from tinyvllm.engine.loading import LoadedEngine
from tinyvllm.server.settings import ServerSettings

STEP_VARIABLE = "TINYVLLM_TEST_STEP_MS"
TICKS = os.sysconf("SC_CLK_TCK")


def load(config: EngineConfig, progress: Callable[[str, int, int], None]) -> LoadedEngine:
    """A fake device that never samples EOS."""
    runner = FakeModelRunner(num_blocks=64 * 64, max_num_seqs=64, max_model_len=1024)
    step_s = float(os.environ[STEP_VARIABLE]) / 1000
    runner.choose = lambda request, digest: 97 + digest % 26
    runner.before_step = lambda plan: time.sleep(step_s)
    return make_loaded(runner)


def serve_one(sock: socket.socket, settings: ServerSettings) -> Any:
    from tinyvllm.server.serve import serve

    config = EngineConfig("endless", served_model_name="endless")
    return serve(
        lambda: AsyncEngine.start(config, None, load),
        sock,
        on_ready=lambda engine: None,
        settings=settings,
        access_log=False,
    )


def serve_through_door(sock: socket.socket, settings: ServerSettings) -> Any:
    from tests.door.fake_models import model
    from tinyvllm.door.fleet import Plan
    from tinyvllm.door.serve import serve_door
    from tinyvllm.door.settings import DoorSettings

    plan = Plan(settings=settings, examine=EXAMINE, load="tests.door.measure_door:load")
    door = DoorSettings(models=[model("endless"), model("other")])
    return serve_door(door, plan, sock, on_serving=lambda server: None, access_log=False)


def serve_until_killed(kind: str, fd: int) -> None:
    from tinyvllm.server import event_loop

    run = {"direct": serve_one, "door": serve_through_door}[kind]
    event_loop.run(run(socket.socket(fileno=fd), ServerSettings(stats_interval_s=None)))


@dataclass(frozen=True)
class Result:
    tokens_per_s: float
    ttft_ms: float
    itl_ms: float
    cpu_us_per_token: float  # of the process that listens


@contextlib.contextmanager
def serving(kind: str, step_ms: float) -> Iterator[tuple[int, int]]:
    """The port, and the process that listens on it."""
    with socket.create_server(("127.0.0.1", 0), backlog=256) as sock:
        sock.set_inheritable(True)
        command = f"from tests.door.measure_door import *; serve_until_killed({kind!r}, {sock.fileno()})"
        with subprocess.Popen(
            [sys.executable, "-c", command],
            pass_fds=(sock.fileno(),),
            cwd=ROOT,
            env={**os.environ, STEP_VARIABLE: str(step_ms), "PYTHONPATH": str(ROOT)},
        ) as process:
            try:
                yield sock.getsockname()[1], process.pid
            finally:
                process.terminate()
                process.wait(20)


async def stream(port: int, num_tokens: int, ttft_s: list[float], gaps_s: list[float]) -> int:
    """Stream a completion over a connection of its own; returns the number of events."""
    body = json.dumps({"model": "endless", "prompt": "hello", "max_tokens": num_tokens, "stream": True}).encode()
    lines = ("POST /v1/completions HTTP/1.1", "Host: x", "Content-Type: application/json", "Connection: close")
    head = "\r\n".join((*lines, f"Content-Length: {len(body)}", "", ""))
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    start_s = last_s = time.perf_counter()
    writer.write(head.encode() + body)
    num_events = 0
    while data := await reader.read(1 << 16):
        new, now_s = data.count(b'"text"'), time.perf_counter()
        if new:
            (ttft_s if num_events == 0 else gaps_s).append(now_s - (start_s if num_events == 0 else last_s))
            num_events, last_s = num_events + new, now_s
    writer.close()
    return num_events


async def measure(port: int, pid: int, num_streams: int, num_tokens: int) -> Result:
    ttft_s: list[float] = []
    gaps_s: list[float] = []
    cpu_s, start_s = cpu_seconds(pid), time.perf_counter()
    counts = await asyncio.gather(*(stream(port, num_tokens, ttft_s, gaps_s) for _ in range(num_streams)))
    seconds, total = time.perf_counter() - start_s, sum(counts)
    assert total >= num_streams * num_tokens, f"{total} events of {num_streams * num_tokens} tokens"
    return Result(
        total / seconds,
        1000 * statistics.median(ttft_s),
        1000 * statistics.median(gaps_s),
        1e6 * (cpu_seconds(pid) - cpu_s) / total,
    )


def cpu_seconds(pid: int) -> float:
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


async def compare(num_streams: int, num_tokens: int, step_ms: float, rounds: int) -> None:
    with serving("direct", step_ms) as direct, serving("door", step_ms) as door:
        for port, pid in (direct, door):
            while True:  # it is still loading
                with contextlib.suppress(AssertionError, OSError):
                    await measure(port, pid, 2, 5)
                    break
                await asyncio.sleep(0.5)
        print("          tokens/s   first ms   next ms   CPU us/token of the listener")
        for _ in range(rounds):
            for kind, (port, pid) in (("direct", direct), ("door", door)):
                found = await measure(port, pid, num_streams, num_tokens)
                print(
                    f"{kind:8}  {found.tokens_per_s:8.0f}   {found.ttft_ms:8.1f}   {found.itl_ms:7.2f}   "
                    f"{found.cpu_us_per_token:6.1f}",
                    flush=True,
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--step-ms", type=float, default=5.0)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    asyncio.run(compare(given.streams, given.tokens, given.step_ms, given.rounds))


if __name__ == "__main__":
    main()
