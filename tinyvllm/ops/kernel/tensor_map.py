"""Tensor maps, which tell Hopper's copy engine where a box of a matrix lies, written by the driver: once for what stays
where it is, as weights do. A kernel that follows such a map acquires it (hopper.py), and need not write it first.
"""

from __future__ import annotations

import ctypes

import numpy as np
from numpy.typing import NDArray
from tinygrad.device import Buffer

from tinyvllm.device.meta import has_memory
from tinyvllm.ops.kernel.hopper import MAP_WORDS, Box

MAP_ALIGNED = 64  # bytes of which the driver writes a map at a multiple


def encode_map(matrix: Buffer, box: Box) -> NDArray[np.uint32]:
    """The map of a matrix in a CUDA device's memory; zeros for a buffer without memory, and on other devices."""
    if matrix.device.split(":")[0] != "CUDA" or not has_memory(matrix.device):
        return np.zeros(MAP_WORDS, np.uint32)
    from tinygrad.runtime.autogen import cuda  # loads the driver
    from tinygrad.runtime.ops_cuda import check

    memory = np.zeros(MAP_WORDS * 4 + MAP_ALIGNED, np.uint8)
    first = -memory.ctypes.data % MAP_ALIGNED
    encoded = memory[first : first + MAP_WORDS * 4]
    rank = len(box.sizes)
    check(
        cuda.cuTensorMapEncodeTiled(
            cuda.CUtensorMap.from_buffer(encoded),
            cuda.CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
            rank,
            matrix.ensure_allocated()._buf.value,
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
    return encoded.view(np.uint32).copy()
