"""Attention of one token row whose context is shared out over threadgroups, and how its parts become one again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tinygrad import UOp

from tinyvllm.ops.gpu_kernel import LANES, axes_of, carry, load_floats, zeros
from tinyvllm.ops.kernel import F32, Body, KernelFn, cached_kernel, clamp, finish
from tinyvllm.ops.step_inputs import StepLayout

TILE_TOKENS = 16  # context tokens of a tile; a part's first token is a multiple
SHORTEST_SPAN = 128  # tokens that are worth a threadgroup of their own
NOTHING = -1.0e30  # log-sum-exp of no tokens at all: finite, for a difference of two must not be NaN


@dataclass(frozen=True)
class SplitHeads:
    """Row 0's attention in S parts: values (S, H, D) float32, each normalised by itself, and log2-sum-exp (S, H)."""

    layout: StepLayout
    num_heads: int  # H
    head_dim: int  # D
    num_parts: int  # S; how many of them are in use follows the context

    @property
    def num_cols(self) -> int:
        return self.num_heads * self.head_dim

    def span(self, past: UOp) -> UOp:
        """Context tokens of a part, when `past` are in the pool."""
        if self.num_parts == 1:
            return past
        unit = TILE_TOKENS * self.num_parts
        return ((past + (unit - 1)) // unit * TILE_TOKENS).maximum(SHORTEST_SPAN)

    def used(self, past: UOp) -> UOp:
        """Parts in use: at least one."""
        span = self.span(past)
        return ((past + (span - 1)) // span).maximum(1)

    def past(self, inputs: UOp) -> UOp:
        """Tokens of row 0's context before its own."""
        limit = max(self.layout.max_blocks * self.layout.block_size, 2 * SHORTEST_SPAN * self.num_parts)
        return clamp(inputs[self.layout.offset("positions")].load(), 0, limit - 1)


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
