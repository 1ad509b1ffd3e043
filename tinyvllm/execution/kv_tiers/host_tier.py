"""Copies of blocks in host memory: a bounded number of rows for each kind, the least recently used given up first."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tinyvllm.device.block_copies import Copy, Rows
from tinyvllm.errors import TinyvllmError
from tinyvllm.faults import reach
from tinyvllm.scheduling.tiers import Key

logger = logging.getLogger(__name__)

SLAB_BYTES = 64 << 20  # rows are allocated this many bytes at a time
MAX_SEARCHED = 256  # rows in use that are passed over to find one that may give way

MakeRows = Callable[[int, int], Rows]  # (rows, bytes of a row)


@dataclass(slots=True, eq=False)
class Entry:
    """A row: a copy that can be found, or one on its way."""

    key: Key
    tokens: bytes
    rows: Rows
    row: int
    users: int = 0  # transfers from and to the row, and requests that need it soon: it does not give way
    is_ready: bool = False  # it has its content
    is_from_disk: bool = False

    @property
    def data(self) -> NDArray[np.uint8]:
        return self.rows[self.row]

    def copy(self, block_id: int) -> Copy:
        return Copy(block_id, self.rows, self.row)


class HostTier:
    """Owns the rows of all kinds. For the engine's thread."""

    def __init__(
        self, sizes: Mapping[int, int], counts: Mapping[int, int], make_rows: MakeRows, *, ahead: bool
    ) -> None:
        """sizes: bytes of a row, by kind. counts: rows, by kind. ahead: allocation takes long, so a thread does it from
        the start."""
        self._shelves = {kind: _Shelf(sizes[kind], counts[kind], make_rows) for kind in sizes}
        if ahead:
            threading.Thread(target=self._allocate, name="tinyvllm-host-tier", daemon=True).start()
        else:
            for shelf in self._shelves.values():
                shelf.allocates = True

    def find(self, key: Key, tokens: bytes) -> Entry | None:
        """The copy of a block with these tokens, which is complete; None if there is none."""
        entry = self._shelves[key.kind].entries.get(key.block_hash)
        return entry if entry is not None and entry.is_ready and entry.tokens == tokens else None

    def entry(self, key: Key) -> Entry | None:
        """The entry of a key, complete or on its way."""
        return self._shelves[key.kind].entries.get(key.block_hash)

    def touch(self, key: Key) -> bool:
        """Keep an entry longer than all others. False if there is none."""
        entries = self._shelves[key.kind].entries
        if key.block_hash not in entries:
            return False
        entries.move_to_end(key.block_hash)
        return True

    def reserve(self, key: Key, tokens: bytes) -> Entry | None:
        """A new entry to be filled, with one user. None if there is one, or no row is free."""
        shelf = self._shelves[key.kind]
        place = None if key.block_hash in shelf.entries else shelf.take_row()
        if place is None:
            return None
        entry = shelf.entries[key.block_hash] = Entry(key, tokens, *place, users=1)
        return entry

    def borrow(self, key: Key, tokens: bytes) -> Entry | None:
        """A row that is not found by its key, with one user, for a copy that passes through to disk."""
        place = self._shelves[key.kind].take_row()
        return None if place is None else Entry(key, tokens, *place, users=1)

    def release(self, entry: Entry) -> None:
        """One user less. A row that is not found by its key becomes free with its last user."""
        entry.users -= 1
        shelf = self._shelves[entry.key.kind]
        if not entry.users and shelf.entries.get(entry.key.block_hash) is not entry:
            shelf.free.append((entry.rows, entry.row))

    def drop(self, key: Key) -> None:
        """Forget an entry. Its row is free once it has no users."""
        self._shelves[key.kind].drop(key.block_hash)

    def clear(self) -> None:
        for shelf in self._shelves.values():
            for block_hash in list(shelf.entries):
                shelf.drop(block_hash)

    @property
    def used_bytes(self) -> int:
        """Of the entries."""
        return sum(len(shelf.entries) * shelf.size for shelf in self._shelves.values())

    @property
    def max_bytes(self) -> int:
        return sum(shelf.max_rows * shelf.size for shelf in self._shelves.values())

    def num_rows_of(self, kind: int) -> int:
        """The most rows of a kind."""
        return self._shelves[kind].max_rows

    @property
    def num_evicted(self) -> int:
        return sum(shelf.num_evicted for shelf in self._shelves.values())

    def audit(self) -> None:
        """Check that each row is in one place. For tests: rows in transit to disk are in none."""
        for shelf in self._shelves.values():
            places = [(id(rows), row) for rows, row in shelf.free]
            places += [(id(entry.rows), entry.row) for entry in shelf.entries.values()]
            assert len(set(places)) == len(places) <= shelf.num_rows <= shelf.max_rows

    def _allocate(self) -> None:
        """The thread's main function: all rows, of each kind in turn."""
        while any([shelf.allocate() for shelf in self._shelves.values()]):
            pass


class _Shelf:
    """The rows of one kind."""

    def __init__(self, size: int, max_rows: int, make_rows: MakeRows) -> None:
        self.size, self.max_rows, self.num_rows = size, max_rows, 0
        self.allocates = False  # when a row is needed, rather than ahead
        self.free: deque[tuple[Rows, int]] = deque()  # the allocating thread appends to it
        self.entries: OrderedDict[bytes, Entry] = OrderedDict()  # by hash, the next to give way first
        self.num_evicted = 0
        self._make_rows = make_rows

    def take_row(self) -> tuple[Rows, int] | None:
        if not self.free and self.allocates:
            self.allocate()
        if not self.free:
            self._evict()
        return self.free.popleft() if self.free else None

    def drop(self, block_hash: bytes) -> None:
        entry = self.entries.pop(block_hash, None)
        if entry is not None and not entry.users:
            self.free.append((entry.rows, entry.row))

    def allocate(self) -> bool:
        """Allocate more rows. False if there are enough, or memory is exhausted."""
        count = min(self.max_rows - self.num_rows, max(1, SLAB_BYTES // self.size))
        if count < 1:
            return False
        try:
            reach("tier.allocate")
            rows = self._make_rows(count, self.size)
        except (MemoryError, OSError, RuntimeError, TinyvllmError) as error:
            logger.warning(
                "host memory for KV blocks ends at %.1f GiB, not %.1f: %s",
                self.num_rows * self.size / 2**30,
                self.max_rows * self.size / 2**30,
                error or type(error).__name__,
            )
            self.max_rows = self.num_rows
            return False
        self.num_rows += count
        self.free.extend((rows, row) for row in range(count))
        return True

    def _evict(self) -> None:
        """Free the row of the least recently used entry without users."""
        for number, (block_hash, entry) in enumerate(self.entries.items()):
            if not entry.users:
                self.num_evicted += 1
                self.drop(block_hash)
                return
            if number == MAX_SEARCHED:
                return


def divide_rows(max_bytes: int, sizes: Mapping[int, int], weights: Mapping[int, int]) -> dict[int, int]:
    """Rows of each kind in `max_bytes`. weights: rows of each kind that a long sequence needs. At least one of each."""
    total = sum(sizes[kind] * weights[kind] for kind in sizes)
    return {kind: max(1, max_bytes * weights[kind] // total) for kind in sizes}
