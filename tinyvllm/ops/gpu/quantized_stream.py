"""One token row times a quantized matrix on Hopper: codes stream through threadgroup memory (plane_ring.py).

Codes go into the matrix unit as in quantized_vector.py. All warps multiply each stage: they split its columns into
chunks of 256, eight runs, one for each token of the matrix unit's tile. Their sums of each tile are kept in threadgroup
memory and added up at the end. x is staged once on each multiprocessor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from tinygrad import UOp, dtypes
from tinygrad.dtype import DType
from tinygrad.uop.ops import Ops

from tinyvllm.ops.formats.matrix import PANEL, Planes
from tinyvllm.ops.formats.pairs import pair_forms, read_pairs
from tinyvllm.ops.gpu.chunk_scales import ChunkScales, Scaled
from tinyvllm.ops.gpu.plane_ring import (
    CHUNK_COLS,
    LEAST_BYTES,
    MAX_WARPS,
    MULTIPROCESSORS,
    RING_BYTES,
    SLOTS,
    TILE_ROWS,
    Ring,
    RingWalk,
    SharedPlane,
    Stage,
    chunks_of_warp,
    number,
    plane_copies,
    wanted_parts,
    wanted_warps,
)
from tinyvllm.ops.gpu.quantized_vector import QuantizedVectorSpec, RowPlace, StagedRow, multiply_run, stage_row
from tinyvllm.ops.gpu.vector import RowOperands
from tinyvllm.ops.kernel.body import F32, I32, Body, KernelFn, balanced, cached_kernel
from tinyvllm.ops.kernel.hopper import HOPPER_SHARED_BYTES, statement
from tinyvllm.ops.kernel.lanes import LANES, carry, warps, zeros
from tinyvllm.ops.kernel.tiles import together

ROW_MASKS = (1, 2)  # connect the lanes that hold one row's sums
STATIC_BYTES = 48 << 10
HELD_CHUNKS = 24  # of a row, that the warps' registers hold
KEEP = "if ({0}) *((float*)(shared_memory + {1})) = {2};"


@dataclass(frozen=True, kw_only=True)
class StreamedVectorSpec(QuantizedVectorSpec):
    """A product of one row whose codes stream through threadgroup memory."""

    planes: tuple[tuple[DType, float], ...]  # of the matrix: the dtype, and the bytes of a column

    @property
    def num_groups(self) -> int:
        tiles = self.out_rows // (TILE_ROWS // 2 if self.activation is not None else TILE_ROWS)
        return min(tiles, MULTIPROCESSORS)

    @property
    def parts(self) -> int:
        """Parts of the columns: a stage holds one of a tile's rows."""
        return self.knob("parts", wanted_parts(self.planes, self.num_cols))

    @property
    def part_chunks(self) -> int:
        return self.num_cols // self.parts // CHUNK_COLS

    @property
    def warps(self) -> int:
        """Warps, which split a stage's columns: as many as there can be, so that one threadgroup takes a multiprocessor
        by itself. Where two fit, the next kernel's threadgroups start two by two on the multiprocessors that happen to
        be free, and the others have nothing to do. (NVIDIA H200, a step of Llama-3.1-8B in Q4_K: 8 warps 1,933 us, 16
        warps 1,657. In a chain of equal kernels, which start one by one, 8 warps are faster: 3.9 instead of 5.2 us for
        4,096 rows of 4,096 columns.)"""
        return self.knob("warps", wanted_warps(self.part_chunks))

    @property
    def _may_hold_x(self) -> bool:
        return self.parts == 1 and self.part_chunks <= HELD_CHUNKS

    @property
    def is_resident(self) -> bool:
        return False

    @property
    def sums_of_run(self) -> int:
        return 2

    @property
    def holds_x(self) -> bool:
        """Whether a warp's x stays in registers, if it is the same in all stages: reading it again for each tile takes
        as many cycles as the codes (28,672 rows of 4,096 columns in Q4_K: 25.3 us instead of 20.1)."""
        return self._may_hold_x and bool(self.knob("holds_x", 1))

    @property
    def stages(self) -> int:
        return self.ring.stages

    @cached_property
    def ring(self) -> Ring:
        ring = Ring(
            out_rows=self.out_rows,
            is_gated=self.activation is not None,
            copies=plane_copies(self.planes, self.format, self.num_cols, self.num_cols // self.parts, by_words=False),
            splits=1,
            parts=self.parts,
            stages=1,
            groups=self.num_groups,
            warps=self.warps,
        )
        return replace(ring, stages=self.knob("stages", ring.wanted_stages(RING_BYTES)))

    @property
    def dynamic_bytes(self) -> int:
        return max(LEAST_BYTES, self.ring.bytes + self.ring.most_tiles * self.warps * TILE_ROWS * 4)

    def knobs(self) -> Mapping[str, tuple[int, ...]]:
        return {"parts": (1, 2, 4, 7, 8), "warps": (4, 8, 16), "stages": (2, 3, 4, 6), "holds_x": (0, 1)}

    def is_possible(self) -> bool:
        chunks = self.num_cols // CHUNK_COLS
        return (
            self.num_cols % CHUNK_COLS == 0
            and chunks % self.parts == 0
            and 1 < self.warps <= min(MAX_WARPS, self.part_chunks)
            and self.out_rows % TILE_ROWS == 0
            and self.format.grid is None
            and self.experts is None
            and self.ring.is_possible
            and self.shared_bytes <= STATIC_BYTES
            and self.shared_bytes + self.dynamic_bytes <= HOPPER_SHARED_BYTES
        )

    def _shared_bytes(self, staged_run: int) -> int:
        """Of x, its sums, and sums of the warps."""
        staged = (self.num_runs + 1) * staged_run * 4 + self.num_runs * self.sums_of_run * 4
        return staged + self.warps * 4 * (1 + (self.sum is not None))


@cached_kernel
def streamed_vector_kernel(spec: StreamedVectorSpec) -> KernelFn:
    """fn(out[, x out], *planes, *RowOperands)."""

    def kernel(out: UOp, *rest: UOp) -> UOp:
        buffers = list(rest)
        x_out = buffers.pop(0) if spec.sum is not None else None
        planes = [buffers.pop(0) for _ in range(Planes.count(spec.format))]
        operands = RowOperands.take(spec, buffers)
        body = Body()
        group, lane = body.grid(spec.num_groups), body.threads(LANES)
        place = RowPlace(body, 0, group, lane, warps(body, spec.warps))
        walk = RingWalk(spec.ring, spec.format, body, group, 0, planes, spec.dynamic_bytes)
        row = _StreamedRow(spec, place, walk, stage_row(spec, place, operands, x_out, [walk.begun]))
        return spec.finish(row.staged.stores + row.finish(row.multiply(), out), place.axes)

    return kernel


class _StreamedRow:
    """One row's product."""

    def __init__(self, spec: StreamedVectorSpec, place: RowPlace, walk: RingWalk, staged: StagedRow) -> None:
        self.spec, self.place, self.walk, self.staged = spec, place, walk, staged

    def multiply(self) -> UOp:
        """The statement after which all warps' sums of all tiles are in threadgroup memory."""
        spec, place, row = self.spec, self.place, self.staged
        before = [row.x, row.sums, *self._residual()]
        loop, tile = self.walk.loop()
        outer = place.axes if loop is None else (*place.axes, loop)

        def step(part: UOp | int, old: list[UOp]) -> list[UOp]:
            return self.walk.step(tile, part, old, lambda stage: self._add(stage, old), *before)

        totals = carry(place.body, zeros(2), spec.parts, outer, step)
        stores = []
        for half, total in enumerate(totals):
            total = spec.lanes.sum(total, ROW_MASKS)
            at = ((tile * spec.warps + place.warp) * TILE_ROWS + place.lane // 4 + 8 * half) * 4 + spec.ring.bytes
            stores.append(statement(KEEP, (place.lane % 4).eq(0), number(at), total))
        done = together(*stores)
        return UOp(Ops.BARRIER, src=(done if loop is None else done.end(loop),))

    def _add(self, stage: Stage, old: list[UOp]) -> list[UOp]:
        """A lane's sums of its two rows after a stage."""
        spec = self.spec

        def add(local: UOp, before: list[UOp]) -> list[UOp]:
            return self._add_chunk(stage, local, local + stage.part * spec.part_chunks, before)

        return chunks_of_warp(spec.part_chunks, spec.warps, self.place.warp, old, add)

    def _add_chunk(self, stage: Stage, local: UOp, chunk: UOp, old: list[UOp]) -> list[UOp]:
        spec, lane = self.spec, self.place.lane
        rows = [self.walk.planes(stage, lane // 4 + 8 * half) for half in range(2)]
        totals, starts = self._sums(chunk)
        acc = [[starts[e % 2][g] for e in range(4)] for g in range(spec.groups)]
        for half in range(2):
            slot = half * 4 + lane % 4
            at = (lane // 4).eq(slot).where(chunk * SLOTS + slot, spec.num_runs) * spec.staged_run
            inputs = [self._words_of_x(stage, at)]
            runs = [read_pairs(planes, number(0), local * SLOTS + slot, 0, spec.mma, in_place=True) for planes in rows]
            acc = multiply_run(self.place.body, spec, runs, inputs, acc)
        new = list(old)
        for half, planes in enumerate(rows):
            new[half] = _with_chunk(
                spec, planes, local, lane, [a[2 * half : 2 * half + 2] for a in acc], totals, new[half]
            )
        return new

    def _words_of_x(self, stage: Stage, at: UOp) -> list[UOp]:
        """A run of x: read before the loop, it stays in registers."""
        x = self.staged.x
        if not self.spec.holds_x:
            x = x.after(UOp(Ops.NOOP, dtypes.void, src=(stage.waited,)))
        return [x[at + i].load() for i in range(PANEL // 2)]

    def _sums(self, chunk: UOp) -> tuple[list[list[UOp]], list[list[UOp]]]:
        """By the lane's column and group: the sum of x, and what the sums start from."""
        spec, forms, sums = self.spec, pair_forms(self.spec.format, self.spec.mma), self.staged.sums
        totals, starts = [], []
        for side in range(2):
            at = (chunk * SLOTS + self.place.lane % 4 * 2 + side) * 2
            halves = [sums[at + i].load() for i in range(2)]
            parts = [half * -form.start for half, form in zip(halves, forms, strict=True)]
            if not forms[0].excess:
                parts = zeros(2)
            totals.append(halves if spec.groups == 2 else [halves[0] + halves[1]])
            starts.append(parts if spec.groups == 2 else [parts[0] + parts[1]])
        return totals, starts

    def _results(self) -> list[tuple[UOp, UOp, UOp, UOp]]:
        """The thread's results: the number of the tile in the threadgroup, the row in it, the row of the output, and
        whether it exists."""
        spec, place, ring, found = self.spec, self.place, self.spec.ring, []
        for start in range(0, ring.most_tiles * ring.out_tile, spec.warps * LANES):
            index = place.thread + start
            inside = index < self.walk.tiles * ring.out_tile
            index = inside.where(index, 0)
            tile, row = index // ring.out_tile, index % ring.out_tile
            found.append((tile, row, (tile * ring.groups + place.group) * ring.out_tile + row, inside))
        return found

    def _residual(self) -> list[UOp]:
        """The thread's values of the residual, as the epilogue reads them: long before, because the kernel would wait
        for them at its end."""
        residual = self.staged.operands.residual
        return [] if residual is None else [residual[target].load() for _, _, target, _ in self._results()]

    def finish(self, summed: UOp, out: UOp) -> list[UOp]:
        """Add up the warps' sums of each row, and compute the epilogue: a thread for each row of the output."""
        spec, size, stores, rms = self.spec, self.spec.ring.out_tile, [], self.staged.rms
        sums = SharedPlane(F32, UOp.const(spec.ring.bytes, I32), summed)
        for tile, row, target, inside in self._results():

            def total(row: UOp, tile: UOp = tile) -> UOp:
                value = balanced(sums.at((tile * spec.warps + w) * TILE_ROWS + row) for w in range(spec.warps))
                return value if rms is None else value * rms

            if spec.activation is not None:
                (value,) = spec.gate(None, [total(row)], [total(row + size)], [target])
            else:
                value = spec.epilogue(self.staged.operands, total(row), target)
            stores.append(out[target.valid(inside)].store(value.cast(out.dtype)))
        return stores


def _with_chunk(
    spec: StreamedVectorSpec,
    planes: Planes,
    chunk: UOp,
    lane: UOp,
    acc: Sequence[Sequence[UOp]],
    totals: Sequence[Sequence[UOp]],
    old: UOp,
) -> UOp:
    """A row's sum after a chunk. `acc`: by group and the lane's column, `totals`: by column and group."""
    assert planes.scale is not None
    scales = ChunkScales(planes.scale, spec.format, chunk, spec.form.unit)
    scaled, factors = Scaled(scales), scales.of_pair(lane % 4)
    for side in range(2):
        for g, factor in enumerate(factors[side]):
            scaled.add(acc[g][side], factor)
    new = scaled.added_to(old)
    if planes.minimum is None:
        return new
    minima = ChunkScales(planes.minimum, spec.format, chunk)
    shifted, factors = Scaled(minima), minima.of_pair(lane % 4)
    for side in range(2):
        for g, factor in enumerate(factors[side]):
            shifted.add(totals[side][g], factor)
    return shifted.added_to(new)
