"""What the pool keeps elsewhere when its blocks are reallocated: the interface of the tiers below it.

A tier holds copies of blocks, and of checkpoints of recurrent states, by the hash under which the pool finds them. The
scheduler decides what is copied and when, and knows numbers and bytes only; `execution/kv_tiers` does the copying.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

STATE = -1  # the kind of a checkpoint of recurrent states; other kinds are the numbers of the pool's groups

# Where a look-up searches: in the pool alone, also in the tier in host memory, also on disk
POOL, HOST, DISK = range(3)


@dataclass(frozen=True)
class Key:
    """Names a copy: of a group's block, or of a checkpoint, by the hash of the block that it ends with."""

    kind: int
    block_hash: bytes


# What tiers count, since start except for `held`
COUNTS = (
    "tier_queries",  # prompt tokens looked up that the pool did not have
    "tier_host_hits",  # tokens whose keys and values were copied from host memory
    "tier_disk_hits",  # and those that had come from disk
    "tier_load_bytes",  # copied from host memory to the device
    "tier_load_s",
    "tier_store_bytes",  # copied from the device to host memory
    "tier_store_s",
    "tier_read_bytes",  # from disk
    "tier_read_s",
    "tier_written_bytes",  # to disk
    "tier_skipped",  # blocks that were not kept, because memory or disk was busy
    "tier_declined",  # look-ups whose copies would have taken longer than computing
    "tier_failures",  # copies that failed, and files that could not be read or written
    "tier_host_held",  # bytes in host memory
    "tier_disk_held",  # bytes on disk, of all models that share the folder
)


class Fetch(Protocol):
    """Copies on their way from disk to host memory for one request, where they stay until `release`."""

    @property
    def is_done(self) -> bool:
        """Whether nothing more will arrive, or it has taken too long."""

    def release(self) -> None:
        """Let the copies give way to others. May be called before the fetch is done, and again."""


class PoolView(Protocol):
    """What tiers ask of the pool."""

    def is_sealed(self, key: Key, block_id: int) -> bool:
        """Whether a block, or a slot of states, still has what the key names."""

    def is_found(self, key: Key, block_id: int) -> bool:
        """Whether it is what is found by the key."""

    def forget(self, key: Key) -> None:
        """A block, or a checkpoint, does not have its content: nobody is to find it."""


class Tiers(Protocol):
    """The tiers of one pool. All methods are for the engine's thread, and none waits for a disk."""

    # -- for the pool --------------------------------------------------------------------------------------------------

    @property
    def has_disk(self) -> bool: ...

    def attach(self, pool: PoolView) -> None:
        """Called once, at the start."""

    def has(self, key: Key, tokens: bytes, depth: int = HOST) -> bool:
        """Whether there is a copy, of these tokens, in host memory; with `depth` DISK, or on disk."""

    def sealed(self, key: Key, block_id: int, tokens: bytes) -> None:
        """A block of the pool, or a slot of states, can be found from now on."""

    def evict(self, key: Key, block_id: int, tokens: bytes) -> None:
        """The block is about to be reallocated. What the next step overwrites is copied before that step."""

    def hold(self, keys: Sequence[Key]) -> None:
        """Keep copies that `has` has just found in host memory until `let_go`, whatever else falls out of the pool."""

    def let_go(self) -> None:
        """End what `hold` has begun, if anything."""

    def restore(self, key: Key, block_id: int) -> None:
        """Copy what `has` has just found in host memory to a block before the next step."""

    def pays(self, num_tokens: int, keys: Sequence[Key], depth: int) -> bool:
        """Whether copying `keys` from host memory, or from disk, takes less time than computing `num_tokens`."""

    def note_lookup(self, num_tokens: int) -> None:
        """A prompt was admitted of which the pool alone lacked this many tokens."""

    def fetch(self, keys: Sequence[tuple[Key, bytes]]) -> Fetch:
        """Begin to read copies, each with its tokens, from disk to host memory."""

    def poll(self, timeout_s: float = 0.0) -> None:
        """Take notice of transfers that have ended; if there are none yet, wait up to `timeout_s` for one from disk."""

    @property
    def has_backlog(self) -> bool:
        """Whether blocks wait until the disk has room for them: `flush` is to be called again soon."""

    def flush(self) -> None:
        """Begin what waits for the next step: no step comes soon."""

    # -- for the engine ------------------------------------------------------------------------------------------------

    def before_step(self) -> None:
        """Copy what the next step overwrites, and what it reads. Raises what the device raises if it cannot be given
        what it reads."""

    def launched(self) -> None:
        """A step was enqueued."""

    def collected(self, num_prompt_tokens: int = 0, seconds: float = 0.0) -> None:
        """The oldest step has ended. If it computed prompts: how many tokens, in which time."""

    def settled(self) -> None:
        """The device has run everything."""

    def counts(self) -> dict[str, float]:
        """COUNTS."""

    def drop(self, key: Key) -> None:
        """Forget a copy and delete it on disk: its content may be wrong."""

    def clear(self) -> None:
        """Forget every copy in host memory, and delete those on disk."""
