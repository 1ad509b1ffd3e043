"""The blocks of one group of layers: which are free, how often the others are referenced, what the sealed ones hold."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable

from tinyvllm.config import BlockGroup
from tinyvllm.errors import CapacityError, InvariantError
from tinyvllm.faults import reach


class GroupPool:
    """Owns one group's free list, reference counts and prefix cache.

    A block in the free list keeps its content until it is allocated again, so it can be found even after all its
    holders have finished. Blocks that cannot be found are allocated first, then the least recently used.
    """

    def __init__(self, group: BlockGroup, block_size: int, number: int = 0) -> None:
        """`number`: the group's."""
        if group.num_blocks < 2:
            raise CapacityError(f"the KV pool has {group.num_blocks} blocks: it needs 2, because block 0 is a dummy")
        self.number, self.num_blocks, self.window = number, group.num_blocks, group.window
        self._block_size = block_size
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, group.num_blocks))  # next to allocate first
        self._ref_counts = [0] * group.num_blocks
        self._hashes = [b""] * group.num_blocks  # b"": not sealed
        self._tokens = [b""] * group.num_blocks  # of sealed blocks, int32: objects that the collector need not visit
        self._findable: dict[bytes, int] = {}  # hash -> the one block found by it
        self._changes: dict[bytes, bool] | None = None  # hash -> whether it can be found now
        self.on_hide: Callable[[bytes], None] | None = None  # called with the hash of a block that is found no more
        # called with the block, hash and tokens of one that can be found and is about to be reallocated
        self.on_evict: Callable[[int, bytes, bytes], None] | None = None

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def window_blocks(self) -> int:
        """The number of full blocks that the first token after them attends to; 0 without a window."""
        return 0 if self.window is None else -(-(self.window - 1) // self._block_size)

    def first_needed(self, position: int) -> int:
        """The index of the first block that the token at `position`, and those after it, attend to."""
        return 0 if self.window is None else max(0, position - (self.window - 1)) // self._block_size

    def allocate(self) -> int:
        """A block to write, taken from the free list, which must not be empty."""
        reach("pool.grow")
        block_id, _ = self._free.popitem(last=False)
        self._ref_counts[block_id] = 1
        if self._hashes[block_id]:
            if self.on_evict is not None and self._is_findable(block_id):
                self.on_evict(block_id, self._hashes[block_id], self._tokens[block_id])
            self.hide(block_id)
            self._hashes[block_id] = self._tokens[block_id] = b""
        return block_id

    def take(self, block_id: int) -> None:
        """Add a reference to a block, which may be free."""
        if self._ref_counts[block_id] == 0:
            del self._free[block_id]
        self._ref_counts[block_id] += 1

    def release(self, block_id: int, holder: str) -> None:
        """Drop a reference; without any, the block is free, and the last to be allocated if it can be found."""
        if self._ref_counts[block_id] < 1:
            raise InvariantError(f"request {holder} frees block {block_id}, which has no holder")
        self._ref_counts[block_id] -= 1
        if self._ref_counts[block_id] == 0:
            self._free[block_id] = None
            if not self._is_findable(block_id):
                self._free.move_to_end(block_id, last=False)

    def seal(self, block_id: int, block_hash: bytes, tokens: bytes) -> None:
        """Make a full block findable. Two requests may compute the same prefix in one step; the block that is sealed
        first is the one that is found. But if that is free, this one takes its place, since it will be kept longer."""
        self._hashes[block_id] = block_hash
        self._tokens[block_id] = tokens
        other = self._findable.setdefault(block_hash, block_id)
        if other == block_id:
            if self._changes is not None:
                self._changes[block_hash] = True
        elif self._ref_counts[other] == 0:
            self._findable[block_hash] = block_id
            self._free.move_to_end(other, last=False)

    def find(self, block_hash: bytes, tokens: bytes) -> int | None:
        """The cached block of this hash; None if it is unknown, or holds other tokens with the same hash."""
        block_id = self._findable.get(block_hash)
        return None if block_id is None or self._tokens[block_id] != tokens else block_id

    def take_if_found(self, block_hash: bytes, tokens: bytes) -> int:
        """Add a reference to the cached block of a hash; 0 if there is none."""
        block_id = self.find(block_hash, tokens)
        if block_id is None:
            return 0
        self.take(block_id)
        return block_id

    def hide(self, block_id: int) -> None:
        """Remove the block from the prefix cache; its holders keep it."""
        if self._is_findable(block_id):
            del self._findable[self._hashes[block_id]]
            if self._changes is not None:
                self._changes[self._hashes[block_id]] = False
            if self.on_hide is not None:
                self.on_hide(self._hashes[block_id])

    def hide_hash(self, block_hash: bytes) -> None:
        """Remove the block of this hash from the prefix cache, if there is one."""
        if block_hash in self._findable:
            self.hide(self._findable[block_hash])

    def take_changes(self) -> tuple[list[bytes], list[bytes]]:
        """As `BlockManager.take_changes`, of this group."""
        changes = dict.fromkeys(self._findable, True) if self._changes is None else self._changes
        self._changes = {}
        stored = [block_hash for block_hash, is_findable in changes.items() if is_findable]
        return stored, [block_hash for block_hash, is_findable in changes.items() if not is_findable]

    def cached_hashes(self) -> list[bytes]:
        """Hashes of all blocks that can be found."""
        return list(self._findable)

    def states(self, held: Iterable[int]) -> bytes:
        """One letter per block, as in `BlockManager.states`. `held`: the blocks in tables."""
        letters = bytearray(b"." * self.num_blocks)
        for block_id in self._findable.values():
            letters[block_id] = ord("c")
        for block_id in held:
            letters[block_id] = ord("h") if self._ref_counts[block_id] == 1 else ord("s")
        return bytes(letters[1:])

    def is_free(self, block_id: int) -> bool:
        return self._ref_counts[block_id] == 0

    def is_sealed_with(self, block_id: int, block_hash: bytes) -> bool:
        """Whether a block still holds what was sealed with this hash."""
        return self._hashes[block_id] == block_hash

    def is_found(self, block_id: int, block_hash: bytes) -> bool:
        """Whether this block is found by the hash."""
        return self._findable.get(block_hash) == block_id

    def is_shared(self, block_id: int) -> bool:
        return self._ref_counts[block_id] > 1

    def sealed_tokens(self, block_id: int) -> bytes | None:
        """The tokens of a sealed block; None if it is not sealed."""
        return self._tokens[block_id] if self._hashes[block_id] else None

    def audit(self, tables: Counter[int]) -> None:
        """Check the counts against `tables`: in how many tables each block is. Raises InvariantError."""
        for block_id, ref_count in enumerate(self._ref_counts):
            if ref_count != tables[block_id]:
                raise InvariantError(
                    f"block {block_id} has {ref_count} references, but is in {tables[block_id]} tables"
                )
            if block_id and (block_id in self._free) == (ref_count > 0):
                where = "in" if block_id in self._free else "missing from"
                raise InvariantError(f"block {block_id} has {ref_count} references and is {where} the free list")
        free, used, total = len(self._free), len(tables), self.num_blocks - 1
        if free + used != total:
            raise InvariantError(f"{free} free and {used} used blocks are not the pool's {total}")
        if 0 in self._free:
            raise InvariantError("block 0, the dummy, is in the free list")
        for block_hash, block_id in self._findable.items():
            if self._hashes[block_id] != block_hash:
                raise InvariantError(f"block {block_id} is found by hash {block_hash.hex()} but sealed with another")

    def _is_findable(self, block_id: int) -> bool:
        return self._findable.get(self._hashes[block_id]) == block_id
