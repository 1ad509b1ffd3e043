"""Memory for a step's intermediate values: buffers that are in use at different times share it.

The rules and the allocator are those of tinygrad's `memory_plan_rewrite`, and so are the offsets. It plans by rewriting
the step as UOps, and each buffer's place becomes a view that is looked up by more rewriting: 0.2 s for a step of 30
layers. Here a place is a view of an arena from the start.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tinygrad import UOp, dtypes
from tinygrad.device import Buffer
from tinygrad.helpers import NO_MEMORY_PLANNER
from tinygrad.runtime.support.memory import TLSFAllocator
from tinygrad.uop.ops import Ops

ALIGNMENT = 256  # bytes: that of tinygrad's plan, and the largest that a device requires of a buffer's offset
WITHOUT_VIEWS = ("DISK", "TINYFS", "CL", "WEBGPU")  # prefixes of devices whose buffers have no views
LEVELS = 32  # the second-level classes of tinygrad's allocator

Launch = tuple[UOp, tuple[UOp, ...]]  # a kernel's SINK or a COPY, and its arguments
Lane = tuple[str, bool]  # device, and whether copies read or write it: these share no memory with other kernels


@dataclass
class _Life:
    """The launches that use a buffer: first and last."""

    first: int
    last: int
    is_copied: bool = False

    @property
    def end(self) -> int:
        """The launch before which its memory is free. A copied buffer is held twice as long, because a copy may still
        run while kernels after it do."""
        return self.last + 1 + (self.last - self.first + 1 if self.is_copied else 0)


def aligned(nbytes: int) -> int:
    """The next multiple of ALIGNMENT."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def plan_memory(launches: Sequence[Launch], is_held: Callable[[UOp], bool]) -> dict[UOp, Buffer]:
    """Views of arenas, one per lane, for all buffers of the launches that are not held. Their memory is not allocated.
    A buffer of which a launch gets a view counts as held."""
    lives = {} if NO_MEMORY_PLANNER else _lives_of(launches, is_held)
    sizes = {buffer: buffer.max_numel() * buffer.dtype.itemsize for buffer in lives}
    total = 2 * sum(aligned(size) for size in sizes.values())
    allocators: dict[Lane, TLSFAllocator] = defaultdict(
        lambda: TLSFAllocator(total, block_size=ALIGNMENT, lv2_cnt=LEVELS)
    )
    offsets: dict[UOp, int] = {}
    ends: dict[Lane, int] = defaultdict(int)
    opened = [(life.first, True, buffer) for buffer, life in lives.items()]
    closed = [(life.end, False, buffer) for buffer, life in lives.items()]
    for _, is_open, buffer in sorted((*opened, *closed), key=lambda event: event[:2]):
        lane = str(buffer.device), lives[buffer].is_copied
        if is_open:
            offsets[buffer] = allocators[lane].alloc(aligned(sizes[buffer]))
            ends[lane] = max(ends[lane], offsets[buffer] + sizes[buffer])
        else:
            allocators[lane].free(offsets[buffer])
    arenas = {lane: Buffer(lane[0], aligned(end), dtypes.int8) for lane, end in ends.items()}
    return {
        buffer: arenas[str(buffer.device), lives[buffer].is_copied].view(buffer.max_numel(), buffer.dtype, offset)
        for buffer, offset in offsets.items()
    }


def _lives_of(launches: Sequence[Launch], is_held: Callable[[UOp], bool]) -> dict[UOp, _Life]:
    """Of the buffers to plan, in the order of their first use."""
    views = {arg for _, args in launches for arg in args if arg.op is not Ops.BUFFER}
    viewed = {uop for view in views for uop in view.toposort() if uop.op is Ops.BUFFER}
    lives: dict[UOp, _Life] = {}
    unplanned: set[UOp] = set(viewed)
    for number, (target, args) in enumerate(launches):
        for arg in args:
            if arg in unplanned or arg in views:
                continue
            life = lives.get(arg)
            if life is None:
                if is_held(arg) or str(arg.device).startswith(WITHOUT_VIEWS):
                    unplanned.add(arg)
                    continue
                life = lives[arg] = _Life(number, number)
            life.last = number
            life.is_copied |= target.op is Ops.COPY
    return lives
