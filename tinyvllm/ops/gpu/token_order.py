"""The order of token rows in which `quantized_wgmma_kernel` reads them.

Lanes read whole runs of 32 codes, and wgmma fixes which columns a lane multiplies in one instruction. So the columns of
each chunk of 128 take turns: their order is that of the lanes' codes. What writes the tokens (a norm, a product before,
or `order_rows_kernel`) puts them there, in the swizzled panels that the matrix unit reads from threadgroup memory, so
that a stage's tokens are one copy.
"""

from __future__ import annotations

from typing import TypeVar

from tinygrad import UOp

from tinyvllm.ops.formats.matrix import PANEL
from tinyvllm.ops.kernel.body import I32, Body, KernelFn, cached_kernel, clamp, finish
from tinyvllm.ops.kernel.hopper import WGMMA_COLS
from tinyvllm.ops.kernel.lanes import LANES, Lanes, await_previous

CHUNK_COLS = 4 * PANEL  # a run for each of the four lanes that share a row of the matrix
COLS_A_PIECE = 8  # of 16 bytes

Number = TypeVar("Number", int, UOp)


def ordered_col(place: Number) -> Number:
    """The column of x that is at a place of the matrix unit's order, in a chunk. An instruction takes 16 places. Of
    those, two neighbors and the two that come eight later belong to one lane, which multiplies them by four neighboring
    codes: those of a word's lower or upper halves of bytes, as `read_pairs` orders them."""
    step, lane, is_second, is_odd = place // 16, place % 8 // 2, place % 16 // 8, place % 2
    return lane * PANEL + step % 2 * (PANEL // 2) + step // 2 * 4 + is_second + is_odd * 2


def ordered_place(col: Number) -> Number:
    """The place of a column: the inverse of `ordered_col`."""
    lane, four, inner = col // PANEL, col % PANEL // 4, col % 4
    step = four % 4 * 2 + four // 4
    return step * 16 + inner % 2 * 8 + lane * 2 + inner // 2


def token_place(token: Number, col: Number, token_cols: int) -> Number:
    """Where a value of x is in what the products read: panels of 64 places for all tokens, whose pieces of 16 bytes are
    swizzled as the matrix unit expects them."""
    place = ordered_place(col % CHUNK_COLS)
    panel, inner = col // CHUNK_COLS * (CHUNK_COLS // WGMMA_COLS) + place // WGMMA_COLS, place % WGMMA_COLS
    piece = _swizzled(inner // COLS_A_PIECE, token % 8)
    return (panel * token_cols + token) * WGMMA_COLS + piece * COLS_A_PIECE + inner % COLS_A_PIECE


def _swizzled(piece: Number, row: Number) -> Number:
    """Where one of the eight pieces of a row of 128 bytes is."""
    if isinstance(piece, int) and isinstance(row, int):
        return piece ^ row
    pair = [UOp.const(0, I32) + value for value in (piece, row)]
    return clamp(pair[0] ^ pair[1], 0, 7)  # tinygrad knows no bounds of ^


def token_cols(num_tokens: int) -> int:
    """Tokens of an instruction, which are a multiple of 8; those after the last are whatever is in memory."""
    return -(-num_tokens // 8) * 8


def token_places(token: Number, col: Number, count: int, num_tokens: int) -> list[Number]:
    """`token_place` of neighboring columns, from a multiple of 4 on: of every four, the first and the third have
    neighboring places, and so have the others."""
    pairs = [
        [token_place(token, col + four + i, token_cols(num_tokens)) for i in range(2)] for four in range(0, count, 4)
    ]
    return [pair[i % 2] + i // 2 for pair in pairs for i in range(4)]


@cached_kernel
def order_rows_kernel(lanes: Lanes, num_tokens: int, num_cols: int, restores: bool) -> KernelFn:
    """fn(out (K * T rounded up to 8,), x (T, K)): x as the products read it; or `restores` x: the other way round."""

    def kernel(out: UOp, x: UOp) -> UOp:
        body, threads = Body(), next(count for count in (128, 64, LANES) if num_cols % (4 * count) == 0)
        token, group, thread = body.grid(num_tokens), body.grid(num_cols // 4 // threads), body.threads(threads)
        (x,) = await_previous(lanes, x)
        col = (group * threads + thread) * 4
        ordered, plain = token_places(token, col, 4, num_tokens), [token * num_cols + col + i for i in range(4)]
        pairs = zip(plain, ordered, strict=True) if restores else zip(ordered, plain, strict=True)
        end = UOp.group(*[out[to].store(x[at].load()) for to, at in pairs]).end(thread, group, token)
        name = f"{'restore' if restores else 'order'}_{num_tokens}x{num_cols}"
        return finish(end, name, nbytes=4 * num_tokens * num_cols)

    return kernel
