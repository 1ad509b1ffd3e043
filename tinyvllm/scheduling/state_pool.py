"""The slots of recurrent states: which sequences own them, and which hold checkpoints that a prefix can resume from.

A slot holds the state of one sequence in all recurrent layers, at one position. Unlike keys and values, a state cannot
be cut back to a prefix, so a cached prefix is of use only if the state at its end was kept: a *checkpoint*, found by
the hash of the block that ends there. A slot's life cycle: free -> owned and written by one sequence -> sealed (never
written again) -> cached, once its sequence has moved to another slot -> evicted, the least recently used first.
A checkpoint is also evicted with its block, since it is useless without keys and values. Slot 0 is a dummy for the
padded rows of a graph.

Nothing is copied. A step that continues from a checkpoint reads its slot and writes another one.

Where checkpoints are made, which the chunks of a prompt must end at:

- at the last border of a block before the end of the prompt, for the same prompt again and for the next turn;
- at a border where other requests left a prefix that they share with this one: blocks that were found without a
  checkpoint (Pan et al. 2025, "Marconi");
- at each `interval` blocks of a long prompt: at least as many as take the bytes of a state, so that a prefix's
  checkpoints take no more than its blocks (`execution/capacity.py`);
- at every border that a generated token reaches. Unless `interval` keeps it, the next one replaces it, so a sequence
  that decodes owns two slots: its state, and the state at the latest border.

Drafts (scheduling/drafts.py) may turn out wrong, and a state that has taken them in cannot be cut back. So a step with
drafts writes another slot than it reads. If all drafts were right, the sequence continues from what was written;
otherwise from what was read, and its tokens since then are computed again, in the rows of a later step. That takes one
slot more for a sequence, and no state is written that is not needed if the drafts are right; to keep the state after
every row would take a slot, and a write of all states, for each draft. Such steps end before the next border of a
block, so that checkpoints stay where they are without drafts.

Checkpoints give way to sequences: if no slot is free and none can be evicted, a sequence overwrites its own checkpoint.
So a pool of as many slots as running sequences always suffices.
"""

from __future__ import annotations

import sys
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from tinyvllm.errors import CapacityError, InvariantError
from tinyvllm.faults import reach

UNSETTLED = sys.maxsize  # the next event of a sequence while a step with drafts runs
MAX_UNCHECKED = sys.maxsize  # drafts of a sequence that makes no checkpoints: other limits apply
MIN_SHARED_BLOCKS = 4  # a shorter prefix that others share is not worth a slot, nor the step that ends at its border


@dataclass(frozen=True)
class Mark:
    """A slot that becomes the checkpoint of the first `num_blocks` blocks once their tokens are known."""

    num_blocks: int
    slot: int
    is_rolling: bool  # the sequence's next checkpoint replaces it


@dataclass(slots=True, eq=False)
class SequenceState:
    """Where one sequence's state is, after the steps that were planned, and which checkpoints it makes."""

    slot: int = 0  # what its latest step writes and its next one reads; 0: none yet
    read_slot: int = 0  # what its latest step reads: the same, or a checkpoint
    makes_checkpoints: bool = True
    next_event: int = 0  # the position from which on a step changes more than the slot's content
    is_kept: bool = False  # the slot is a checkpoint or marked to become one, so the next step writes another
    marks: list[Mark] = field(default_factory=list)  # those not sealed yet, in order
    rolling_hash: bytes = b""  # of the checkpoint that the next one replaces
    num_kept_blocks: int = 0  # length of its latest checkpoint that is not replaced; 0: none
    branch: int = 0  # blocks of a prefix that others share, which should have a checkpoint; 0: none
    base_slot: int = 0  # what a step with drafts reads, until it is known whether they were right; 0: there is none
    base_is_kept: bool = False  # `is_kept` of that slot


class StatePool:
    """Owns the free list of slots and the checkpoints. Every operation is O(1), but for `audit`."""

    def __init__(self, num_slots: int, block_size: int, interval: int = 1) -> None:
        if num_slots < 2:
            raise CapacityError(f"the pool has {num_slots} state slots: it needs 2, because slot 0 is a dummy")
        self.num_slots, self.interval = num_slots, interval
        self.num_hits = 0  # sequences that resumed from a checkpoint, since start
        self.num_evictions = 0  # checkpoints dropped for lack of slots, or with their blocks, since start
        self._block_size = block_size
        self._free = list(range(num_slots - 1, 0, -1))
        self._hashes = [b""] * num_slots  # b"": not sealed
        self._findable: dict[bytes, int] = {}  # hash -> the one slot found by it
        self._cached: OrderedDict[int, None] = OrderedDict()  # checkpoints that nobody owns, next to evict first
        # read by the step being planned, or planned last: not to be written in it
        self._pinned: dict[int, None] = {}
        self._rolling: set[bytes] = set()  # checkpoints that the next one of their sequence replaces
        # called with a slot and its hash: when it is sealed to stay, and when it is about to be reallocated
        self.on_seal: Callable[[int, bytes], None] | None = None
        self.on_evict: Callable[[int, bytes], None] | None = None

    @property
    def has_room(self) -> bool:
        """Whether a further sequence can have a slot."""
        return bool(self._free or self._cached)

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_checkpoints(self) -> int:
        """Checkpoints that no sequence owns."""
        return len(self._cached) + len(self._pinned)

    @property
    def num_live(self) -> int:
        """Slots that sequences own."""
        return self.num_slots - 1 - self.num_free - self.num_checkpoints

    def has(self, block_hash: bytes) -> bool:
        """Whether a sequence can resume from the end of the block with this hash: there is a checkpoint, and the
        sequence that made it has moved on."""
        slot = self._findable.get(block_hash)
        return slot is not None and (slot in self._cached or slot in self._pinned)

    def slot_of(self, block_hash: bytes) -> int | None:
        """The slot of the checkpoint of this hash."""
        return self._findable.get(block_hash)

    def is_sealed_with(self, slot: int, block_hash: bytes) -> bool:
        """Whether a slot still holds the checkpoint of this hash."""
        return self._hashes[slot] == block_hash

    # -- planning a step -----------------------------------------------------------------------------------------------

    def begin_step(self) -> None:
        """Let slots be written that the previous step reads: steps run in order."""
        for slot in self._pinned:
            if self._hashes[slot]:
                self._cached[slot] = None
            else:
                self._free.append(slot)
        self._pinned.clear()

    def restore(self, block_hash: bytes) -> int | None:
        """A slot for a checkpoint that is copied into it before the next step, and can be found from now on: a free
        slot, or that of the least recently used checkpoint. None if there is neither."""
        if not self._free and self._cached:
            self._evict(next(iter(self._cached)))
        if not self._free:
            return None
        slot = self._free.pop()
        self._findable[block_hash], self._hashes[slot] = slot, block_hash
        self._cached[slot] = None
        return slot

    def resume(self, block_hash: bytes, num_blocks: int) -> SequenceState:
        """A sequence that continues from the checkpoint of this hash, which is `num_blocks` blocks long."""
        slot = self._findable[block_hash]
        if slot in self._cached:
            del self._cached[slot]
            self._pinned[slot] = None
        self._rolling.discard(block_hash)  # others need it: it stays
        return SequenceState(slot=slot, read_slot=slot, is_kept=True, num_kept_blocks=num_blocks)

    def cut(self, state: SequenceState, start: int, stop: int, num_tokens: int) -> int:
        """Where a step that could compute tokens [start, stop) of a sequence of `num_tokens` should stop: at the first
        border where a checkpoint belongs."""
        if not state.makes_checkpoints:
            return stop
        size = self._block_size
        borders = (state.branch, (num_tokens - 1) // size, state.num_kept_blocks + self.interval)
        return min([border * size for border in borders if start < border * size < stop], default=stop)

    def step(self, state: SequenceState, stop: int, num_tokens: int) -> None:
        """Plan a step that takes the state of a sequence of `num_tokens` known tokens to position `stop`. Steps that
        end before `state.next_event` need no call."""
        size = self._block_size
        state.read_slot = state.slot
        if state.is_kept or not state.slot:
            self._move(state)
        if stop % size == 0 and state.makes_checkpoints:
            self._mark(state, stop // size, (num_tokens - 1) // size)
        is_moving = state.is_kept or state.read_slot != state.slot
        state.next_event = stop + 1 if is_moving else (stop // size + 1) * size

    def room_for_drafts(self, state: SequenceState, start: int, stop: int) -> int:
        """How many drafts may follow tokens [start, stop) in a step: it ends before the next border of a block."""
        if not state.slot or state.slot in self._pinned:  # its first step, or it resumes from a checkpoint
            return 0
        size = self._block_size
        return (start // size + 1) * size - 1 - stop if state.makes_checkpoints else MAX_UNCHECKED

    def fork(self, state: SequenceState) -> bool:
        """Let the step being planned, which has drafts, write another slot than it reads. False, with nothing changed,
        if there is none. `settle` says which of the two the sequence continues from."""
        slot = self._allocate(state)
        if not slot:
            return False
        state.base_slot, state.base_is_kept = state.slot, state.is_kept
        state.read_slot, state.slot, state.is_kept = state.slot, slot, False
        state.next_event = UNSETTLED
        return True

    def settle(self, state: SequenceState, *, is_redone: bool) -> None:
        """After a step with drafts: continue from what it wrote, or if it `is_redone`, from what it read."""
        base, state.base_slot, state.next_event = state.base_slot, 0, 0
        if is_redone:
            self._free.append(state.slot)
            state.slot, state.is_kept = base, state.base_is_kept
        elif not state.base_is_kept:
            self._free.append(base)
        elif not (state.marks and state.marks[-1].slot == base):
            if self._hashes[base]:
                self._cached[base] = None
            else:  # dropped in the meantime
                self._free.append(base)
        state.read_slot = state.slot

    # -- between steps -------------------------------------------------------------------------------------------------

    def seal(self, state: SequenceState, num_sealed: int, hashes: Sequence[bytes]) -> None:
        """Make the checkpoints of at most `num_sealed` blocks findable, by the hashes of the sequence's blocks. Each
        replaces the one before it, if that is rolling."""
        while state.marks and state.marks[0].num_blocks <= num_sealed:
            reach("state.seal")
            mark = state.marks.pop(0)
            block_hash, is_current = hashes[mark.num_blocks - 1], mark.slot == state.slot
            if state.rolling_hash in self._rolling:
                self._free_cached(state.rolling_hash)
            if block_hash in self._findable:  # another sequence was first
                self._touch(self._findable[block_hash])
                if is_current:
                    state.is_kept = False
                else:
                    self._free.append(mark.slot)
                continue
            self._findable[block_hash] = mark.slot
            self._hashes[mark.slot] = block_hash
            if mark.is_rolling:
                self._rolling.add(block_hash)
                state.rolling_hash = block_hash
            elif self.on_seal is not None:
                self.on_seal(mark.slot, block_hash)
            if not is_current:
                self._cached[mark.slot] = None

    def release(self, state: SequenceState) -> None:
        """Take a sequence's slots; what it has sealed stays cached."""
        slots = {mark.slot: None for mark in state.marks}
        for slot in (state.slot, state.base_slot):
            if slot and slot not in self._pinned:
                slots[slot] = None
        if self.on_seal is not None and state.rolling_hash in self._rolling:  # nothing replaces it any more
            self.on_seal(self._findable[state.rolling_hash], state.rolling_hash)
        for slot in slots:
            if self._hashes[slot]:
                self._cached[slot] = None
            else:
                self._free.append(slot)
        state.marks.clear()
        state.slot = state.read_slot = state.base_slot = 0

    def drop(self, block_hash: bytes) -> None:
        """Forget the checkpoint of a block that can no longer be found, if there is one."""
        if block_hash in self._findable:
            self._free_cached(block_hash)
            self.num_evictions += 1

    def audit(self, states: Iterable[SequenceState]) -> None:
        """Check every invariant, given the states of all sequences. Raises InvariantError."""
        owners: Counter[int] = Counter()
        for state in states:
            slots = {mark.slot for mark in state.marks}
            slots |= {slot for slot in (state.slot, state.base_slot) if slot and slot not in self._pinned}
            owners.update(slots)
        counts = owners + Counter(self._free) + Counter(self._cached.keys()) + Counter(self._pinned.keys())
        for slot in range(self.num_slots):
            if counts[slot] != (slot > 0):
                raise InvariantError(
                    f"state slot {slot} is in {counts[slot]} places: {owners[slot]} owners, "
                    f"{self._free.count(slot)} times free, cached: {slot in self._cached}, read: {slot in self._pinned}"
                )
            block_hash = self._hashes[slot]
            if block_hash and self._findable.get(block_hash) != slot:
                raise InvariantError(f"state slot {slot} is sealed by hash {block_hash.hex()}, but not found by it")
        for block_hash, slot in self._findable.items():
            if self._hashes[slot] != block_hash:
                raise InvariantError(f"state slot {slot} is found by hash {block_hash.hex()}, but not sealed by it")
        if unsealed := [slot for slot in self._cached if not self._hashes[slot]]:
            raise InvariantError(f"state slots {unsealed} are cached, but not sealed")
        if not self._rolling <= self._findable.keys():
            raise InvariantError("a rolling checkpoint cannot be found")

    # -- its parts -----------------------------------------------------------------------------------------------------

    def _move(self, state: SequenceState) -> None:
        """Give a sequence that has no slot, or must keep the one it has, another one to write."""
        reach("state.move")
        slot, kept = self._allocate(state), state.slot
        state.is_kept = False
        self.num_hits += kept in self._pinned
        if slot:
            state.slot = slot
            if not kept:
                state.read_slot = slot  # at position 0, where nothing is read
            elif not (state.marks and state.marks[-1].slot == kept):
                self._pinned[kept] = None
            return
        if not kept:
            raise InvariantError(f"no state slot is left for a sequence: all {self.num_slots - 1} are owned")
        if state.marks and state.marks[-1].slot == kept:
            state.marks.pop()
            return
        self._pinned.pop(kept, None)
        if self._hashes[kept]:
            self._unseal(kept)
            self.num_evictions += 1

    def _allocate(self, state: SequenceState) -> int:
        """A slot to write: a free one, that of the sequence's checkpoint that is to be replaced, or that of the least
        recently used checkpoint. 0 if there is none."""
        if not self._free and self._cached:
            old = self._findable[state.rolling_hash] if state.rolling_hash in self._rolling else 0
            slot = old if old in self._cached else next(iter(self._cached))
            self._evict(slot, keeps=slot != old)
        return self._free.pop() if self._free else 0

    def _evict(self, slot: int, *, keeps: bool = True) -> None:
        """Free the slot of a checkpoint that nobody owns. keeps: it may be needed again."""
        if keeps and self.on_evict is not None:
            self.on_evict(slot, self._hashes[slot])
        self._free_cached(self._hashes[slot])
        self.num_evictions += 1

    def _mark(self, state: SequenceState, num_blocks: int, num_before_last: int) -> None:
        """Keep the state after `num_blocks` blocks, if a checkpoint belongs there. Of the known tokens,
        `num_before_last` blocks end before the last one."""
        is_end = num_blocks > num_before_last
        is_due = num_blocks - state.num_kept_blocks >= self.interval
        if not (is_end or is_due or num_blocks in (num_before_last, state.branch)):
            return
        is_rolling = is_end and not is_due
        if not is_rolling:
            state.num_kept_blocks = num_blocks
        state.is_kept = True
        state.marks.append(Mark(num_blocks, state.slot, is_rolling))

    def _touch(self, slot: int) -> None:
        if slot in self._cached:
            self._cached.move_to_end(slot)

    def _free_cached(self, block_hash: bytes) -> None:
        """Unseal the slot of a checkpoint, and free it if nobody owns or reads it."""
        slot = self._findable[block_hash]
        self._unseal(slot)
        if slot in self._cached:
            del self._cached[slot]
            self._free.append(slot)

    def _unseal(self, slot: int) -> None:
        block_hash = self._hashes[slot]
        self._rolling.discard(block_hash)
        del self._findable[block_hash]
        self._hashes[slot] = b""
