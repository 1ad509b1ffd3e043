"""Attention over a context that is split between threadgroups, and how the splits are combined (flash-decoding).

The splits of a single row are read by the projection that follows, or combined by a kernel (`combine_kernel`). Those of
several rows are combined on CUDA by the threadgroup that finishes last: a counter tells it that it is the last, and
makes the others' results visible to it (`arrive`). METAL has no such order between threadgroups, and needs
none: several rows fill such a device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tinygrad import UOp, dtypes
from tinygrad.uop.ops import Ops

from tinyvllm.ops.kernel.body import F32, I32, Body, KernelFn, bits_of_bfloat, cached_kernel, clamp, finish
from tinyvllm.ops.kernel.lanes import LANES, Lanes, await_previous, axes_of, carry, grid, load_floats, zeros
from tinyvllm.ops.step_inputs import StepLayout

TILE_TOKENS = 16  # context tokens of a tile; a split's first token is a multiple
SHORTEST_SPAN = 128  # the fewest tokens that are worth a threadgroup
COMBINED_COLS = 4  # of a thread that combines splits
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
    unit: int = TILE_TOKENS  # a split's first token is a multiple
    is_sparse: bool = False  # all splits are read; where a sum is NOTHING, there may be no value

    @property
    def num_cols(self) -> int:
        return self.num_heads * self.head_dim

    def start(self, past: UOp) -> UOp | int:
        """The first token of the first split, for a row with `past` tokens before its own: the first of a tile."""
        if self.window is None:
            return 0
        return (past - (self.window - 1)).maximum(0) // self.unit * self.unit

    def shared(self, past: UOp) -> UOp:
        """How many tokens are split, of `past` tokens before the row's own: with a window, not all."""
        end = past + 1 if self.has_own_token else past
        return end if self.window is None else end - self.start(past)

    def span(self, past: UOp) -> UOp:
        """Tokens of a split, if `past` are split."""
        if self.num_splits == 1:
            return past
        unit = self.unit * self.num_splits
        return ((past + (unit - 1)) // unit * self.unit).maximum(self.shortest_span)

    def used(self, past: UOp) -> UOp:
        """Splits in use, at least one, if `past` tokens are split."""
        span = self.span(past)
        return ((past + (span - 1)) // span).maximum(1)

    def past(self, inputs: UOp, row: UOp | int = 0) -> UOp:
        """How many tokens of a row's context are split."""
        limit = max(self.layout.max_blocks * self.layout.block_size, 2 * self.shortest_span * self.num_splits)
        return self.shared(clamp(inputs[self.layout.offset("positions") + row].load(), 0, limit - 1))


@dataclass(frozen=True)
class SplitOperands:
    """A row's split attention inside a kernel that reads it: the buffers of SplitHeads, and the step's inputs."""

    split: SplitHeads
    values: UOp
    sums: UOp
    inputs: UOp
    row: UOp | int = 0

    def read(self, body: Body, col: UOp, width: int, outer: Sequence[UOp]) -> list[UOp]:
        """Columns [col, col + width) of the combined attention; they must lie in one head. `outer`: as in `carry`."""
        split = self.split

        def step(number: UOp | int, old: list[UOp]) -> list[UOp]:
            place = number * split.layout.num_tokens + self.row
            here = self.sums[place * split.num_heads + col // split.head_dim].load()
            best = old[0].maximum(here)
            before, now = (old[0] - best).exp2(), (here - best).exp2()
            new = load_floats(self.values, place * split.num_cols + col, width)
            if split.is_sparse:
                new = [(here > NOTHING / 10).where(value, 0.0) for value in new]
            return [
                best,
                old[1] * before + now,
                *[a * before + b * now for a, b in zip(old[2:], new, strict=True)],
            ]

        init = [UOp.const(NOTHING, F32), *zeros(width + 1)]
        used = split.num_splits if split.is_sparse else split.used(split.past(self.inputs, self.row))
        _, total, *acc = carry(body, init, used, outer, step)
        inverse = total.reciprocal()
        return [value * inverse for value in acc]


# -- combining them ----------------------------------------------------------------------------------------------------

# Releases what the threadgroup has stored, which the barrier before has ordered ahead of this thread, and acquires what
# the others have released. With __threadfence on both sides instead, arriving took 0.3 us longer on an H200
ARRIVE = (
    "if ({0} && threadIdx.x == 0 && threadIdx.y == 0) "
    'asm volatile("atom.add.acq_rel.gpu.global.s32 %0, [%1], 1;" : "=r"(*({1})) : "l"({2}) : "memory");'
)


def arrive(body: Body, arrivals: UOp, at: UOp, is_shared: UOp, count: UOp, *stores: UOp) -> tuple[UOp, UOp]:
    """(whether this threadgroup is the last of `count` to arrive, the same in all of its threads; a UOp after which
    loads see what the others stored). Does nothing unless `is_shared`. CUDA only.

    `arrivals[at]`: the counter of those that have arrived; `stores`: what the others must see."""
    number = body.shared(1, I32)
    stored = UOp(Ops.BARRIER, src=(UOp.group(*stores),))
    src = (is_shared, number.after(stored)[0], arrivals.after(stored)[at])
    arrived = UOp(Ops.BARRIER, src=(UOp(Ops.CUSTOM, dtypes.void, src=src, arg=ARRIVE),))
    return is_shared & number.after(arrived)[0].load().eq(count.cast(I32) - 1), arrived


@cached_kernel
def combine_kernel(split: SplitHeads, lanes: Lanes | None = None, has_bfloat_results: bool = False) -> KernelFn:
    """fn(out (T, H * D), values, sums, inputs): combines the splits, for operations that cannot read them.
    `has_bfloat_results`: as in AttentionSpec."""

    def kernel(out: UOp, values: UOp, sums: UOp, inputs: UOp) -> UOp:
        body, width, rows = Body(), COMBINED_COLS, split.layout.num_tokens
        row, group, lane = grid(body, rows), grid(body, -(-split.num_cols // (width * LANES))), body.threads(LANES)
        axes = axes_of(row, group, lane)
        if lanes is not None:
            values, sums = await_previous(lanes, values, sums)
        col = (group * LANES + lane) * width
        is_inside = col < split.num_cols
        whole = SplitOperands(split, values, sums, inputs, row).read(body, is_inside.where(col, 0), width, axes)
        at = row * split.num_cols + col
        if has_bfloat_results:
            whole = [bits_of_bfloat(value) for value in whole]
        stores = [out[(at + i).valid(is_inside)].store(value.cast(out.dtype)) for i, value in enumerate(whole)]
        name = f"combine_{rows}x{split.num_heads}x{split.head_dim}"
        return finish(UOp.group(*stores).end(*reversed(axes)), name, nbytes=8 * rows * split.num_cols)

    return kernel
