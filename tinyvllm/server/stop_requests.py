"""Requests to stop from another process, in place of signals."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator


class StopRequests:
    """Stop requests to a server that runs as a child process: the first starts the drain, and a second ends it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_unheard = 0
        self._tell: Callable[[], object] | None = None

    def request(self) -> None:
        """Ask the server to stop. May be called from any thread, and before the server listens."""
        with self._lock:
            if self._tell is None:
                self._num_unheard += 1
            else:
                self._tell()

    @contextlib.contextmanager
    def heard_by(self, on_stop: Callable[[], None]) -> Iterator[None]:
        """Within the block, call `on_stop` on this event loop for each request, including earlier ones."""
        loop = asyncio.get_running_loop()
        with self._lock:
            num_unheard, self._num_unheard = self._num_unheard, 0
            self._tell = lambda: loop.call_soon_threadsafe(on_stop)
        for _ in range(num_unheard):
            on_stop()
        try:
            yield
        finally:
            with self._lock:
                self._tell = None
