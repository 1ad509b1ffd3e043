"""A load process: `python -m tinyvllm.bench.load_worker FD` sends the requests that it is told to over the socket FD.

It imports neither tinygrad nor NumPy nor httpx. Messages are JSON in frames of multiprocessing.connection:

    parent -> process   {"target": ..., "work": ...} once, then for each level a job and {"start_s": when it starts}
    process -> parent   {"ready": true} when started and when a job's requests are made, {"done": count} while running,
                        and at the end of a job the bytes of `pack_share`, which begin with the letter A

The end of the socket means that the parent has ended, whatever ended it; so does the process then.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import resource
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from multiprocessing.connection import Connection as Pipe
from typing import Any

from tinyvllm.bench.load import LoadWork, Target
from tinyvllm.bench.load_answers import Answer, Share, pack_share
from tinyvllm.bench.load_client import Client

PROGRESS_S = 0.1
SHARE_MARK = b"A"


async def send_all(
    client: Client,
    requests: Sequence[bytes],
    *,
    concurrency: int | None,
    due_s: Sequence[float] | None,
    start_s: float = 0.0,
    report_done: Callable[[int], None] | None = None,
) -> Share:
    """Send all requests from `start_s` on, each at its time if `due_s` gives times after the start, else as soon as
    fewer than `concurrency` are open. Returns when all of them have ended."""
    share = Share([Answer() for _ in requests])
    slots = contextlib.nullcontext() if concurrency is None else asyncio.Semaphore(concurrency)
    done = 0

    async def send(number: int) -> None:
        nonlocal done
        async with slots:
            share.answers[number] = await client.send(requests[number])
        done += 1
        if report_done is not None:
            report_done(done)

    async def send_each(numbers: Any) -> None:
        for number in numbers:
            await send(number)

    await asyncio.sleep(start_s - time.perf_counter())
    cpu_s = time.process_time()
    if due_s is None:
        numbers = iter(range(len(requests)))
        await asyncio.gather(*[send_each(numbers) for _ in range(concurrency or len(requests))])
    else:
        async with asyncio.TaskGroup() as tasks:
            for number, due in enumerate(due_s):
                await asyncio.sleep(start_s + due - time.perf_counter())
                share.late_s.append(max(0.0, time.perf_counter() - start_s - due))
                tasks.create_task(send(number))
    share.cpu_s = time.process_time() - cpu_s
    return share


class Worker:
    """Runs the jobs that the parent sends."""

    def __init__(self, pipe: Pipe) -> None:
        self._pipe = pipe
        self._messages: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._reported_s = 0.0

    async def run(self) -> None:
        """Never returns: the process ends with the socket."""
        threading.Thread(target=self._receive, args=(asyncio.get_running_loop(),), daemon=True).start()
        self._tell({"ready": True})
        settings = await self._messages.get()
        target, work = Target(**settings["target"]), LoadWork(**settings["work"])
        async with Client(target) as client:
            while True:
                job = await self._messages.get()
                requests = [client.make_request(work.request(target, number)) for number in job["numbers"]]
                await self._run_job(client, requests, job)

    async def _run_job(self, client: Client, requests: Sequence[bytes], job: dict[str, Any]) -> None:
        self._tell({"ready": True})
        start_s = (await self._messages.get())["start_s"]
        gc.collect()
        gc.disable()  # a collection would delay the timestamps of all open answers
        share = await send_all(
            client,
            requests,
            concurrency=job["concurrency"],
            due_s=job["due_s"],
            start_s=start_s,
            report_done=self._report_done,
        )
        gc.enable()
        self._pipe.send_bytes(SHARE_MARK + pack_share(share))

    def _report_done(self, done: int) -> None:
        """At most every PROGRESS_S, so that short answers do not become messages."""
        now_s = time.perf_counter()
        if now_s - self._reported_s >= PROGRESS_S:
            self._reported_s = now_s
            self._tell({"done": done})

    def _receive(self, loop: asyncio.AbstractEventLoop) -> None:
        """A thread, because uvloop makes the sockets that it watches non-blocking, which Pipe.send_bytes cannot use."""
        while True:
            try:
                message = json.loads(self._pipe.recv_bytes())
            except (EOFError, OSError):
                os._exit(0)
            loop.call_soon_threadsafe(self._messages.put_nowait, message)

    def _tell(self, message: dict[str, Any]) -> None:
        self._pipe.send_bytes(json.dumps(message).encode())


def run_loop(main: Coroutine[Any, Any, None]) -> None:
    """Run on uvloop where it is installed: it halves the cost of a network read."""
    new_event_loop: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop
    with contextlib.suppress(ImportError):
        from uvloop import new_event_loop
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(main)


def allow_many_connections() -> None:
    """Raise the limit of open files, often 256 or 1024, as far as the system lets us."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


if __name__ == "__main__":
    allow_many_connections()
    with contextlib.suppress(BrokenPipeError):  # the parent has ended
        run_loop(Worker(Pipe(int(sys.argv[1]))).run())
