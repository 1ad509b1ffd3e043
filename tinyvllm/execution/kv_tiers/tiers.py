"""The tiers of one pool: decides which copies move between the pool, host memory and the disk, and when.

Host memory is filled when blocks fall out of the pool: before that, a copy would only take room from others. The disk
is filled when blocks are sealed, so that a restart finds what the pool had. What is to be copied is collected and moved
in few large transfers, before the next step is launched. Nothing here waits for the disk.
"""

from __future__ import annotations

import logging
import queue
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from tinyvllm.device.block_copies import BlockCopies, Transfer
from tinyvllm.execution.kv_tiers.disk_tier import DiskTier
from tinyvllm.execution.kv_tiers.host_tier import Entry, HostTier
from tinyvllm.execution.kv_tiers.rates import Rates
from tinyvllm.scheduling.tiers import DISK, HOST, Key, PoolView

logger = logging.getLogger(__name__)

FETCH_S = 10.0  # how long a request waits for the disk
CLOSE_S = 10.0  # how long the end of the server waits for the disk to take all blocks, and as long again to write them
CLOSE_POLL_S = 5e-3
WRITE_BATCH = 16  # sealed blocks that are worth a transfer of their own

Place = tuple[int, int]  # a kind, and a block or slot of it


@dataclass(frozen=True)
class _Out:
    """A block that is copied to host memory, to be found there or on its way to disk."""

    entry: Entry
    block_id: int
    is_for_disk: bool


@dataclass(frozen=True)
class _Sealed:
    """A block that the disk does not have."""

    key: Key
    tokens: bytes
    block_id: int


class DiskFetch:
    """As `scheduling.tiers.Fetch`."""

    def __init__(self, release: Callable[[Entry], None]) -> None:
        self.entries: list[Entry] = []
        self.num_open = 0
        self.num_bytes = 0
        self.start_s = time.monotonic()
        self._release = release

    @property
    def is_done(self) -> bool:
        return not self.num_open or time.monotonic() - self.start_s > FETCH_S

    def release(self) -> None:
        entries, self.entries = self.entries, []
        for entry in entries:
            self._release(entry)


class KvTiers:
    """As `scheduling.tiers.Tiers`. Owns the transfers."""

    def __init__(
        self,
        copies: Mapping[int, BlockCopies],
        sizes: Mapping[int, int],
        host: HostTier,
        disk: DiskTier | None,
        *,
        keeps_evicted: bool,
        wait: Callable[[], None],
    ) -> None:
        """copies, sizes: of each kind, what copies its blocks, and their bytes. keeps_evicted: host memory keeps blocks
        that fall out of the pool; else what comes from the disk passes through it. wait: for all steps in flight."""
        self.host, self.disk, self.rates = host, disk, Rates()
        self._pool: PoolView | None = None
        self._copies, self._sizes = copies, sizes
        self._keeps_evicted, self._wait = keeps_evicted, wait
        self._follows_steps = all(one.follows_steps for one in copies.values())
        self._outs: list[_Out] = []  # before the next step
        self._ins: dict[Place, Entry] = {}  # before the next step
        self._sealed: dict[Place, _Sealed] = {}  # for the disk, at leisure
        self._moving: deque[tuple[Transfer, Callable[[], None]]] = deque()
        self._arrived: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()  # from the disk's threads
        self._reading: dict[Key, list[DiskFetch]] = {}  # who waits for a file
        self._num_launched = self._num_collected = 0  # steps
        # blocks that a step in flight may still compute: the number of steps launched when they were sealed
        self._fresh: dict[Place, int] = {}
        self._held: list[Entry] = []  # while a prefix is being taken
        self._has_warned = False
        self._counts: dict[str, float] = dict.fromkeys(
            ("queries", "host_hits", "disk_hits", "load_bytes", "store_bytes", "read_bytes", "written_bytes"), 0
        )
        self._counts |= dict.fromkeys(("load_s", "store_s", "read_s"), 0.0)
        self._counts |= dict.fromkeys(("skipped", "declined", "failures"), 0)

    # -- for the pool --------------------------------------------------------------------------------------------------

    @property
    def has_disk(self) -> bool:
        return self.disk is not None and self.disk.is_usable

    def attach(self, pool: PoolView) -> None:
        self._pool = pool

    def has(self, key: Key, tokens: bytes, depth: int = HOST) -> bool:
        if self.host.find(key, tokens) is not None:
            return True
        return depth == DISK and self.disk is not None and self.disk.has(key)

    def sealed(self, key: Key, block_id: int, tokens: bytes) -> None:
        place = key.kind, block_id
        if not self._follows_steps:
            self._fresh.pop(place, None)
            self._fresh[place] = self._num_launched
        if self.disk is not None and self.disk.is_usable and not self.disk.has(key):
            self._sealed[place] = _Sealed(key, tokens, block_id)

    def evict(self, key: Key, block_id: int, tokens: bytes) -> None:
        place = key.kind, block_id
        is_for_disk = self._sealed.pop(place, None) is not None and self._can_write(key)
        entry = self._ins.pop(place, None)
        if entry is not None:  # it has not even been copied to the block
            self.host.release(entry)
            return
        if self._keeps_evicted and not self.host.touch(key):
            entry = self.host.reserve(key, tokens)
            self._counts["skipped"] += entry is None
        if entry is None and is_for_disk:
            entry = self.host.borrow(key, tokens)
        if entry is not None:
            self._outs.append(_Out(entry, block_id, is_for_disk))

    def hold(self, keys: Sequence[Key]) -> None:
        for key in keys:
            entry = self.host.entry(key)
            if entry is not None:
                entry.users += 1
                self._held.append(entry)

    def let_go(self) -> None:
        held, self._held = self._held, []
        for entry in held:
            self.host.release(entry)

    def restore(self, key: Key, block_id: int) -> None:
        entry = self.host.entry(key)
        assert entry is not None and entry.is_ready, f"{key} is not in host memory"
        entry.users += 1
        self._ins[key.kind, block_id] = entry
        if key.kind == 0:
            self._counts["disk_hits" if entry.is_from_disk else "host_hits"] += len(entry.tokens) // 4
        entry.is_from_disk = False  # next time it is found here

    def pays(self, num_tokens: int, keys: Sequence[Key], depth: int) -> bool:
        pays = self.rates.pays(num_tokens, sum(self._sizes[key.kind] for key in keys), depth)
        self._counts["declined"] += not pays
        return pays

    def note_lookup(self, num_tokens: int) -> None:
        self._counts["queries"] += num_tokens

    def fetch(self, keys: Sequence[tuple[Key, bytes]]) -> DiskFetch:
        assert self.disk is not None
        fetch = DiskFetch(self.host.release)
        for key, tokens in keys:
            waiting = self._reading.get(key)
            entry = self.host.reserve(key, tokens) if waiting is None else self.host.entry(key)
            if entry is None:  # memory is short: the beginning of the prefix is of use, too
                break
            entry.users += 1
            fetch.entries.append(entry)
            fetch.num_open += 1
            fetch.num_bytes += entry.data.nbytes
            if waiting is not None:
                waiting.append(fetch)
                continue
            self._reading[key] = [fetch]
            self.disk.read(key, tokens, entry.data, self._when_read(entry))
        return fetch

    def poll(self, timeout_s: float = 0.0) -> None:
        while self._moving and self._moving[0][0].is_done():
            _, follow = self._moving.popleft()
            follow()
        while True:
            try:
                arrive = self._arrived.get(timeout=timeout_s) if timeout_s else self._arrived.get_nowait()
            except queue.Empty:
                return
            timeout_s = 0.0
            arrive()

    @property
    def has_backlog(self) -> bool:
        return bool(self._sealed) and self.disk is not None and not self.disk.is_paused

    def flush(self) -> None:
        self.poll()
        self._take_sealed(at_least=1)
        self._copy_out()
        self.poll()

    def drop(self, key: Key) -> None:
        self.host.drop(key)
        if self.disk is not None:
            self.disk.drop(key)

    def clear(self) -> None:
        self.host.clear()
        self._sealed.clear()
        outs, self._outs = self._outs, []
        for out in outs:
            self._abandon(out.entry)
        if self.disk is not None:
            self.disk.clear()

    def counts(self) -> dict[str, float]:
        held = 0 if self.disk is None else self.disk.used_bytes
        failures = self._counts["failures"] + (0 if self.disk is None else self.disk.num_failed)
        counts = self._counts | {"host_held": self.host.used_bytes, "disk_held": held, "failures": failures}
        return {f"tier_{name}": value for name, value in counts.items()}

    # -- for the engine ------------------------------------------------------------------------------------------------

    def before_step(self) -> None:
        self.poll()
        self._take_sealed(at_least=WRITE_BATCH)
        self._copy_out()
        if self._ins:
            self._copy_in()
        self.poll()

    def launched(self) -> None:
        self._num_launched += 1

    def collected(self, num_prompt_tokens: int = 0, seconds: float = 0.0) -> None:
        self._num_collected += 1
        self._forget_fresh()
        if num_prompt_tokens:
            self.rates.note_computed(num_prompt_tokens, seconds)

    def settled(self) -> None:
        self._num_collected = self._num_launched
        self._forget_fresh()

    def close(self) -> None:
        """Write what is to be kept on disk, and stop."""
        if self.disk is None:
            return
        self._outs.clear()
        end_s = time.monotonic() + CLOSE_S
        while self.has_backlog and time.monotonic() < end_s:
            self.flush()
            self.poll(CLOSE_POLL_S)
        self.disk.close()

    # -- its parts -----------------------------------------------------------------------------------------------------

    def _can_write(self, key: Key) -> bool:
        can = self.disk is not None and self.disk.can_write(self._sizes[key.kind])
        self._counts["skipped"] += not can
        return can

    def _is_sealed(self, key: Key, block_id: int) -> bool:
        return self._pool is None or self._pool.is_sealed(key, block_id)

    def _forget_fresh(self) -> None:
        while self._fresh:
            place = next(iter(self._fresh))
            if self._fresh[place] > self._num_collected:
                return
            del self._fresh[place]

    def _take_sealed(self, at_least: int) -> None:
        """Have sealed blocks copied for the disk, if there are enough. Left for later are those that a step in flight
        may still compute, and those that the disk, or host memory, has no room for yet."""
        if len(self._sealed) < at_least:
            return
        for place, sealed in list(self._sealed.items()):
            if place in self._fresh and self._num_collected < self._num_launched:
                continue
            if self._pool is not None and not self._pool.is_found(sealed.key, sealed.block_id):
                del self._sealed[place]
                continue
            if self.disk is None or not self.disk.can_write(self._sizes[sealed.key.kind]):
                return
            entry = self.host.borrow(sealed.key, sealed.tokens)
            if entry is None:
                return
            del self._sealed[place]
            self._outs.append(_Out(entry, sealed.block_id, is_for_disk=True))

    def _settle_for(self, places: Sequence[Place], *, is_written: bool) -> None:
        """Wait for the steps in flight where the copy would not follow them: they may compute what is read, and read
        what is written."""
        if self._follows_steps or self._num_collected == self._num_launched:
            return
        if is_written or any(place in self._fresh for place in places):
            self._wait()

    def _copy_out(self) -> None:
        """Start the copies to host memory. One that fails is not kept."""
        outs, self._outs = self._outs, []
        for kind in {out.entry.key.kind for out in outs}:
            mine = [out for out in outs if out.entry.key.kind == kind]
            try:
                self._settle_for([(kind, out.block_id) for out in mine], is_written=False)
                transfer = self._copies[kind].copy_out([out.entry.copy(out.block_id) for out in mine])
            except (OSError, MemoryError, RuntimeError) as error:
                self._warn("KV blocks cannot be copied to host memory", error)
                for out in mine:
                    self._abandon(out.entry)
                continue
            self._moving.append((transfer, partial(self._stored, transfer, mine)))
            for out in mine:
                if out.is_for_disk and self.disk is not None:
                    out.entry.users += 1
                    done = self._when_written(out.entry)
                    self.disk.write(out.entry.key, out.entry.tokens, out.entry.data, done, transfer.wait)

    def _stored(self, transfer: Transfer, outs: Sequence[_Out]) -> None:
        for out in outs:
            out.entry.is_ready = True
            self._counts["store_bytes"] += out.entry.data.nbytes
            self.host.release(out.entry)
        self._counts["store_s"] += transfer.seconds

    def _copy_in(self) -> None:
        """Start the copies to the device, of blocks that still are what they were taken for."""
        ins, self._ins = self._ins, {}
        for entry in reversed(ins.values()):  # a prefix's end gives way before its beginning
            self.host.touch(entry.key)
        for kind in {kind for kind, _ in ins}:
            mine = {block_id: entry for (of, block_id), entry in ins.items() if of == kind}
            good = {block_id: entry for block_id, entry in mine.items() if self._is_sealed(entry.key, block_id)}
            try:
                self._settle_for([], is_written=True)
                transfer = self._copies[kind].copy_in([entry.copy(block_id) for block_id, entry in good.items()])
            except BaseException:
                self._counts["failures"] += 1
                for entry in ins.values():
                    if self._pool is not None:
                        self._pool.forget(entry.key)
                    self.host.release(entry)
                raise  # the requests of the step end
            entries = list(mine.values())
            self._moving.append((transfer, partial(self._loaded, transfer, entries)))

    def _loaded(self, transfer: Transfer, entries: Sequence[Entry]) -> None:
        num_bytes = sum(entry.data.nbytes for entry in entries)
        self._counts["load_bytes"] += num_bytes
        self._counts["load_s"] += transfer.seconds
        self.rates.note_loaded(num_bytes, transfer.seconds)
        for entry in entries:
            self.host.release(entry)

    def _when_read(self, entry: Entry) -> Callable[[bool], None]:
        return lambda is_read: self._arrived.put(lambda: self._read(entry, is_read))

    def _read(self, entry: Entry, is_read: bool) -> None:
        """A file has been read, or cannot be."""
        entry.is_ready = entry.is_from_disk = is_read
        if is_read:
            self._counts["read_bytes"] += entry.data.nbytes
        for fetch in self._reading.pop(entry.key, ()):
            fetch.num_open -= 1
            if not fetch.num_open:
                seconds = time.monotonic() - fetch.start_s
                self._counts["read_s"] += seconds
                self.rates.note_read(fetch.num_bytes, seconds)
        (self.host.release if is_read else self._abandon)(entry)

    def _when_written(self, entry: Entry) -> Callable[[bool], None]:
        return lambda is_written: self._arrived.put(lambda: self._written(entry, is_written))

    def _written(self, entry: Entry, is_written: bool) -> None:
        self._counts["written_bytes"] += entry.data.nbytes if is_written else 0
        self.host.release(entry)

    def _abandon(self, entry: Entry) -> None:
        """Forget an entry that does not get its content."""
        if self.host.entry(entry.key) is entry:
            self.host.drop(entry.key)
        self.host.release(entry)

    def _warn(self, message: str, error: BaseException) -> None:
        """Count a failure, and log the first."""
        self._counts["failures"] += 1
        if not self._has_warned:
            logger.warning("%s: %s", message, error or type(error).__name__)
        self._has_warned = True
