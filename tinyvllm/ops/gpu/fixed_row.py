"""One token row in threadgroup memory as integers of 16 bits, in two planes of bytes.

The matrix unit multiplies bytes of codes by bytes of x: of a number, the upper byte is rounded, so that both are signed
ones. Numbers have a unit for every 256 columns, in which the largest is MOST; rounding changes a value by at most
1.6e-5 of it. A norm's factor is left to the finished sums, as it is the same for all columns.
"""

from __future__ import annotations

from dataclasses import dataclass

from tinygrad import UOp
from tinygrad.uop.ops import Ops

from tinyvllm.ops.formats.matrix import PANEL
from tinyvllm.ops.gpu.plane_ring import RingWalk
from tinyvllm.ops.gpu.quantized_vector import (
    PIECE,
    QuantizedVectorSpec,
    RowPlace,
    RowSource,
    finish_sum,
    store_sum,
)
from tinyvllm.ops.gpu.vector import RowOperands
from tinyvllm.ops.kernel.body import F32, I32, U32, balanced
from tinyvllm.ops.kernel.lanes import LANES

UNIT_COLS = LANES * PIECE  # columns that share a unit: those that a warp stages at once
MOST = 127 << 8  # of which the rounded upper byte is a signed one
LEAST = 1e-30  # keeps columns of zeros from being divided by zero
PLANE_WORDS = PANEL // 4  # words of a run in one plane
RUN_WORDS = 2 * PLANE_WORDS + 4  # from one run to the next: eight lanes' vectors lie in different banks
# The larger magnitude of two; NaN if one is
LARGER = (
    '[](float a, float b) {{ float c; asm("max.NaN.f32 %0, %1, %2;" : "=f"(c) : "f"(fabsf(a)), "f"(fabsf(b)));'
    " return c; }}({0}, {1})"
)
# the bits of magnitudes are in their order, and those of NaN above them
LARGEST = "__uint_as_float(__reduce_max_sync(0xffffffffu, __float_as_uint({0})))"
RECIPROCAL = '[](float a) {{ float b; asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(b) : "f"(a)); return b; }}({0})'
RECIPROCAL_ROOT = "rsqrtf({0})"
# The integer nearest to {0} * {1}, plus a constant, as the lowest 16 bits: of a number below 2^22, the sum with
# 1.5 * 2^23 has it as its lowest bits
ROUND = "__float_as_uint(__fmaf_rn({0}, {1}, %.1ff))"
ROUNDED, TO_UPPER = ROUND % (3 << 22), ROUND % ((3 << 22) + 128)
SUM_BYTES = "__dp4a((int){0}, 0x01010101, {1})"
FOUR_BYTES = "__byte_perm(__byte_perm({0}, {1}, 0x%d%d), __byte_perm({2}, {3}, 0x%d%d), 0x5410)"


@dataclass(frozen=True)
class FixedRow:
    """A row in threadgroup memory. `words`: for each run the words of the upper bytes, then those of the lower ones,
    and a run of zeros at the end; `sums`: of each group of columns; `units`: of UNIT_COLS columns each; `operands`:
    once they are awaited; `stores`: of a sum that the kernel computes; `factor`: of the finished product, if any."""

    operands: RowOperands
    words: UOp
    sums: UOp
    units: UOp
    stores: list[UOp]
    factor: UOp | None

    @property
    def values(self) -> list[UOp]:
        """What must have been computed before the row is multiplied: the factor too, which the kernel would compute at
        its end otherwise."""
        return [self.words, self.sums, self.units, *([] if self.factor is None else [self.factor])]


def fixed_words(spec: QuantizedVectorSpec) -> int:
    """Words of threadgroup memory of a row, its sums and its units."""
    return (spec.num_runs + 1) * RUN_WORDS + spec.num_runs * spec.groups + spec.num_cols // UNIT_COLS


def stage_fixed_row(
    spec: QuantizedVectorSpec, place: RowPlace, operands: RowOperands, x_out: UOp | None, walk: RingWalk
) -> FixedRow:
    """Wait for the previous kernels, and bring x into threadgroup memory, as `stage_row`; begin the walk meanwhile."""
    source = RowSource(spec, operands, place, [walk.begun])
    loaded, stores, squares = source.read_before(walk.hurry), [], None
    if x_out is not None:
        loaded = finish_sum(spec, place, source, loaded)
        stores = store_sum(spec, place, source, loaded, x_out)
    if spec.norm_eps is not None:
        squares = source.squares(loaded)
        loaded = [[v * w for v, w in zip(*pair, strict=True)] for pair in zip(loaded, source.norm_weights, strict=True)]
    words, sums, units, factor = _store(spec, place, source, loaded, squares)
    return FixedRow(source.operands, words, sums, units, stores, factor)


def _store(
    spec: QuantizedVectorSpec, place: RowPlace, source: RowSource, loaded: list[list[UOp]], squares: UOp | None
) -> tuple[UOp, UOp, UOp, UOp | None]:
    """(words, sums, units, factor), as in FixedRow. `squares`: the thread's share of their sum, if x is normed."""
    body, thread, per_group = place.body, place.thread, PANEL // spec.groups // PIECE
    words = body.shared((spec.num_runs + 1) * RUN_WORDS, U32)
    sums, units = body.shared(spec.num_runs * spec.groups), body.shared(spec.num_cols // UNIT_COLS)
    stores = [words[(spec.num_runs * RUN_WORDS + thread).valid(thread < PLANE_WORDS)].store(0)]
    for piece, ok, values in zip(source.pieces, source.inside, loaded, strict=True):

        def inside(index: UOp, condition: UOp | None = None, ok: UOp | None = ok) -> UOp:
            both = condition if ok is None else ok if condition is None else condition & ok
            return index if both is None else index.valid(both)

        largest = balanced(values, lambda one, other: UOp(Ops.CUSTOM, F32, src=(one, other), arg=LARGER))
        largest = UOp(Ops.CUSTOM, F32, src=(largest,), arg=LARGEST).maximum(LEAST)
        per_unit = UOp(Ops.CUSTOM, F32, src=(largest,), arg=RECIPROCAL) * float(MOST)
        run, part = piece // (PANEL // PIECE), piece % (PANEL // PIECE)
        sides = []  # the sum of the upper bytes, rounded, and of the lower ones
        for plane, (text, byte) in enumerate(((TO_UPPER, 1), (ROUNDED, 0))):
            numbers = [UOp(Ops.CUSTOM, U32, src=(value, per_unit), arg=text) for value in values]
            start, side = run * RUN_WORDS + plane * PLANE_WORDS + part * 2, UOp.const(0, I32)
            for i in range(2):
                four = FOUR_BYTES % ((byte + 4, byte) * 2)
                word = UOp(Ops.CUSTOM, U32, src=tuple(numbers[4 * i : 4 * i + 4]), arg=four)
                stores.append(words[inside(start + i)].store(word))
                side = UOp(Ops.CUSTOM, I32, src=(word, side), arg=SUM_BYTES)
            sides.append(side)
        total = (sides[0] * 256 + sides[1]).cast(F32)  # exact, as those of its lanes: below 2**24
        total = spec.lanes.sum(total, (1, 2)[: per_group // 2])
        stores.append(sums[inside(piece // per_group, (piece % per_group).eq(0))].store(total))
        at = piece // (UNIT_COLS // PIECE)
        stores.append(units[inside(at, (piece % LANES).eq(0))].store(largest * (1.0 / MOST)))
    if squares is None:
        done = UOp.group(*stores)
        return words.after(done), sums.after(done), units.after(done), None
    assert spec.norm_eps is not None
    partial = body.shared(spec.warps)
    stores.append(partial[(thread // LANES).valid((thread % LANES).eq(0))].store(spec.lanes.sum(squares)))
    done = UOp.group(*stores)
    mean = balanced(partial.after(done)[i].load() for i in range(spec.warps)) * (1.0 / spec.num_cols)
    factor = UOp(Ops.CUSTOM, F32, src=(mean + spec.norm_eps,), arg=RECIPROCAL_ROOT)
    return words.after(done), sums.after(done), units.after(done), factor
