"""What NVIDIA's Hopper multiplies matrices by: instructions of four warps together that read both operands from
threadgroup memory, of which a kernel may have more than tinygrad gives it.

Both take a word with tinygrad: its compiler must be told the target by its full name, for these instructions belong to
one generation and not to its successors, and a kernel's launch how much memory it takes (`wide_bytes` in its name).
"""

from __future__ import annotations

import re
from typing import Any

from tinygrad import Device, UOp, dtypes
from tinygrad.device import TinyELF
from tinygrad.helpers import Target
from tinygrad.renderer.cstyle import CUDARenderer
from tinygrad.uop.ops import Ops

from tinyvllm.ops.gpu_gemm_tiles import PTX_NAMES, TILE_COLS, TileMma
from tinyvllm.ops.kernel import F16

ARCH = "sm_90"
WIDE_TOKENS = 64  # left rows of one instruction
BYTES_IN_NAME = re.compile(r"_wide(\d+)$")

DECLARE = "extern __shared__ __align__(1024) half tiles[];"
COPY = (
    'asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" :: '
    '"r"((unsigned)__cvta_generic_to_shared(tiles + {0})), "l"({1}), "r"({2}) : "memory");'
)
# A tile whose slots are swizzled as TileMma.at does it: 64 bytes a row, 8 rows every 512 bytes (PTX, "wgmma", matrix
# descriptor). Where it begins is added, in units of 16 bytes.
DESCRIPTOR = "0x8000002000010000ull + ((unsigned)__cvta_generic_to_shared(tiles + {%d}) >> 4)"
FENCE = 'asm volatile("wgmma.fence.sync.aligned;" ::: "memory");'
COMMIT = 'asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");'
# the products before have read their tiles, this thread's copies are there, and the next products will see them
ARRIVE = (
    'asm volatile("wgmma.wait_group.sync.aligned 0;\\n cp.async.wait_group %d;\\n fence.proxy.async.shared::cta;" '
    '::: "memory");'
)


class HopperRenderer(CUDARenderer):
    """tinygrad's, with a compiler for the full target. Its name is part of what compiled programs are kept by."""

    def __init__(self, target: Target) -> None:
        super().__init__(target)
        use_full_target(self.compiler)


def use_full_target(compiler: Any) -> None:
    """Replace sm_90 by sm_90a in a compiler's options."""
    option = f"--gpu-architecture={ARCH}"
    compiler.compile_options = [option + "a" if given == option else given for given in compiler.compile_options]


def allow_wide(device_name: str) -> bool:
    """Whether a device has these instructions; if so, it and its compiler are told of them."""
    device = Device[device_name]
    renderer = device.renderer
    if renderer.target.arch != ARCH or type(renderer) not in (CUDARenderer, HopperRenderer):
        return False
    if type(renderer) is CUDARenderer:
        use_full_target(renderer.compiler)
        renderer.__class__ = HopperRenderer  # by which tinygrad's processes that compile beside this one make their own
        make = device.runtime_t
        assert make is not None

        def program(owner: Any, compiled: TinyELF) -> Any:
            found = BYTES_IN_NAME.search(compiled.name)
            return make(owner, compiled, smem=int(found[1])) if found else make(owner, compiled)

        device.runtime_t = program
    return True


# -- statements. Places are numbers of values from the beginning of the kernel's memory --------------------------------


def declare() -> UOp:
    """The kernel's memory: every statement that names a place comes behind it."""
    return UOp(Ops.CUSTOM, dtypes.void, src=(UOp.const(0.0, F16),), arg=DECLARE)


def copy_wide(place: UOp, source: UOp, is_wanted: UOp | None, *after: UOp) -> UOp:
    """Begin to move 16 bytes from device memory; zeros where they are not wanted (None: they are)."""
    whole = UOp.const(16, dtypes.int)
    size = whole if is_wanted is None else is_wanted.where(whole, 0)
    return UOp(Ops.CUSTOM, dtypes.void, src=(place, source, size, *after), arg=COPY)


def arrive_wide(pending: int, *after: UOp) -> UOp:
    """The products are done, and all but the `pending` latest groups of copies have arrived, in all threads: a
    barrier."""
    return UOp(Ops.BARRIER, src=(UOp(Ops.CUSTOM, dtypes.void, src=after, arg=ARRIVE % pending),))


def multiply_wide(mma: TileMma, pairs: list[tuple[UOp, UOp]], sums: UOp, *after: UOp) -> UOp:
    """Begin to add to the registers `sums` the products of pairs of tiles: left (64 x 32) and right (8 n x 32), by the
    places they begin at. Of the n blocks' sums a lane holds as many as of n blocks of `TileMma.add`."""
    count = sums.max_numel()
    operands = ", ".join(f"%{i}" for i in range(count))
    registers = ", ".join(f'"+f"(*{{{i}}})' for i in range(count))
    name = PTX_NAMES[mma.mma.dtype]
    lines = [FENCE]
    for i in range(len(pairs)):
        a, b = DESCRIPTOR % (count + 2 * i), DESCRIPTOR % (count + 2 * i + 1)
        lines.append(f"{{{{ unsigned long long a = {a}, b = {b};")
        for k in range(TILE_COLS // 16):
            lines.append(
                f'asm volatile("wgmma.mma_async.sync.aligned.m64n{count * 2}k16.f32.{name}.{name} '
                f'{{{{{operands}}}}}, %{count}, %{count + 1}, 1, 1, 1, 0, 0;" : '
                f'{registers} : "l"(a + {2 * k}), "l"(b + {2 * k}));'
            )
        lines.append("}}")
    places = [place for pair in pairs for place in pair]
    src = (*[sums[i] for i in range(count)], *places, *after)
    return UOp(Ops.CUSTOM, dtypes.void, src=src, arg="\n".join([*lines, COMMIT]))


def finish_wide(sums: UOp, *after: UOp) -> UOp:
    """All products are done, and `sums` may be read: a barrier."""
    count = sums.max_numel()
    registers = ", ".join(f'"+f"(*{{{i}}})' for i in range(count))
    arg = f'asm volatile("wgmma.wait_group.sync.aligned 0;" : {registers} :: "memory");'
    waited = UOp(Ops.CUSTOM, dtypes.void, src=(*[sums[i] for i in range(count)], *after), arg=arg)
    return UOp(Ops.BARRIER, src=(waited,))
