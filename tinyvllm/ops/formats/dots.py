"""The `dot` layout's words: codes as x86's products of 16-bit integers read them.

`vpmaddwd` and `vpdpwssd` multiply the two 16-bit halves of each 32-bit lane and add both products. A lane is a row of a
panel, so a word holds neighboring columns of one row: columns 2i and 2i + 1 of a run lie in the lower and the upper
half, at bit `width * i`. One shift and one mask of a vector of words give the operand for a pair of columns.
"""

from __future__ import annotations

import numpy as np
from tinygrad import Tensor, UOp, dtypes

from tinyvllm.ops.kernel.body import I32, U32

WORD, HALF_WORD = 32, 16  # bits


def dot_cols(width: int) -> int:
    """Columns of a run: those whose codes of `width` bits share a word."""
    return WORD // width


def pack_dots(codes: np.ndarray, width: int) -> np.ndarray:
    """(N, K) codes, of which the low `width` bits count -> (N, K / run) words."""
    words = np.ascontiguousarray(codes).view(np.uint32)  # bytes: even column, odd column, even, odd
    if width < 8:
        words = words & np.uint32(((1 << width) - 1) * 0x01010101)
    while width < 8:  # put the later pair of columns above the earlier, and keep the lower half of the word
        words = (words | words >> np.uint32(HALF_WORD - width)).astype(np.uint16).view(np.uint32)
        width *= 2
    packed = words & np.uint32(0xFF0000FF)  # and change the places of the bytes in the middle
    packed |= (words & np.uint32(0xFF00)) << np.uint32(8)
    packed |= words >> np.uint32(8) & np.uint32(0xFF00)
    return packed.reshape(len(codes), -1)


def unpack_dots(words: Tensor, width: int) -> Tensor:
    """Words of panels, flat -> (runs, columns of a run, 32) codes as uint32."""
    col = Tensor.arange(dot_cols(width), dtype=dtypes.uint).reshape(1, -1, 1)
    shifts = col % 2 * HALF_WORD + col // 2 * width
    return words.reshape(-1, 1, WORD) >> shifts & ((1 << width) - 1)


def dot_code(plane: UOp, width: int, row: UOp, col: UOp, num_cols: int) -> UOp:
    """The code of one weight, int32, without its sign."""
    run = dot_cols(width)
    word = plane[(row // WORD * (num_cols // run) + col // run) * WORD + row % WORD].load()
    place = col % run
    shift = (place % 2 * HALF_WORD + place // 2 * width).cast(U32)
    return (word >> shift & ((1 << width) - 1)).cast(I32)
