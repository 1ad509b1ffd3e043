"""Threads that render and encode prompts, while the event loop serves streams.

Requests with large bodies have two threads of their own: they take seconds, and a few of them would otherwise occupy
every thread, so that no other request could be read.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from tinyvllm.server.context import current
from tinyvllm.server.request_limits import QueueFullError

P = ParamSpec("P")
R = TypeVar("R")

LARGE_BODY_BYTES = 256 * 2**10
NUM_LARGE_THREADS = 2
MAX_LARGE = 16  # large requests that are being read or wait for a thread; each holds its body in memory

_large_threads = ThreadPoolExecutor(NUM_LARGE_THREADS, thread_name_prefix="tinyvllm-large")
_num_large = 0


async def on_thread(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """The function's result, computed on a worker thread for the request that is being handled.

    Raises QueueFullError if the request is large, and too many large ones are being read already."""
    global _num_large
    if current().num_body_bytes <= LARGE_BODY_BYTES:
        return await asyncio.to_thread(function, *args, **kwargs)
    if _num_large >= MAX_LARGE:
        raise QueueFullError(f"{_num_large} requests with large bodies are being read, the limit: try again later")
    call = functools.partial(contextvars.copy_context().run, function, *args, **kwargs)
    future = _large_threads.submit(call)
    _num_large += 1
    future.add_done_callback(_leave)
    return await asyncio.wrap_future(future)


def _leave(_: object) -> None:
    global _num_large
    _num_large -= 1
