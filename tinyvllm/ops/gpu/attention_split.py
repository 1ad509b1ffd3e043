"""Attention over a context that is split between threadgroups, and how the splits are combined (flash-decoding).

The splits of a single row are read by the projection that follows, or combined by a kernel (`combine_kernel`). Those of
several rows are combined on CUDA by the threadgroup that finishes last: a counter tells it that it is the last
(`arrive`), and fences make the others' results visible to it. METAL has no such order between threadgroups, and needs
none: several rows fill such a device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tinygrad import UOp, dtypes
from tinygrad.uop.ops import Ops

from tinyvllm.ops.kernel.body import F32, I32, Body, KernelFn, cached_kernel, clamp, finish
from tinyvllm.ops.kernel.lanes import LANES, axes_of, carry, load_floats, zeros
from tinyvllm.ops.step_inputs import StepLayout

TILE_TOKENS = 16  # context tokens of a tile; a split's first token is a multiple
SHORTEST_SPAN = 128  # the fewest tokens that are worth a threadgroup
NOTHING = -1.0e30  # log-sum-exp of no tokens: finite, because the difference of two must not be NaN


@dataclass(frozen=True)
class SplitHeads:
    """Attention of T rows over a context in S splits: values (S, T, H, D) in float32, each split normalized by itself,
    and their log2-sum-exp (S, T, H)."""

    layout: StepLayout
    num_heads: int  # H
    head_dim: int  # D
    num_splits: int  # S; how many are in use depends on the context's length
    window: int | None = None  # tokens that a row attends to, its own included
    has_own_token: bool = False  # the row's own token is among those that are split
    shortest_span: int = SHORTEST_SPAN

    @property
    def num_cols(self) -> int:
        return self.num_heads * self.head_dim

    def start(self, past: UOp) -> UOp | int:
        """The first token of the first split, for a row with `past` tokens before its own: the first of a tile."""
        if self.window is None:
            return 0
        return (past - (self.window - 1)).maximum(0) // TILE_TOKENS * TILE_TOKENS

    def shared(self, past: UOp) -> UOp:
        """How many tokens are split, of `past` tokens before the row's own: with a window, not all."""
        end = past + 1 if self.has_own_token else past
        return end if self.window is None else end - self.start(past)

    def span(self, past: UOp) -> UOp:
        """Tokens of a split, if `past` are split."""
        if self.num_splits == 1:
            return past
        unit = TILE_TOKENS * self.num_splits
        return ((past + (unit - 1)) // unit * TILE_TOKENS).maximum(self.shortest_span)

    def used(self, past: UOp) -> UOp:
        """Splits in use, at least one, if `past` tokens are split."""
        span = self.span(past)
        return ((past + (span - 1)) // span).maximum(1)

    def past(self, inputs: UOp) -> UOp:
        """How many tokens of row 0's context are split."""
        limit = max(self.layout.max_blocks * self.layout.block_size, 2 * self.shortest_span * self.num_splits)
        return self.shared(clamp(inputs[self.layout.offset("positions")].load(), 0, limit - 1))


@dataclass(frozen=True)
class SplitOperands:
    """Row 0's split attention inside a kernel that reads it: the buffers of SplitHeads, and the step's inputs."""

    split: SplitHeads
    values: UOp
    sums: UOp
    inputs: UOp

    def read(self, body: Body, col: UOp, width: int, outer: Sequence[UOp]) -> list[UOp]:
        """Columns [col, col + width) of the combined attention; they must lie in one head. `outer`: as in `carry`."""
        split = self.split

        def step(number: UOp | int, old: list[UOp]) -> list[UOp]:
            here = self.sums[number * split.num_heads + col // split.head_dim].load()
            best = old[0].maximum(here)
            before, now = (old[0] - best).exp2(), (here - best).exp2()
            new = load_floats(self.values, number * split.num_cols + col, width)
            return [
                best,
                old[1] * before + now,
                *[a * before + b * now for a, b in zip(old[2:], new, strict=True)],
            ]

        init = [UOp.const(NOTHING, F32), *zeros(width + 1)]
        _, total, *acc = carry(body, init, split.used(split.past(self.inputs)), outer, step)
        inverse = total.reciprocal()
        return [value * inverse for value in acc]


# -- combining them ----------------------------------------------------------------------------------------------------

ARRIVE = "if ({0} && threadIdx.x == 0 && threadIdx.y == 0) {{ __threadfence(); *({1}) = atomicAdd({2}, 1); }}"
SEE = "if ({0}) __threadfence();"


def arrive(body: Body, arrivals: UOp, at: UOp, is_shared: UOp, count: UOp, *stores: UOp) -> tuple[UOp, UOp]:
    """(whether this threadgroup is the last of `count` to arrive, the same in all of its threads; a UOp after which
    loads see what the others stored). Does nothing unless `is_shared`. CUDA only.

    `arrivals[at]`: the counter of those that have arrived; `stores`: what the others must see."""
    number = body.shared(1, I32)
    stored = UOp(Ops.BARRIER, src=(UOp.group(*stores),))
    src = (is_shared, number.after(stored)[0], arrivals.after(stored)[at])
    arrived = UOp(Ops.BARRIER, src=(UOp(Ops.CUSTOM, dtypes.void, src=src, arg=ARRIVE),))
    is_last = is_shared & number.after(arrived)[0].load().eq(count.cast(I32) - 1)
    seen = UOp(Ops.BARRIER, src=(UOp(Ops.CUSTOM, dtypes.void, src=(is_last,), arg=SEE),))
    return is_last, seen


@cached_kernel
def combine_kernel(split: SplitHeads) -> KernelFn:
    """fn(out (H * D,), values, sums, inputs): combines the splits, for operations that cannot read them."""

    def kernel(out: UOp, values: UOp, sums: UOp, inputs: UOp) -> UOp:
        body, width = Body(), 8
        group, lane = body.grid(-(-split.num_cols // (width * LANES))), body.threads(LANES)
        axes = axes_of(group, lane)
        col = (group * LANES + lane) * width
        is_inside = col < split.num_cols
        whole = SplitOperands(split, values, sums, inputs).read(body, is_inside.where(col, 0), width, axes)
        stores = [out[(col + i).valid(is_inside)].store(value.cast(out.dtype)) for i, value in enumerate(whole)]
        name = f"combine_{split.num_heads}x{split.head_dim}"
        return finish(UOp.group(*stores).end(*reversed(axes)), name, nbytes=8 * split.num_cols)

    return kernel
