"""Copies of blocks between a pool on the device and memory of the host, many blocks at a time.

A block is a piece of each of several tensors, its *planes*: the keys and values of all layers of a group, for example.
In host memory its pieces lie one after another, in one row.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from tinygrad import Tensor
from tinygrad.device import Buffer

from tinyvllm.faults import reach

Rows = NDArray[np.uint8]  # (rows, bytes of a block)


@dataclass(frozen=True)
class Plane:
    """A tensor of which each block has `nbytes` bytes, in the order of their numbers."""

    buffer: Buffer
    nbytes: int


@dataclass(frozen=True)
class Copy:
    """A block, and the row of host memory that it is copied to or from."""

    block_id: int
    rows: Rows
    row: int


class Transfer(Protocol):
    """Copies on their way."""

    def is_done(self) -> bool:
        """Whether they have arrived, and what they were read from may change."""

    def wait(self) -> None:
        """Return when they have. May be called from any thread."""

    @property
    def seconds(self) -> float:
        """How long they took, once they have arrived."""


class BlockCopies(Protocol):
    """Copies the blocks of one pool. Methods may be called from the engine's thread only."""

    follows_steps: bool  # copies run on the device in the order of calls and steps; else they run at once

    def copy_out(self, copies: Sequence[Copy]) -> Transfer:
        """Copy blocks to the host."""

    def copy_in(self, copies: Sequence[Copy]) -> Transfer:
        """Copy rows to blocks."""


def planes_of(tensors: Sequence[Tensor], num_blocks: int) -> list[Plane]:
    """The planes of tensors that hold `num_blocks` blocks each."""
    planes = []
    for tensor in tensors:
        buffer = tensor.uop.base.buffer.ensure_allocated()
        assert buffer.nbytes % num_blocks == 0, f"{buffer.nbytes} bytes are not {num_blocks} blocks"
        planes.append(Plane(buffer, buffer.nbytes // num_blocks))
    return planes


class MappedCopies:
    """On a device whose memory the host reads and writes in place. The caller waits for steps that use the blocks."""

    follows_steps = False

    def __init__(self, planes: Sequence[Plane]) -> None:
        self._planes = []
        start = 0
        for plane in planes:
            memory = plane.buffer.as_memoryview(force_zero_copy=True, no_sync=True)
            blocks = np.frombuffer(memory, np.uint8).reshape(-1, plane.nbytes)
            self._planes.append((blocks, slice(start, start + plane.nbytes)))
            start += plane.nbytes

    def copy_out(self, copies: Sequence[Copy]) -> Transfer:
        reach("tier.copy_out")
        start_s = time.perf_counter()
        for rows, targets, ids in _by_memory(copies):
            for blocks, part in self._planes:
                rows[targets, part] = blocks[ids]
        return _Done(time.perf_counter() - start_s)

    def copy_in(self, copies: Sequence[Copy]) -> Transfer:
        reach("tier.copy_in")
        start_s = time.perf_counter()
        for rows, sources, ids in _by_memory(copies):
            for blocks, part in self._planes:
                blocks[ids] = rows[sources, part]
        return _Done(time.perf_counter() - start_s)


def _by_memory(copies: Sequence[Copy]) -> list[tuple[Rows, list[int], list[int]]]:
    """Each array of rows, with the rows and the blocks that are copied."""
    found: dict[int, tuple[Rows, list[int], list[int]]] = {}
    for copy in copies:
        _, rows, ids = found.setdefault(id(copy.rows), (copy.rows, [], []))
        rows.append(copy.row)
        ids.append(copy.block_id)
    return list(found.values())


@dataclass(frozen=True)
class _Done:
    seconds: float

    def is_done(self) -> bool:
        return True

    def wait(self) -> None:
        pass
