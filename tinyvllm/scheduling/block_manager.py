"""The KV pool's blocks: which requests hold them, and which can be found by prefix.

A block is `block_size` consecutive tokens of one sequence. Its life cycle: free -> held and written by one request ->
sealed (full, never written again, possibly shared) -> free, but still cached -> allocated again. Block 0 is a dummy
that the padded rows of a graph may write; it is never allocated.

Each group of layers (`ops.backend.pool_groups`) has blocks of its own, and each request a table for each group. In a
group with a window, a request gives back the blocks that no later token attends to, so it holds about a window; the
place of such a block in the table is 0. It stays cached, like every free block.

If the model has recurrent layers, a request also owns a slot of the `StatePool` while it has blocks, and a prefix is
found only if there is a checkpoint of the state at its end.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from functools import partial

from tinyvllm.config import BlockGroup, Capacity
from tinyvllm.errors import InvariantError
from tinyvllm.faults import reach
from tinyvllm.scheduling.block_hashes import hash_block, pack_tokens
from tinyvllm.scheduling.group_pool import GroupPool
from tinyvllm.scheduling.request import Request
from tinyvllm.scheduling.state_pool import MIN_SHARED_BLOCKS, SequenceState, StatePool
from tinyvllm.scheduling.tiers import DISK, HOST, POOL, STATE, Fetch, Key, Tiers


def fixed_tables(
    groups: Sequence[BlockGroup], lengths: Sequence[int], rng: random.Random | None = None
) -> list[list[list[int]]]:
    """For measurements without a scheduler: the tables (`Request.tables`) of sequences of `lengths` blocks, in a pool
    that holds nothing else and in an order drawn from `rng`. In a group with too few blocks, which may suffice for
    windows, each sequence goes round in its share of them."""
    tables: list[list[list[int]]] = [[] for _ in lengths]
    for group in groups:
        usable, total = group.num_blocks - 1, sum(lengths)
        ids = list(range(1, 1 + min(total, usable)))
        if rng is not None:
            ids = rng.sample(ids, len(ids))
        share = max(1, usable // len(lengths))
        for index, length in enumerate(lengths):
            start, period = (sum(lengths[:index]), length) if total <= usable else (index * share, share)
            tables[index].append([ids[(start + place % period) % len(ids)] for place in range(length)])
    return tables


def fixed_states(capacity: Capacity, count: int) -> list[SequenceState | None]:
    """For measurements without a scheduler: the states of `count` sequences in a pool that holds nothing else. If there
    are too few slots, sequences share them."""
    usable = capacity.num_state_slots - 1
    if usable < 1:
        return [None] * count
    return [SequenceState(slot=1 + index % usable, read_slot=1 + index % usable) for index in range(count)]


class BlockManager:
    """Fills and empties `request.tables` from the pools of all groups.

    The first group is the one that keeps the most tokens: all of them, unless every layer has a window. What is said
    about the prefix cache to routers is this group's.
    """

    def __init__(
        self,
        groups: Sequence[BlockGroup],
        block_size: int,
        enable_prefix_caching: bool = True,
        state_pool: StatePool | None = None,
    ) -> None:
        """`state_pool`: None if the model has no recurrent layers."""
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.pools = [GroupPool(group, block_size, number) for number, group in enumerate(groups)]
        self.state_pool = state_pool
        if state_pool is not None:
            self.pools[0].on_hide = state_pool.drop
        self._windowed = [(index, pool) for index, pool in enumerate(self.pools) if pool.window is not None]
        self._holders: set[Request] = set()
        self._tiers: Tiers | None = None
        self._num_restored = 0

    @classmethod
    def of(cls, capacity: Capacity, enable_prefix_caching: bool = True) -> BlockManager:
        """The pools of a capacity, all free."""
        states = None
        if capacity.num_state_slots:
            states = StatePool(capacity.num_state_slots, capacity.block_size, capacity.checkpoint_interval)
        return cls(capacity.groups, capacity.block_size, enable_prefix_caching, states)

    @property
    def holders(self) -> set[Request]:
        """The requests that hold blocks."""
        return self._holders

    @property
    def has_windows(self) -> bool:
        """Whether requests give blocks back."""
        return bool(self._windowed)

    @property
    def least_free(self) -> int:
        """The number of free blocks in the group that has the fewest."""
        return min(pool.num_free for pool in self.pools)

    @property
    def num_free(self) -> int:
        """The first group's number of free blocks, or if a larger share of another group's blocks is held, that share
        of the first group's number of blocks: the group that fills up first is the one that limits the engine."""
        first, *others = self.pools
        shares = [(first.num_blocks - 1) * pool.num_free // (pool.num_blocks - 1) for pool in others]
        return min([first.num_free, *shares])

    @property
    def tiers(self) -> Tiers | None:
        """Where copies of blocks are kept that fall out of the pool."""
        return self._tiers

    def attach(self, tiers: Tiers) -> None:
        """Keep copies of what falls out of the pool. Call it before the first request."""
        self._tiers = tiers
        tiers.attach(self)
        for pool in self.pools:
            pool.on_evict = partial(self._evict, pool.number)
        if self.state_pool is not None:
            self.state_pool.on_seal = lambda slot, block_hash: tiers.sealed(Key(STATE, block_hash), slot, b"")
            self.state_pool.on_evict = lambda slot, block_hash: tiers.evict(Key(STATE, block_hash), slot, b"")

    def is_sealed(self, key: Key, block_id: int) -> bool:
        """As PoolView."""
        if key.kind == STATE:
            return self.state_pool is not None and self.state_pool.is_sealed_with(block_id, key.block_hash)
        return self.pools[key.kind].is_sealed_with(block_id, key.block_hash)

    def is_found(self, key: Key, block_id: int) -> bool:
        """As PoolView."""
        if key.kind == STATE:
            return self.state_pool is not None and self.state_pool.slot_of(key.block_hash) == block_id
        return self.pools[key.kind].is_found(block_id, key.block_hash)

    def forget(self, key: Key) -> None:
        """As PoolView."""
        if key.kind == STATE and self.state_pool is not None:
            self.state_pool.drop(key.block_hash)
        elif key.kind != STATE:
            self.pools[key.kind].hide_hash(key.block_hash)

    def _evict(self, number: int, block_id: int, block_hash: bytes, tokens: bytes) -> None:
        """A block of a group is about to be reallocated, and with the first group's its checkpoint."""
        assert self._tiers is not None
        self._tiers.evict(Key(number, block_hash), block_id, tokens)
        if number == 0 and self.state_pool is not None:
            slot = self.state_pool.slot_of(block_hash)
            if slot is not None:
                self._tiers.evict(Key(STATE, block_hash), slot, b"")

    def blocks_for(self, num_tokens: int) -> int:
        """Number of blocks for `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def match_prefix(self, request: Request) -> int:
        """Give a request without blocks the longest cached prefix of its tokens; return the prefix's number of tokens.

        A group without a window must have every block of the prefix, one with a window those that the first token after
        the prefix attends to; and with recurrent layers there must be a checkpoint at its end. At least one token is
        left to compute. Only whole blocks are shared, so a request writes to its own blocks only: if all its blocks are
        cached, the last one is recomputed instead of shared.
        """
        if not self.enable_prefix_caching:
            return 0
        reach("pool.match")
        if self._tiers is None:
            return self._take_prefix(request, POOL)
        self._num_restored = 0
        try:
            return self._take_prefix(request, self._worthwhile_depth(request, self._tiers))
        finally:
            self._tiers.let_go()

    def _take_prefix(self, request: Request, depth: int) -> int:
        """`match_prefix` in the pool, and with `depth` HOST in host memory."""
        num_blocks = self._longest_match(request, depth)
        if self.state_pool is not None:
            num_blocks = self._resume(request, self.state_pool, num_blocks, depth)
        if num_blocks:
            request.tables = [self._share(pool, request, num_blocks) for pool in self.pools]
            request.room = num_blocks * self.block_size
            self._holders.add(request)
        request.num_sealed = num_blocks
        return num_blocks * self.block_size

    def grow(self, request: Request, num_tokens: int, ahead: int = 0, num_spare: int = 0) -> bool:
        """Allocate blocks for a request's tokens up to `num_tokens`, and up to `ahead` in groups without a window.

        Blocks that no token from `request.num_computed` on attends to are given back first. False, with nothing
        allocated, if a group would be left with fewer than `num_spare` free blocks.
        """
        if not request.tables:
            request.tables = [[] for _ in self.pools]
            self._holders.add(request)
        if self.state_pool is not None and request.state is None:
            makes_checkpoints = self.enable_prefix_caching and request.pooling is None
            request.state = SequenceState(makes_checkpoints=makes_checkpoints)
        if self._windowed:
            self.give_back(request)
        stop = far = -(-num_tokens // self.block_size)
        if ahead > num_tokens:
            far = self.blocks_for(ahead)
        growing = []
        for pool, table in zip(self.pools, request.tables, strict=True):
            count = (far if pool.window is None else stop) - len(table)
            if count > 0:
                if pool.num_free - count < num_spare:
                    return False
                growing.append((pool, table, count))
        for pool, table, count in growing:
            for _ in range(count):
                table.append(pool.allocate())
        request.room = max(request.room, stop * self.block_size)
        return True

    def give_back(self, request: Request) -> None:
        """Free the blocks that no token from `request.num_computed` on attends to. A step in flight may still read
        them; whoever gets them next writes to them in a later step.

        With prefix caching, only sealed blocks are freed. Those of earlier tokens are freed first, and so are reused
        first: they belong to the shorter prefixes."""
        for index, pool in self._windowed:
            table, end = request.tables[index], pool.first_needed(request.num_computed)
            if end > len(table):  # it begins in the middle of its sequence
                table.extend([0] * (end - len(table)))
            if self.enable_prefix_caching and end > request.num_sealed:
                self.seal(request)
                end = min(end, request.num_sealed)
            begin = end
            while begin and table[begin - 1]:
                begin -= 1
            for place in range(begin, end):
                pool.release(table[place], request.request_id)
                table[place] = 0

    def seal(self, request: Request) -> None:
        """Cache the blocks that the request has filled since the last call. O(1) if there are none."""
        if not self.enable_prefix_caching:
            return
        num_full = min(request.num_computed, len(request.prompt_ids) + len(request.output_ids)) // self.block_size
        for index in range(request.num_sealed, num_full):
            reach("pool.seal")
            tokens = self._block_tokens(request, index)
            block_hash = self._hash(request, index, tokens)
            for pool, table in zip(self.pools, request.tables, strict=True):
                pool.seal(table[index], block_hash, tokens)
                if self._tiers is not None and table[index]:
                    self._tiers.sealed(Key(pool.number, block_hash), table[index], tokens)
        request.num_sealed = num_full
        if self.state_pool is not None and request.state is not None:
            self.state_pool.seal(request.state, num_full, request.block_hashes)

    def free(self, request: Request, keep: bool = True) -> None:
        """Free all blocks of a request. keep=False: their content is invalid, so drop it from the prefix cache, with
        that of the blocks that it gave back.

        The tail is freed first, and so is reused first: a continuation is useless without the head of its prefix.
        """
        reach("pool.free")
        if self.state_pool is not None and request.state is not None:
            if keep and request.state.marks:
                self.seal(request)
            self.state_pool.release(request.state)
            request.state = None
        tables, request.tables, request.num_sealed, request.room = request.tables, [], 0, 0
        for pool, table in zip(self.pools, tables, strict=bool(tables)):
            if not keep:
                for block_hash in request.block_hashes:
                    self._hide(pool, block_hash)
            for block_id in reversed(table):
                if block_id:
                    pool.release(block_id, request.request_id)
        self._holders.discard(request)

    def take_changes(self) -> tuple[list[bytes], list[bytes]]:
        """Hashes of the blocks that have become findable since the last call, and of those that no longer are.

        The first call starts the record, with all that can be found. Whoever makes it goes on to call it every step.
        """
        return self.pools[0].take_changes()

    def cached_hashes(self) -> list[bytes]:
        """Hashes of all blocks that can be found by prefix."""
        return self.pools[0].cached_hashes()

    def states(self) -> bytes:
        """One letter per block, except the dummies, group by group: `h`eld by one request, `s`hared, free but `c`ached,
        or free: `.`"""
        return b"".join(pool.states(self._tables_of(index)) for index, pool in enumerate(self.pools))

    def audit(self) -> None:
        """Check every invariant of the pools, in time proportional to their size. Raises InvariantError."""
        for index, pool in enumerate(self.pools):
            pool.audit(self._tables_of(index))
            for request in self._holders:
                self._audit_table(request, pool, request.tables[index])
        if self.state_pool is not None:
            self.state_pool.audit(request.state for request in self._holders if request.state is not None)

    def _tables_of(self, group: int) -> Counter[int]:
        """The blocks that are in tables of a group, and in how many."""
        return Counter(block_id for request in self._holders for block_id in request.tables[group] if block_id)

    def _hide(self, pool: GroupPool, block_hash: bytes) -> None:
        """Drop a block with invalid content from the pool's cache, and its copies."""
        pool.hide_hash(block_hash)
        if self._tiers is not None:
            self._tiers.drop(Key(pool.number, block_hash))
            if pool.number == 0 and self.state_pool is not None:
                self._tiers.drop(Key(STATE, block_hash))

    def _longest_match(self, request: Request, depth: int = POOL) -> int:
        """The number of blocks of the longest prefix of which every group still has what it needs."""
        num_blocks = (request.num_tokens - 1) // self.block_size
        for pool in self.pools:
            if pool.window is None:
                num_blocks = next((i for i in range(num_blocks) if not self._has(pool, request, i, depth)), num_blocks)
        return self._last_covered_by_all(request, num_blocks, depth)

    def _last_covered_by_all(self, request: Request, num_blocks: int, depth: int = POOL) -> int:
        """The longest prefix of at most `num_blocks` blocks of whose last window every group has every block."""
        before = -1
        while num_blocks != before:  # what one group lacks may end the prefix where another lacks something
            before = num_blocks
            for _, pool in self._windowed:
                num_blocks = self._last_covered(pool, request, num_blocks, depth)
        return num_blocks

    def _resume(self, request: Request, states: StatePool, num_blocks: int, depth: int = POOL) -> int:
        """Give a request the last checkpoint in its first `num_blocks` blocks, which were found; return its blocks."""
        num_found = num_blocks
        num_blocks = self._last_checkpoint(request, states, num_blocks, depth)
        if num_blocks and not states.has(request.block_hashes[num_blocks - 1]):
            assert self._tiers is not None
            block_hash = request.block_hashes[num_blocks - 1]
            slot = states.restore(block_hash)
            if slot is None:
                num_blocks = self.num_found(request, POOL)
            else:
                self._tiers.restore(Key(STATE, block_hash), slot)
        if num_blocks:
            request.state = states.resume(request.block_hashes[num_blocks - 1], num_blocks)
        else:
            request.state = SequenceState()
        if num_found - num_blocks >= MIN_SHARED_BLOCKS:
            request.state.branch = num_found
        return num_blocks

    def _last_checkpoint(self, request: Request, states: StatePool, num_blocks: int, depth: int) -> int:
        """The longest prefix of at most `num_blocks` blocks that ends at a checkpoint."""
        while num_blocks:
            block_hash = request.block_hashes[num_blocks - 1]
            if states.has(block_hash):
                break
            # one that its sequence still writes from cannot be resumed, nor replaced by its copy
            if depth > POOL and states.slot_of(block_hash) is None and self._has_copy(STATE, block_hash, b"", depth):
                break
            num_blocks = self._last_covered_by_all(request, num_blocks - 1, depth)
        return num_blocks

    def _last_covered(self, pool: GroupPool, request: Request, end: int, depth: int = POOL) -> int:
        """The longest prefix of at most `end` blocks of whose last window a group has every block."""
        place = end
        while place > max(0, end - pool.window_blocks):
            place -= 1
            if not self._has(pool, request, place, depth):
                end = place
        return end

    def _has(self, pool: GroupPool, request: Request, index: int, depth: int = POOL) -> bool:
        """Whether a cached block, or a copy, has the same tokens and prefix as the request's block `index`."""
        tokens = self._block_tokens(request, index)
        block_hash = self._hash(request, index, tokens)
        if pool.find(block_hash, tokens) is not None:
            return True
        return depth > POOL and self._has_copy(pool.number, block_hash, tokens, depth)

    def _has_copy(self, kind: int, block_hash: bytes, tokens: bytes, depth: int) -> bool:
        return self._tiers is not None and self._tiers.has(Key(kind, block_hash), tokens, depth)

    def _share(self, pool: GroupPool, request: Request, num_blocks: int) -> list[int]:
        """A table of the cached blocks of a prefix that was found, from the first that is needed after it. Those that
        only a tier has are copied to new blocks."""
        first, table = pool.first_needed(num_blocks * self.block_size), []
        for index in range(first, num_blocks):
            tokens = self._block_tokens(request, index)
            table.append(pool.take_if_found(request.block_hashes[index], tokens))
        for index in range(first, num_blocks):
            if not table[index - first]:
                table[index - first] = self._restore(pool, request, index)
        return [0] * first + table

    def _restore(self, pool: GroupPool, request: Request, index: int) -> int:
        """A new block for the request's block `index`, into which its copy goes before the next step."""
        assert self._tiers is not None
        block_hash = request.block_hashes[index]
        block_id = pool.allocate()
        pool.seal(block_id, block_hash, self._block_tokens(request, index))
        if pool.number == 0:
            self._num_restored += self.block_size
        self._tiers.restore(Key(pool.number, block_hash), block_id)
        return block_id

    # -- the tiers -----------------------------------------------------------------------------------------------------

    def missing(self, request: Request, num_blocks: int, depth: int) -> list[tuple[Key, bytes]]:
        """What the pool and the tiers above `depth` lack of the first `num_blocks` blocks of a request, each with its
        tokens."""
        keys = []
        for pool in self.pools:
            for index in range(pool.first_needed(num_blocks * self.block_size), num_blocks):
                if not self._has(pool, request, index, depth - 1):
                    keys.append((Key(pool.number, request.block_hashes[index]), self._block_tokens(request, index)))
        if self.state_pool is not None and num_blocks:
            block_hash = request.block_hashes[num_blocks - 1]
            if not self.state_pool.has(block_hash) and not self._has_copy(STATE, block_hash, b"", depth - 1):
                keys.append((Key(STATE, block_hash), b""))
        return keys

    def num_found(self, request: Request, depth: int) -> int:
        """The number of blocks of the longest prefix in the pool and the tiers down to `depth`. Nothing changes."""
        num_blocks = self._longest_match(request, depth)
        if self.state_pool is not None:
            num_blocks = self._last_checkpoint(request, self.state_pool, num_blocks, depth)
        return num_blocks

    def begin_fetch(self, request: Request) -> Fetch | None:
        """Begin to read what only the disk has of a request's prefix, if that is faster than computing it."""
        tiers = self._tiers
        if tiers is None or not tiers.has_disk or not self.enable_prefix_caching:
            return None
        num_blocks, num_here = self.num_found(request, DISK), self.num_found(request, HOST)
        if num_blocks <= num_here:
            return None
        keys = self.missing(request, num_blocks, DISK)
        num_tokens = (num_blocks - num_here) * self.block_size
        return tiers.fetch(keys) if tiers.pays(num_tokens, [key for key, _ in keys], DISK) else None

    def reset(self, *, with_tiers: bool) -> None:
        """Forget all cached prefixes. Running requests keep their blocks. with_tiers: and the copies."""
        for pool in self.pools:
            for block_hash in pool.cached_hashes():
                pool.hide_hash(block_hash)
        if with_tiers and self._tiers is not None:
            self._tiers.clear()

    @property
    def num_restored(self) -> int:
        """Tokens of the prefix that was matched last whose blocks the pool lacked."""
        return self._num_restored

    def _worthwhile_depth(self, request: Request, tiers: Tiers) -> int:
        """HOST if the tier in host memory makes a request's prefix longer, faster than computing it, and the pool has
        room for it; what it has is then held. Else POOL."""
        num_here = self.num_found(request, POOL)
        if num_here == (request.num_tokens - 1) // self.block_size:
            return POOL
        num_blocks = self.num_found(request, HOST)
        if num_blocks <= num_here:
            return POOL
        keys = [key for key, _ in self.missing(request, num_blocks, HOST)]
        num_tokens = (num_blocks - num_here) * self.block_size
        fits = all(self._has_room(pool, request, num_blocks) for pool in self.pools)
        if not fits or not tiers.pays(num_tokens, keys, HOST):
            return POOL
        tiers.hold(keys)
        return HOST

    def _has_room(self, pool: GroupPool, request: Request, num_blocks: int) -> bool:
        """Whether a group has free blocks for what the pool lacks of a prefix, besides those that are found in it."""
        num_taken = 0
        for index in range(pool.first_needed(num_blocks * self.block_size), num_blocks):
            block_id = pool.find(request.block_hashes[index], self._block_tokens(request, index))
            num_taken += block_id is None or pool.is_free(block_id)
        return num_taken <= pool.num_free

    # -- the request's blocks ------------------------------------------------------------------------------------------

    def _hash(self, request: Request, index: int, tokens: bytes) -> bytes:
        """Hash of the request's full block `index`, which holds `tokens`. Computed once: `request.block_hashes`
        survives preemption."""
        hashes = request.block_hashes
        while len(hashes) < index:
            hashes.append(hash_block(request.last_hash, self._block_tokens(request, len(hashes))))
        if len(hashes) == index:
            hashes.append(hash_block(request.last_hash, tokens))
        return hashes[index]

    def _block_tokens(self, request: Request, index: int) -> bytes:
        start, stop = index * self.block_size, (index + 1) * self.block_size
        if stop <= len(request.prompt_ids):
            return request.packed_prompt[4 * start : 4 * stop]
        return pack_tokens(request.tokens(start, stop))

    def _audit_table(self, request: Request, pool: GroupPool, table: list[int]) -> None:
        """Check that what is needed is there, that shared blocks are sealed, and that sealed blocks are full and hold
        the right tokens."""
        name, num_full = request.request_id, request.num_computed // self.block_size
        held = [(index, block_id) for index, block_id in enumerate(table) if block_id]
        if len({block_id for _, block_id in held}) != len(held):
            raise InvariantError(f"the table of request {name} has a block twice: {table}")
        if request.num_computed > len(table) * self.block_size:
            raise InvariantError(
                f"request {name} has computed {request.num_computed} tokens, but holds {len(table)} blocks "
                f"of {self.block_size}"
            )
        if 0 in table[pool.first_needed(request.num_computed) :]:
            raise InvariantError(
                f"request {name} has given back a block that its token {request.num_computed} attends to: {table}"
            )
        for index, block_id in held:
            tokens = pool.sealed_tokens(block_id)
            if pool.is_shared(block_id) and tokens is None:
                raise InvariantError(f"block {block_id} of request {name} is shared, but not sealed")
            if tokens is not None and index >= num_full:
                raise InvariantError(
                    f"block {block_id} of request {name} is sealed, but not full: its index is {index} and "
                    f"{request.num_computed} tokens are computed"
                )
            start, stop = index * self.block_size, (index + 1) * self.block_size
            if tokens is not None and tokens != pack_tokens(request.tokens(start, stop)):
                raise InvariantError(f"block {block_id} of request {name} is sealed with other tokens")
