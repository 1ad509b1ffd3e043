"""Attention of rows whose context is shared out over threadgroups, and how its parts become one again.

One row's parts are read as such by the projection behind, or made one by a kernel (`combine_kernel`). Of several rows,
on CUDA, the threadgroup that is done last makes them one: it knows by a counter that it is the last (`arrive`), and
sees by fences what the others wrote. METAL gives no such order between threadgroups; several rows fill such a device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tinygrad import UOp, dtypes
from tinygrad.uop.ops import Ops

from tinyvllm.ops.kernel.body import F32, I32, Body, KernelFn, cached_kernel, clamp, finish
from tinyvllm.ops.kernel.lanes import LANES, axes_of, carry, load_floats, zeros
from tinyvllm.ops.step_inputs import StepLayout

TILE_TOKENS = 16  # context tokens of a tile; a part's first token is a multiple
SHORTEST_SPAN = 128  # tokens that are worth a threadgroup of their own
NOTHING = -1.0e30  # log-sum-exp of no tokens at all: finite, for a difference of two must not be NaN


@dataclass(frozen=True)
class SplitHeads:
    """Attention of T rows in S parts: values (S, T, H, D) float32, each normalised by itself, and log2-sum-exp
    (S, T, H)."""

    layout: StepLayout
    num_heads: int  # H
    head_dim: int  # D
    num_parts: int  # S; how many of them are in use follows the context
    window: int | None = None  # tokens that a row attends to, its own included

    @property
    def num_cols(self) -> int:
        return self.num_heads * self.head_dim

    def start(self, past: UOp) -> UOp | int:
        """The first token that is shared out, where the row's own comes after `past`: a tile's first."""
        if self.window is None:
            return 0
        return (past - (self.window - 1)).maximum(0) // TILE_TOKENS * TILE_TOKENS

    def shared(self, past: UOp) -> UOp:
        """How many tokens are shared out."""
        return past if self.window is None else past - self.start(past)

    def span(self, past: UOp) -> UOp:
        """Tokens of a part, when `past` are shared out."""
        if self.num_parts == 1:
            return past
        unit = TILE_TOKENS * self.num_parts
        return ((past + (unit - 1)) // unit * TILE_TOKENS).maximum(SHORTEST_SPAN)

    def used(self, past: UOp) -> UOp:
        """Parts in use: at least one."""
        span = self.span(past)
        return ((past + (span - 1)) // span).maximum(1)

    def past(self, inputs: UOp) -> UOp:
        """How many tokens of row 0's context are shared out."""
        limit = max(self.layout.max_blocks * self.layout.block_size, 2 * SHORTEST_SPAN * self.num_parts)
        return self.shared(clamp(inputs[self.layout.offset("positions")].load(), 0, limit - 1))


def read_split(
    body: Body, split: SplitHeads, values: UOp, sums: UOp, inputs: UOp, col: UOp, width: int, outer: Sequence[UOp]
) -> list[UOp]:
    """Columns [col, col + width) of the whole attention; they lie in one head."""

    def step(part: UOp | int, old: list[UOp]) -> list[UOp]:
        here = sums[part * split.num_heads + col // split.head_dim].load()
        best = old[0].maximum(here)
        before, now = (old[0] - best).exp2(), (here - best).exp2()
        new = load_floats(values, part * split.num_cols + col, width)
        return [
            best,
            old[1] * before + now,
            *[a * before + b * now for a, b in zip(old[2:], new, strict=True)],
        ]

    init = [UOp.const(NOTHING, F32), *zeros(width + 1)]
    _, total, *acc = carry(body, init, split.used(split.past(inputs)), outer, step)
    inverse = total.reciprocal()
    return [value * inverse for value in acc]


# -- the last threadgroup of a row's -----------------------------------------------------------------------------------

ARRIVE = "if ({0} && threadIdx.x == 0 && threadIdx.y == 0) {{ __threadfence(); *({1}) = atomicAdd({2}, 1); }}"
SEE = "if ({0}) __threadfence();"


def arrive(body: Body, arrivals: UOp, at: UOp, is_shared: UOp, count: UOp, *stores: UOp) -> tuple[UOp, UOp]:
    """(whether this threadgroup is the last of `count` to come here, as a condition that holds in all of its threads;
    what comes after having seen what they stored). Nothing happens where not `is_shared`. CUDA's alone."""
    number = body.shared(1, I32)
    stored = UOp(Ops.BARRIER, src=(UOp.group(*stores),))
    src = (is_shared, number.after(stored)[0], arrivals.after(stored)[at])
    arrived = UOp(Ops.BARRIER, src=(UOp(Ops.CUSTOM, dtypes.void, src=src, arg=ARRIVE),))
    is_last = is_shared & number.after(arrived)[0].load().eq(count.cast(I32) - 1)
    seen = UOp(Ops.BARRIER, src=(UOp(Ops.CUSTOM, dtypes.void, src=(is_last,), arg=SEE),))
    return is_last, seen


@cached_kernel
def combine_kernel(split: SplitHeads) -> KernelFn:
    """fn(out (H * D,), values, sums, inputs): the whole attention, for who cannot read its parts."""

    def kernel(out: UOp, values: UOp, sums: UOp, inputs: UOp) -> UOp:
        body, width = Body(), 8
        group, lane = body.grid(-(-split.num_cols // (width * LANES))), body.threads(LANES)
        axes = axes_of(group, lane)
        col = (group * LANES + lane) * width
        is_inside = col < split.num_cols
        whole = read_split(body, split, values, sums, inputs, is_inside.where(col, 0), width, axes)
        stores = [out[(col + i).valid(is_inside)].store(value.cast(out.dtype)) for i, value in enumerate(whole)]
        name = f"combine_{split.num_heads}x{split.head_dim}"
        return finish(UOp.group(*stores).end(*reversed(axes)), name, nbytes=8 * split.num_cols)

    return kernel
