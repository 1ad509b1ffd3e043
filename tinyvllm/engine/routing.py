"""Which replica computes a request: the one with the longest cached prefix of its prompt, unless it is too busy.

A replica is an engine with a KV pool of its own. Computing a prompt costs the tokens that are not cached there, and it
starts after the work that is queued there. Both are counted in tokens to prefill, and the smallest sum is chosen:

    cost = (prompt tokens - cached prefix)  +  load
    load = prompt tokens still to compute  +  16 for each sequence  +  256 for each sequence without a place

Prompt tokens to compute do not include those of the request's own prefix, which may be under way for another request:
elsewhere they would have to be computed, too. So a burst of requests with one prefix stays together.

A place is one of the replica's --max-num-seqs. A prefix is worth the prefill that it saves, so requests follow their
conversation. But the chosen replica's load exceeds the lowest by at most the prefix that it holds, so none is swamped.
When many requests share one prefix, its replica fills up to that difference. The next request goes to the idlest, and
from then on both hold the prefix. Equal costs go to the longer prefix, equal prefixes to the lower load, and equal
loads to the replica that was chosen least recently.

Where every replica has a queue, queues differ by chance, and moving a conversation would only add work. So the cost
leaves out as many waiting sequences as twice those of the idlest replica.

Others' rules, for comparison. The routers of SGLang and vLLM follow the longest prefix if it covers 30 % of the prompt,
until the busiest replica has 64 requests more than the idlest and 1.5 times as many; then load alone decides. Ray
Serve's PrefixCacheAffinityRouter is similar, with 10 % and a difference of queue lengths. llm-d adds weighted scores
of prefix, queue and pool usage. NVIDIA Dynamo minimizes the blocks to prefill plus the blocks in use; ours is closest
to that.

Everything here is integer arithmetic: no I/O, no clock, no threads.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, insort
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field

from tinyvllm.errors import EngineDeadError, InvariantError

# Found with tests/engine/fleet.py: conversations of 100 to 2,500 tokens on 2 to 8 replicas of 16 places. With lower
# values hit rates hardly rise, but requests wait while other replicas have places; with higher ones conversations
# scatter.
SEQUENCE_TOKENS = 16
WAITING_TOKENS = 256
USUAL_QUEUE = 2  # times the idlest replica's
FEW = 16  # a set up to this size is searched by its members, a larger one in order of load


def short_hashes(hashes: Iterable[bytes]) -> list[int]:
    """The first 8 bytes of each block hash, as the router keeps them.

    Of 10^9 different blocks any two share them with a probability of 3 %. Then a request may be routed badly, no more:
    an engine compares tokens before it shares a block.
    """
    return array("Q", b"".join(hashes))[::2].tolist()


def sample_hashes(hashes: Iterable[int], sampling: int) -> list[int]:
    """The hashes that a router with this `sampling` keeps: one in `sampling`, the same ones everywhere."""
    return [block_hash for block_hash in hashes if block_hash % sampling == 0]


@dataclass(eq=False)
class Route:
    """A request on its way through a replica."""

    replica: Hashable
    num_cached: int  # prompt tokens that the replica is thought to hold
    num_pending: int  # prompt tokens that it has still to compute
    num_sequences: int
    promised: Sequence[int]  # hashes that it will hold soon; no event has named them yet
    is_open: bool = True


@dataclass(eq=False, slots=True)
class _Replica:
    """What is known of a replica. Its bit is 1 << slot in the router's masks."""

    name: Hashable
    slot: int
    max_num_seqs: int
    blocks: set[int] = field(default_factory=set)  # hashes of the blocks that it holds
    routes: dict[Route, None] = field(default_factory=dict)  # open ones, in order
    num_sequences: int = 0  # theirs
    num_pending: int = 0  # their prompt tokens to compute
    reported: tuple[int, int] = (0, 0)  # sequences and pending tokens, by its own account
    num_waiting: int = 0
    load: int = 0
    turn: int = 0  # when it was last chosen

    @property
    def rank(self) -> tuple[int, int, int]:
        return self.load, self.turn, self.slot

    def recount(self) -> None:
        """Set the load. Of our counts and the replica's own the higher hold, since the latter lag by a step."""
        num_seqs = max(self.num_sequences, self.reported[0])
        self.num_waiting = max(0, num_seqs + 1 - self.max_num_seqs)  # with the request that is being routed
        self.load = max(self.num_pending, self.reported[1]) + SEQUENCE_TOKENS * num_seqs
        self.load += WAITING_TOKENS * self.num_waiting


class Router:
    """Knows which replica holds which blocks and how busy it is, and chooses one for each request.

    Sets of replicas are integers with one bit a replica. So one dictionary from hash to set serves a thousand replicas,
    and all blocks that one replica alone holds share the same integer.

    block_size: tokens of a block. sampling: keep one hash in `sampling`, chosen by its value, which divides memory and
    events by it; a prefix is then known to the last block that was kept.
    """

    def __init__(self, block_size: int, sampling: int = 1) -> None:
        self.block_size = block_size
        self.sampling = sampling
        self._replicas: dict[Hashable, _Replica] = {}
        self._slots: list[_Replica | None] = []
        self._bits: list[int] = []  # 1 << slot
        self._all = 0  # the set of all replicas
        self._order: list[tuple[int, int, int]] = []  # ranks of all replicas, sorted: the idlest first
        self._holders: dict[int, int] = {}  # hash of a block -> the replicas that have stored it
        self._promises: dict[int, int] = {}  # hash of a block -> the replicas that were given it to compute
        self._num_chosen = 0

    @property
    def replicas(self) -> list[Hashable]:
        return list(self._replicas)

    def num_blocks(self, replica: Hashable) -> int:
        """The number of a replica's blocks that are known."""
        return len(self._replicas[replica].blocks)

    def load(self, replica: Hashable) -> int:
        """A replica's load in tokens."""
        return self._replicas[replica].load

    def num_sequences(self, replica: Hashable) -> int:
        """The number of sequences of a replica's open routes."""
        return self._replicas[replica].num_sequences

    # Replicas come and go.

    def add(self, name: Hashable, max_num_seqs: int) -> None:
        """Add a replica that holds nothing and runs up to `max_num_seqs` sequences at once."""
        if name in self._replicas:
            raise InvariantError(f"replica {name!r} is added twice")
        slot = next((slot for slot, owner in enumerate(self._slots) if owner is None), len(self._slots))
        if slot == len(self._slots):
            self._slots.append(None)
            self._bits.append(1 << slot)
        replica = self._replicas[name] = self._slots[slot] = _Replica(name, slot, max_num_seqs)
        self._all |= self._bits[slot]
        replica.recount()
        insort(self._order, replica.rank)

    def remove(self, name: Hashable) -> list[Route]:
        """Forget a replica that has died or is being stopped. Returns its open routes, which are finished hereby.

        A replica that starts anew is removed and added again.
        """
        replica = self._replicas[name]
        routes = list(replica.routes)
        for route in routes:
            self.finished(route)
        self.removed(name, list(replica.blocks))
        del self._order[bisect_left(self._order, replica.rank)]
        del self._replicas[name]
        self._slots[replica.slot] = None
        self._all &= ~self._bits[replica.slot]
        return routes

    # What a replica tells.

    def stored(self, name: Hashable, hashes: Sequence[int]) -> None:
        """A replica has cached blocks."""
        replica = self._replicas[name]
        bit, holders = self._bits[replica.slot], self._holders
        hashes = hashes if self.sampling == 1 else sample_hashes(hashes, self.sampling)
        for block_hash in hashes:
            before = holders.get(block_hash)
            holders[block_hash] = bit if before is None else before | bit
        replica.blocks.update(hashes)

    def removed(self, name: Hashable, hashes: Iterable[int]) -> None:
        """A replica has dropped blocks from its cache. Unknown ones are ignored."""
        replica = self._replicas[name]
        known = replica.blocks.intersection(hashes)
        replica.blocks -= known
        _clear(self._holders, known, self._bits[replica.slot])

    def reported(self, name: Hashable, num_sequences: int, num_pending: int) -> None:
        """A replica's own count of its sequences and of their prompt tokens to compute, other routers' included."""
        replica = self._replicas[name]
        replica.reported = (num_sequences, num_pending)
        self._update_load(replica)

    # A request's way.

    def route(self, hashes: Sequence[int], num_tokens: int, num_sequences: int = 1) -> Route:
        """Choose a replica and count the request as its own: `choose`, then `started`."""
        chain, sizes = self._chain(hashes, num_tokens)
        replica, depth = self._choose(chain, sizes, num_tokens)
        return self._start(replica, chain[depth:], sizes[depth], num_tokens, num_sequences)

    def choose(self, hashes: Sequence[int], num_tokens: int) -> tuple[Hashable, int]:
        """The replica for a prompt, and the number of prompt tokens that it is thought to hold. Changes nothing.

        hashes: `short_hashes` of the prompt's full blocks. num_tokens: the prompt's. Raises EngineDeadError if there is
        no replica.
        """
        chain, sizes = self._chain(hashes, num_tokens)
        replica, depth = self._choose(chain, sizes, num_tokens)
        return replica.name, sizes[depth]

    def started(self, name: Hashable, hashes: Sequence[int], num_tokens: int, num_sequences: int = 1) -> Route:
        """Count a request as a replica's own. Until its events arrive, the replica is thought to hold the prompt.

        Otherwise the requests of one conversation that arrive together would scatter.
        """
        replica = self._replicas[name]
        chain, sizes = self._chain(hashes, num_tokens)
        depth = self._longest(chain, len(chain), ~self._bits[replica.slot])
        return self._start(replica, chain[depth:], sizes[depth], num_tokens, num_sequences)

    def prefilled(self, route: Route) -> None:
        """The request's first token has come, so its prompt is computed."""
        if route.is_open and route.num_pending:
            replica = self._replicas[route.replica]
            replica.num_pending -= route.num_pending
            route.num_pending = 0
            self._update_load(replica)

    def finished(self, route: Route) -> None:
        """The request has ended in any way. Call it after the events of its last step. May be called again."""
        if not route.is_open:
            return
        route.is_open = False
        replica = self._replicas[route.replica]
        del replica.routes[route]
        replica.num_sequences -= route.num_sequences
        replica.num_pending -= route.num_pending
        _clear(self._promises, route.promised, self._bits[replica.slot])
        self._update_load(replica)

    def _choose(self, chain: Sequence[int], sizes: Sequence[int], num_tokens: int) -> tuple[_Replica, int]:
        """The cheapest replica, and how many of the chain's blocks it is thought to hold.

        Prefixes are examined from the longest to the shortest, and of each length only the idlest holder, until no
        shorter prefix can cost less. An engine drops blocks from a prefix's end, so lengths are found by bisection.
        """
        if not self._order:
            raise EngineDeadError("no replica is left to compute the request: restart the server")
        usual_queue = USUAL_QUEUE * self._owner(self._order[0][2]).num_waiting
        best: _Replica | None = None
        best_cost, best_depth, seen, depth = 0, 0, 0, len(chain)
        while True:
            depth = self._longest(chain, depth, seen)
            among = (self._holders_of(chain[depth - 1]) if depth else self._all) & ~seen
            replica = self._idlest(among)
            if replica is not None:
                cost = num_tokens - sizes[depth] + replica.load
                cost -= WAITING_TOKENS * min(replica.num_waiting, usual_queue)
                cost -= self._own_pending(replica, chain, sizes, depth)
                if best is None or cost < best_cost:
                    best, best_cost, best_depth = replica, cost, depth
            if best is not None and (depth == 0 or num_tokens - sizes[depth - 1] >= best_cost):
                return best, best_depth
            seen |= among
            depth -= 1

    def _start(
        self, replica: _Replica, promised: Sequence[int], num_cached: int, num_tokens: int, num_sequences: int
    ) -> Route:
        bit, promises = self._bits[replica.slot], self._promises
        for block_hash in promised:
            before = promises.get(block_hash)
            promises[block_hash] = bit if before is None else before | bit
        route = Route(replica.name, num_cached, num_tokens - num_cached, num_sequences, promised)
        replica.routes[route] = None
        replica.num_sequences += num_sequences
        replica.num_pending += route.num_pending
        self._num_chosen += 1
        self._update_load(replica, turn=self._num_chosen)
        return route

    def _chain(self, hashes: Sequence[int], num_tokens: int) -> tuple[Sequence[int], Sequence[int]]:
        """The prompt's hashes that are kept, and the tokens of the first n of them for each n.

        An engine computes the last token anew in any case, so a block that ends with it does not count.
        """
        num_blocks = min(len(hashes), (num_tokens - 1) // self.block_size)
        if self.sampling == 1:
            return hashes[:num_blocks], range(0, (num_blocks + 1) * self.block_size, self.block_size)
        indices = [index for index in range(num_blocks) if hashes[index] % self.sampling == 0]
        return [hashes[index] for index in indices], [0, *((index + 1) * self.block_size for index in indices)]

    def _longest(self, chain: Sequence[int], longest: int, seen: int) -> int:
        """The length of the longest known prefix of chain[:longest] that a replica outside `seen` holds."""
        holders, promises = self._holders, self._promises
        low, high, unseen = 0, longest, ~seen
        while low < high:
            middle = (low + high + 1) // 2
            block_hash = chain[middle - 1]
            if (holders.get(block_hash, 0) | promises.get(block_hash, 0)) & unseen:
                low = middle
            else:
                high = middle - 1
        return low

    def _own_pending(self, replica: _Replica, chain: Sequence[int], sizes: Sequence[int], depth: int) -> int:
        """How many of the first `depth` blocks' tokens a replica is still computing, for another request."""
        if not replica.num_pending:
            return 0
        bit, low, high = self._bits[replica.slot], 0, depth
        while low < high:
            middle = (low + high + 1) // 2
            if self._holders.get(chain[middle - 1], 0) & bit:
                low = middle
            else:
                high = middle - 1
        return min(replica.num_pending, sizes[depth] - sizes[low])

    def _holders_of(self, block_hash: int) -> int:
        return self._holders.get(block_hash, 0) | self._promises.get(block_hash, 0)

    def _idlest(self, among: int) -> _Replica | None:
        """The idlest replica of a set; None if it is empty."""
        if among.bit_count() <= FEW:
            members = []
            while among:
                slot = among.bit_length() - 1
                members.append(self._owner(slot))
                among ^= self._bits[slot]
            return min(members, key=lambda replica: replica.rank, default=None)
        return self._owner(next(slot for _, _, slot in self._order if among >> slot & 1))

    def _owner(self, slot: int) -> _Replica:
        owner = self._slots[slot]
        assert owner is not None, f"{slot=} has no replica"
        return owner

    def _update_load(self, replica: _Replica, turn: int | None = None) -> None:
        del self._order[bisect_left(self._order, replica.rank)]
        replica.recount()
        replica.turn = replica.turn if turn is None else turn
        insort(self._order, replica.rank)


def _clear(masks: dict[int, int], hashes: Iterable[int], bit: int) -> None:
    """Remove a replica from the sets of blocks, and the sets that are empty then."""
    for block_hash in hashes:
        rest = masks.pop(block_hash, 0) & ~bit
        if rest:
            masks[block_hash] = rest
