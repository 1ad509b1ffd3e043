"""Tensor maps, which tell Hopper's copy engine where a box of a matrix lies, as parameters of a kernel.

A kernel says which of its arguments a map describes, and how (`MapOfArgument`). The driver writes the map when the
kernel's arguments are set, and it is passed by value: so the kernel need not write it, nor wait for a write to be seen.
(CUDA C++ Programming Guide, "Using TMA to transfer multi-dimensional arrays".)
"""

from __future__ import annotations

import ctypes
import re
from dataclasses import dataclass
from typing import ClassVar, Self

MAP_BYTES = 128
MAP_ALIGNED = 64  # bytes of which the driver writes a map at a multiple, and a parameter has a map


@dataclass(frozen=True)
class Box:
    """The box that one copy fetches from a float16 matrix with dimensions of `sizes`, innermost first. `strides`: in
    bytes, of all dimensions but the innermost, whose values are contiguous. It begins at a multiple of 16 bytes. The
    copy engine swizzles rows of 128 bytes, unless it shall not."""

    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    is_swizzled: bool = True


@dataclass(frozen=True)
class MapOfArgument:
    """A kernel's map of a number, of an argument; both count from 0. As text it stays with the machine code."""

    number: int
    argument: int
    box: Box

    TEXT: ClassVar[re.Pattern[str]] = re.compile(
        r"tensor map (\d+) of argument (\d+): ([\d,]+), strides ([\d,]*), box ([\d,]+), swizzled (\d)"
    )

    def __str__(self) -> str:
        sizes, strides, box = (",".join(map(str, each)) for each in (self.box.sizes, self.box.strides, self.box.box))
        swizzled = int(self.box.is_swizzled)
        return (
            f"tensor map {self.number} of argument {self.argument}: "
            f"{sizes}, strides {strides}, box {box}, swizzled {swizzled}"
        )

    @classmethod
    def all_of(cls, code: bytes) -> list[Self]:
        """Those of a compiled kernel, in the order of its parameters."""
        found = [cls._read(found) for found in re.finditer(cls.TEXT.pattern.encode(), code)]
        return sorted(found, key=lambda one: one.number)

    @classmethod
    def _read(cls, found: re.Match[bytes]) -> Self:
        sizes, strides, box = (tuple(map(int, found[i].split(b","))) for i in (3, 4, 5))
        return cls(int(found[1]), int(found[2]), Box(sizes, strides, box, found[6] == b"1"))


def encode_map(address: int, box: Box) -> bytes:
    """The map of a matrix at an address of a CUDA device."""
    from tinygrad.runtime.autogen import cuda  # loads the driver
    from tinygrad.runtime.ops_cuda import check

    memory = (ctypes.c_uint8 * (MAP_BYTES + MAP_ALIGNED))()
    first = -ctypes.addressof(memory) % MAP_ALIGNED
    rank = len(box.sizes)
    check(
        cuda.cuTensorMapEncodeTiled(
            cuda.CUtensorMap.from_buffer(memory, first),
            cuda.CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
            rank,
            address,
            (ctypes.c_uint64 * rank)(*box.sizes),
            (ctypes.c_uint64 * (rank - 1))(*box.strides),
            (ctypes.c_uint32 * rank)(*box.box),
            (ctypes.c_uint32 * rank)(*[1] * rank),
            cuda.CU_TENSOR_MAP_INTERLEAVE_NONE,
            cuda.CU_TENSOR_MAP_SWIZZLE_128B if box.is_swizzled else cuda.CU_TENSOR_MAP_SWIZZLE_NONE,
            cuda.CU_TENSOR_MAP_L2_PROMOTION_NONE,
            cuda.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    )
    return bytes(memory)[first : first + MAP_BYTES]
