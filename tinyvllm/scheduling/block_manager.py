"""The KV pool's blocks: which are free, who holds the others, and which of them hold a prefix that is known.

A block is `block_size` consecutive tokens of one sequence. Its life: free -> held and written by one request ->
sealed, that is full and never written again, and perhaps shared -> free, but still findable -> handed out anew.
Block 0 is a dummy that padded rows of a graph may write; it is never handed out.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter, OrderedDict

from tinyvllm.errors import CapacityError, InvariantError
from tinyvllm.scheduling.request import Request


def hash_block(parent: bytes, tokens: list[int]) -> bytes:
    """Name a full block by its tokens and all before them: `parent` is the hash of the block before, or b""."""
    return hashlib.blake2b(parent + array("i", tokens).tobytes(), digest_size=16).digest()


class BlockManager:
    """Owns the pool's free list, reference counts and prefix cache; fills and empties `request.block_ids`.

    A block in the free list keeps its content until it is handed out again, so a prefix whose holders have all
    finished is still found. Blocks are handed out longest unused first, those without a findable prefix before all.
    """

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True) -> None:
        if num_blocks < 2:
            raise CapacityError(f"the KV pool has {num_blocks} blocks: it needs 2, because block 0 is a dummy")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, num_blocks))  # next to hand out first
        self._ref_counts = [0] * num_blocks
        self._hashes = [b""] * num_blocks  # b"": not sealed
        self._tokens: list[list[int]] = [[]] * num_blocks  # of sealed blocks
        self._findable: dict[bytes, int] = {}  # hash -> the one block that is found by it
        self._holders: set[Request] = set()

    @property
    def num_free(self) -> int:
        return len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that `num_tokens` tokens take."""
        return -(-num_tokens // self.block_size)

    def match_prefix(self, request: Request) -> int:
        """Give a request that holds nothing the longest known prefix of its tokens; return that prefix's tokens.

        At least one token is left to compute, and as only whole blocks are shared, all that the request will ever
        write lies in blocks of its own: when every block is known, the last is computed again rather than shared.
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
        return len(request.block_ids) * self.block_size

    def grow(self, request: Request, num_tokens: int) -> bool:
        """Give a request blocks for its first `num_tokens` tokens; False, and nothing changed, if too few are free."""
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
            self._tokens[block_id] = []
            request.block_ids.append(block_id)
        self._holders.add(request)
        return True

    def seal(self, request: Request) -> None:
        """Make the blocks that the request has filled since the last call findable. O(1) when there are none."""
        if not self.enable_prefix_caching:
            return
        num_full = request.num_computed // self.block_size
        num_sealed = num_full
        while num_sealed and not self._hashes[request.block_ids[num_sealed - 1]]:
            num_sealed -= 1
        for index in range(num_sealed, num_full):
            block_id = request.block_ids[index]
            block_hash = self._hash(request, index)
            self._hashes[block_id] = block_hash
            self._tokens[block_id] = self._block_tokens(request, index)
            # Two requests may compute one prefix in the same step; the block that is sealed first is the one found.
            self._findable.setdefault(block_hash, block_id)

    def free(self, request: Request, keep: bool = True) -> None:
        """Take all of the request's blocks back. keep=False: their content is suspect and must not be found again.

        Tail first: what continues a prefix is useless without its head, so it is the first to be reused.
        """
        block_ids, request.block_ids = request.block_ids, []
        for block_id in reversed(block_ids):
            if self._ref_counts[block_id] < 1:
                raise InvariantError(f"request {request.request_id} frees block {block_id}, which nobody holds")
            if not keep:
                self._hide(block_id)
            self._ref_counts[block_id] -= 1
            if self._ref_counts[block_id] == 0:
                self._free[block_id] = None
                if not self._is_findable(block_id):
                    self._free.move_to_end(block_id, last=False)
        self._holders.discard(request)

    def states(self) -> bytes:
        """One letter a block, without the dummy: `h`eld by one request, `s`hared, free and `c`ached, or free: `.`"""
        letters = bytearray(b"." * self.num_blocks)
        for block_id in self._findable.values():
            letters[block_id] = ord("c")
        for request in self._holders:
            for block_id in request.block_ids:
                letters[block_id] = ord("h") if self._ref_counts[block_id] == 1 else ord("s")
        return bytes(letters[1:])

    def audit(self) -> None:
        """Check every invariant of the pool, in time proportional to its size; InvariantError with the numbers."""
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
        """Make the block impossible to find; its holders keep it."""
        if self._is_findable(block_id):
            del self._findable[self._hashes[block_id]]

    def _is_findable(self, block_id: int) -> bool:
        return self._findable.get(self._hashes[block_id]) == block_id

    def _find(self, request: Request, index: int) -> int | None:
        """The known block that equals the request's block `index`, if there is one."""
        block_id = self._findable.get(self._hash(request, index))
        if block_id is None or self._tokens[block_id] != self._block_tokens(request, index):
            return None  # unknown, or another text with the same hash
        return block_id

    def _hash(self, request: Request, index: int) -> bytes:
        """Hash of the request's full block `index`. Computed once: `request.block_hashes` outlives a preemption."""
        hashes = request.block_hashes
        while len(hashes) <= index:
            hashes.append(hash_block(hashes[-1] if hashes else b"", self._block_tokens(request, len(hashes))))
        return hashes[index]

    def _block_tokens(self, request: Request, index: int) -> list[int]:
        return request.tokens(index * self.block_size, (index + 1) * self.block_size)

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
        """A block is shared only when sealed, and sealed only when it is full and holds the tokens it is known for."""
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
                    f"block {block_id} of request {name} is sealed, but would be written: its index is {index} and "
                    f"{request.num_computed} tokens are computed"
                )
            if is_sealed and self._tokens[block_id] != self._block_tokens(request, index):
                raise InvariantError(f"block {block_id} of request {name} is sealed with another text")
