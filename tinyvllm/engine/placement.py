"""Which engine runs a call: the router's rule, fed with what the engines say of themselves."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence

from tinyvllm.config import Capacity
from tinyvllm.engine.messages import Blocks, NewRequest
from tinyvllm.engine.routing import Route, Router, short_hashes
from tinyvllm.scheduling.block_hashes import hash_blocks
from tinyvllm.scheduling.plan import StepStats


class Placement:
    """Owns one client's router over the engines, numbered from 0. Other clients have routers of their own, and learn of
    this one's requests from the engines' counts."""

    def __init__(self, capacity: Capacity, engine_stats: Callable[[], list[StepStats]]) -> None:
        self._router = Router(capacity.block_size)
        self._capacity = capacity
        self._engine_stats = engine_stats

    def add(self, engine: int) -> None:
        """An engine is ready."""
        if engine not in self._router.replicas:
            self._router.add(engine, self._capacity.max_num_seqs)

    def remove(self, engine: int) -> None:
        """An engine has died. Its routes are finished."""
        if engine in self._router.replicas:
            self._router.remove(engine)

    def place(self, requests: Sequence[NewRequest]) -> Route:
        """Choose an engine for the choices of one prompt. Raises EngineDeadError if none is left."""
        prompt_ids = requests[0].prompt_ids
        for engine, stats in enumerate(self._engine_stats()):
            if engine in self._router.replicas:
                self._router.reported(engine, stats.num_running + stats.num_waiting, 0)
        hashes = short_hashes(hash_blocks(prompt_ids, self._capacity.block_size, requests[0].hash_seed))
        return self._router.route(hashes, len(prompt_ids), len(requests))

    def prefilled(self, route: Route) -> None:
        """The call has its first output."""
        self._router.prefilled(route)

    def finished(self, route: Route) -> None:
        """The call has ended in any way. May be called again."""
        self._router.finished(route)

    def learn(self, engine: int, blocks: Blocks) -> None:
        """An engine tells how its prefix cache has changed."""
        if engine in self._router.replicas:
            self._router.removed(engine, unpack_hashes(blocks.removed))
            self._router.stored(engine, unpack_hashes(blocks.stored))


def pack_hashes(hashes: Sequence[bytes]) -> bytes:
    """The first 8 bytes of each block hash."""
    return array("Q", short_hashes(hashes)).tobytes()


def unpack_hashes(data: bytes) -> list[int]:
    hashes = array("Q")
    hashes.frombytes(data)
    return hashes.tolist()
