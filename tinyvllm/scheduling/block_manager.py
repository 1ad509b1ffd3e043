"""The KV pool's blocks: which are free, which requests hold the others, and which can be found by prefix.

A block is `block_size` consecutive tokens of one sequence. Its life cycle: free -> held and written by one request ->
sealed (full, never written again, possibly shared) -> free, but still cached -> allocated again. Block 0 is a dummy
that the padded rows of a graph may write; it is never allocated.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter, OrderedDict
from collections.abc import Sequence

from tinyvllm.errors import CapacityError, InvariantError
from tinyvllm.scheduling.request import Request


def pack_tokens(tokens: Sequence[int]) -> bytes:
    """Token ids as int32."""
    return array("i", tokens).tobytes()


def hash_block(parent: bytes, tokens: bytes) -> bytes:
    """Hash of a full block and everything before it: `parent` is the hash of the previous block, or b""."""
    return hashlib.blake2b(parent + tokens, digest_size=16).digest()


def hash_blocks(tokens: Sequence[int], block_size: int) -> list[bytes]:
    """Hashes of all full blocks of a sequence, in order. 2 us a block."""
    hashes = [b""]
    for end in range(block_size, len(tokens) + 1, block_size):
        hashes.append(hash_block(hashes[-1], pack_tokens(tokens[end - block_size : end])))
    return hashes[1:]


class BlockManager:
    """Owns the pool's free list, reference counts and prefix cache; fills and empties `request.block_ids`.

    A block in the free list keeps its content until it is allocated again, so a prefix can be found even after all its
    holders have finished. Blocks without a cached prefix are allocated first, then the least recently used.
    """

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True) -> None:
        if num_blocks < 2:
            raise CapacityError(f"the KV pool has {num_blocks} blocks: it needs 2, because block 0 is a dummy")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, num_blocks))  # next to allocate first
        self._ref_counts = [0] * num_blocks
        self._hashes = [b""] * num_blocks  # b"": not sealed
        self._tokens = [b""] * num_blocks  # of sealed blocks, int32: objects that the garbage collector need not visit
        self._findable: dict[bytes, int] = {}  # hash -> the one block found by it
        self._holders: set[Request] = set()
        self._changes: dict[bytes, bool] | None = None  # hash -> whether it can be found now

    @property
    def num_free(self) -> int:
        return len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """Number of blocks for `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def match_prefix(self, request: Request) -> int:
        """Give a request without blocks the longest cached prefix of its tokens; return the prefix's number of tokens.

        At least one token is left to compute. Only whole blocks are shared, so a request writes to its own blocks only:
        if all its blocks are cached, the last one is recomputed instead of shared.
        """
        if not self.enable_prefix_caching:
            return 0
        for index in range((request.num_tokens - 1) // self.block_size):
            block_id = self._find(request, index)
            if block_id is None:
                break
            self._take(block_id)
            request.block_ids.append(block_id)
        if request.block_ids:
            self._holders.add(request)
        request.num_sealed = len(request.block_ids)
        return len(request.block_ids) * self.block_size

    def grow(self, request: Request, num_tokens: int) -> bool:
        """Allocate blocks for a request's first `num_tokens` tokens. False, changing nothing, if too few are free."""
        num_missing = self.blocks_for(num_tokens) - len(request.block_ids)
        if num_missing <= 0:
            return True
        if num_missing > len(self._free):
            return False
        for _ in range(num_missing):
            block_id = next(iter(self._free))
            self._take(block_id)
            self._hide(block_id)
            self._hashes[block_id] = b""
            self._tokens[block_id] = b""
            request.block_ids.append(block_id)
        self._holders.add(request)
        return True

    def seal(self, request: Request) -> None:
        """Cache the blocks that the request has filled since the last call. O(1) if there are none."""
        if not self.enable_prefix_caching:
            return
        num_full = request.num_computed // self.block_size
        for index in range(request.num_sealed, num_full):
            block_id = request.block_ids[index]
            block_hash = self._hash(request, index)
            self._hashes[block_id] = block_hash
            self._tokens[block_id] = self._block_tokens(request, index)
            # Two requests may compute the same prefix in one step; the block that is sealed first is the one cached.
            if self._findable.setdefault(block_hash, block_id) == block_id and self._changes is not None:
                self._changes[block_hash] = True
        request.num_sealed = num_full

    def free(self, request: Request, keep: bool = True) -> None:
        """Free all blocks of a request. keep=False: their content is invalid, so drop it from the prefix cache.

        The tail is freed first, and so is reused first: a continuation is useless without the head of its prefix.
        """
        block_ids, request.block_ids, request.num_sealed = request.block_ids, [], 0
        for block_id in reversed(block_ids):
            if self._ref_counts[block_id] < 1:
                raise InvariantError(f"request {request.request_id} frees block {block_id}, which has no holder")
            if not keep:
                self._hide(block_id)
            self._ref_counts[block_id] -= 1
            if self._ref_counts[block_id] == 0:
                self._free[block_id] = None
                if not self._is_findable(block_id):
                    self._free.move_to_end(block_id, last=False)
        self._holders.discard(request)

    def take_changes(self) -> tuple[list[bytes], list[bytes]]:
        """Hashes of the blocks that have become findable since the last call, and of those that no longer are.

        The first call starts the record, with all that can be found. Whoever makes it goes on to call it every step.
        """
        changes = dict.fromkeys(self._findable, True) if self._changes is None else self._changes
        self._changes = {}
        stored = [block_hash for block_hash, is_findable in changes.items() if is_findable]
        return stored, [block_hash for block_hash, is_findable in changes.items() if not is_findable]

    def cached_hashes(self) -> list[bytes]:
        """Hashes of all blocks that can be found by prefix."""
        return list(self._findable)

    def states(self) -> bytes:
        """One letter per block, except the dummy: `h`eld by one request, `s`hared, free but `c`ached, or free: `.`"""
        letters = bytearray(b"." * self.num_blocks)
        for block_id in self._findable.values():
            letters[block_id] = ord("c")
        for request in self._holders:
            for block_id in request.block_ids:
                letters[block_id] = ord("h") if self._ref_counts[block_id] == 1 else ord("s")
        return bytes(letters[1:])

    def audit(self) -> None:
        """Check every invariant of the pool, in time proportional to its size. Raises InvariantError."""
        self._audit_counts()
        for request in self._holders:
            self._audit_table(request)
        for block_hash, block_id in self._findable.items():
            if self._hashes[block_id] != block_hash:
                raise InvariantError(f"block {block_id} is found by hash {block_hash.hex()} but sealed with another")

    def _take(self, block_id: int) -> None:
        if self._ref_counts[block_id] == 0:
            del self._free[block_id]
        self._ref_counts[block_id] += 1

    def _hide(self, block_id: int) -> None:
        """Remove the block from the prefix cache; its holders keep it."""
        if self._is_findable(block_id):
            del self._findable[self._hashes[block_id]]
            if self._changes is not None:
                self._changes[self._hashes[block_id]] = False

    def _is_findable(self, block_id: int) -> bool:
        return self._findable.get(self._hashes[block_id]) == block_id

    def _find(self, request: Request, index: int) -> int | None:
        """The cached block with the same tokens and prefix as the request's block `index`, if there is one."""
        block_id = self._findable.get(self._hash(request, index))
        if block_id is None or self._tokens[block_id] != self._block_tokens(request, index):
            return None  # unknown, or other tokens with the same hash
        return block_id

    def _hash(self, request: Request, index: int) -> bytes:
        """Hash of the request's full block `index`. Computed once: `request.block_hashes` survives preemption."""
        hashes = request.block_hashes
        while len(hashes) <= index:
            hashes.append(hash_block(hashes[-1] if hashes else b"", self._block_tokens(request, len(hashes))))
        return hashes[index]

    def _block_tokens(self, request: Request, index: int) -> bytes:
        return pack_tokens(request.tokens(index * self.block_size, (index + 1) * self.block_size))

    def _audit_counts(self) -> None:
        tables = Counter(block_id for request in self._holders for block_id in request.block_ids)
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
        if 0 in self._free or tables[0]:
            raise InvariantError(f"block 0, the dummy, was handed out ({tables[0]} times) or is in the free list")

    def _audit_table(self, request: Request) -> None:
        """Check that shared blocks are sealed, and that sealed blocks are full and hold the right tokens."""
        name, num_full = request.request_id, request.num_computed // self.block_size
        if len(set(request.block_ids)) != len(request.block_ids):
            raise InvariantError(f"the table of request {name} has a block twice: {request.block_ids}")
        if request.num_computed > len(request.block_ids) * self.block_size:
            raise InvariantError(
                f"request {name} has computed {request.num_computed} tokens, but holds {len(request.block_ids)} blocks "
                f"of {self.block_size}"
            )
        for index, block_id in enumerate(request.block_ids):
            is_sealed = self._hashes[block_id] != b""
            if self._ref_counts[block_id] > 1 and not is_sealed:
                raise InvariantError(f"block {block_id} of request {name} is shared, but not sealed")
            if is_sealed and index >= num_full:
                raise InvariantError(
                    f"block {block_id} of request {name} is sealed, but not full: its index is {index} and "
                    f"{request.num_computed} tokens are computed"
                )
            if is_sealed and self._tokens[block_id] != self._block_tokens(request, index):
                raise InvariantError(f"block {block_id} of request {name} is sealed with other tokens")
