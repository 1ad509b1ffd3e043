"""What the front-ends of a server count together: the use of its limits, and recent latencies.

The board is a table of 64-bit numbers with one row per front-end. Each row is written by its front-end alone, and
everyone reads their sum. With one front-end the table is ordinary memory; with several it is a file that all of them
map. A number is stored by one aligned write of 8 bytes, so a reader never sees half of one.

Checks against a limit hold for all front-ends together, because checking and adding happen under one lock. The kernel
releases the lock of a process that is killed; the supervisor clears its row. Lock, check and add take 3 us.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

# The cells of a row.
NUM_SEQS = 0  # sequences that were admitted and not yet answered
NUM_WAITING_TOKENS = 1  # prompt tokens of those without output
NUM_REQUESTS = 2  # unanswered requests that may need the engine
NUM_CONNECTIONS = 3  # open connections
NUM_TAKEN = 4  # connections taken over from the supervisor, since the row was cleared
ALIVE_MS = 5  # monotonic clock: when the event loop was last seen running
_NUM_CELLS = 8

NUM_RECENT = 512  # latencies kept per front-end for the page's quantiles
_RINGS = ("ttft_s", "itl_s")
_ROW_BYTES = 8 * (_NUM_CELLS + len(_RINGS) * (1 + NUM_RECENT))


class Ring:
    """The latest NUM_RECENT latencies of one front-end, in seconds."""

    def __init__(self, cells: memoryview[int], values: memoryview[float]) -> None:
        self._count = cells  # one cell: how many have been added
        self._values = values

    def append(self, seconds: float) -> None:
        count = self._count[0]
        self._values[count % NUM_RECENT] = seconds
        self._count[0] = count + 1

    def latest(self) -> list[float]:
        """In no particular order."""
        return list(self._values[: min(self._count[0], NUM_RECENT)])


class Row:
    """One front-end's numbers."""

    def __init__(self, memory: memoryview) -> None:
        self._memory = memory
        self.cells = memory[: 8 * _NUM_CELLS].cast("q")
        rings = []
        for number in range(len(_RINGS)):
            start = 8 * (_NUM_CELLS + number * (1 + NUM_RECENT))
            counts, values = memory[start : start + 8], memory[start + 8 : start + 8 * (1 + NUM_RECENT)]
            rings.append(Ring(counts.cast("q"), values.cast("d")))
        self.recent_ttft_s, self.recent_itl_s = rings

    def clear(self) -> None:
        """Forget everything, after the death of the front-end that wrote it."""
        self._memory[:] = bytes(len(self._memory))


class Board:
    """The rows of all front-ends, and the lock of the limits. `own` is the row that this process writes."""

    def __init__(self, memory: memoryview, num_rows: int, own: int = 0, lock: int | None = None) -> None:
        self.rows = [Row(memory[k * _ROW_BYTES : (k + 1) * _ROW_BYTES]) for k in range(num_rows)]
        self.own = self.rows[own]
        self._lock = lock  # a file descriptor
        if lock is not None:
            weakref.finalize(self, os.close, lock)

    @classmethod
    def in_memory(cls) -> Board:
        """The board of a server with one front-end."""
        return cls(memoryview(bytearray(_ROW_BYTES)), 1)

    @classmethod
    def create(cls, path: Path, num_rows: int) -> Board:
        """Make the file of a board, for `open` in other processes."""
        path.write_bytes(bytes(num_rows * _ROW_BYTES))
        return cls.open(path, num_rows)

    @classmethod
    def open(cls, path: Path, num_rows: int, own: int = 0) -> Board:
        with path.open("r+b") as file:
            memory = memoryview(mmap.mmap(file.fileno(), num_rows * _ROW_BYTES))
        # a lock belongs to the open file, so each process opens it anew
        return cls(memory, num_rows, own, os.open(path, os.O_RDWR | os.O_CLOEXEC))

    def sum(self, cell: int) -> int:
        """A cell's sum over all front-ends."""
        return sum(row.cells[cell] for row in self.rows)

    def add(self, cell: int, amount: int) -> None:
        """Add to this front-end's own cell."""
        self.own.cells[cell] += amount

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Within the block, no other front-end is in such a block. Amounts may be subtracted without it."""
        if self._lock is None:  # one event loop
            yield
            return
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self._lock, fcntl.LOCK_UN)

    def recent_ttft_s(self) -> list[float]:
        return [value for row in self.rows for value in row.recent_ttft_s.latest()]

    def recent_itl_s(self) -> list[float]:
        return [value for row in self.rows for value in row.recent_itl_s.latest()]

    def show_alive(self) -> None:
        """Record that this front-end's event loop runs."""
        self.own.cells[ALIVE_MS] = int(1000 * time.monotonic())
