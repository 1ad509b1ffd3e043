"""One token row times a quantized matrix on Hopper: codes stream through threadgroup memory (plane_ring.py).

Codes go into the matrix unit as bytes, and x as two planes of bytes (fixed_row.py), so that eight codes cost three
instructions, or two where the upper four bits of bytes stay in place. A tile of the matrix unit has 8 tokens, but there
is only one token here: token 2 t is the upper plane of the runs of slot t, token 2 t + 1 the lower one, and both are
zero for the runs of other slots. Then the two sums that a lane holds of a row are those of one run, and integers.

All warps multiply each stage: they split its columns into chunks of 256. Their sums of each tile are kept in
threadgroup memory and added up at the end. x is staged once on each multiprocessor.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any, Generic, TypeVar

from tinygrad import UOp
from tinygrad.dtype import DType
from tinygrad.uop.ops import Ops

from tinyvllm.ops.formats.code_bytes import IN_PLACE, byte_forms, read_bytes, takes_bytes
from tinyvllm.ops.formats.matrix import Planes, high_bits
from tinyvllm.ops.gpu.chunk_scales import LaneScales
from tinyvllm.ops.gpu.fixed_row import PLANE_WORDS, RUN_WORDS, FixedRow, fixed_words, stage_fixed_row
from tinyvllm.ops.gpu.plane_ring import (
    CHUNK_COLS,
    LEAST_BYTES,
    MAX_STAGES,
    MAX_WARPS,
    MIN_WARPS,
    SLOTS,
    TILE_ROWS,
    PlaneCopy,
    Ring,
    RingWalk,
    SharedPlane,
    Stage,
    chunks_of_warp,
    number,
    plane_copies,
    wanted_warps,
)
from tinyvllm.ops.gpu.quantized_vector import QuantizedVectorSpec, RowPlace, StagedRow
from tinyvllm.ops.gpu.vector import RowOperands
from tinyvllm.ops.kernel.body import F32, I32, Body, KernelFn, balanced, cached_kernel
from tinyvllm.ops.kernel.hopper import HOPPER_SHARED_BYTES, MULTIPROCESSORS, statement
from tinyvllm.ops.kernel.lanes import LANES, carry, load_cuda_words, multiply_bytes, zeros
from tinyvllm.ops.kernel.tiles import together

ROW_MASKS = (1, 2)  # connect the lanes that hold one row's sums
X_BYTES, OTHER_BYTES = 2.7, 10_000  # of threadgroup memory for a column of x, and for sums and barriers
FEWEST_STAGES = 3
EARLY_BYTES, BYTES_AHEAD = 40_000, 80_000  # on their way to a multiprocessor
HELD_CHUNKS = 2  # of x, that a warp's registers hold
Staged = TypeVar("Staged", bound=FixedRow | StagedRow)
KEEP = "if ({0}) *((float*)(shared_memory + {1})) = {2};"


@dataclass(frozen=True, kw_only=True)
class StreamedVectorSpec(QuantizedVectorSpec):
    """A product of one row whose codes stream through threadgroup memory."""

    planes: tuple[tuple[DType, float], ...]  # of the matrix: the dtype, and the bytes of a column

    @property
    def takes_format(self) -> bool:
        return takes_bytes(self.format) and not any(scales.has_multiplier for scales in self.format.scales)

    @property
    def num_tiles(self) -> int:
        return self.out_rows // (TILE_ROWS // 2 if self.activation is not None else TILE_ROWS)

    @property
    def num_groups(self) -> int:
        return min(self.num_tiles, MULTIPROCESSORS)

    @property
    def parts(self) -> int:
        """Parts of the columns: a stage holds one of a tile's rows. The fewest equal ones with which some stages fit
        beside x, if each of the fewest warps still has a chunk. (NVIDIA H200, 5,120 rows of 27,648 columns in Q4_K: 6
        parts, two stages, 26.4 us; 9 parts, three stages, 24.0. 4,096 rows of 14,336 columns in Q8_0: 4 parts, two
        stages, 18.2; 7 parts, four stages, 16.2.) If there are none: see `_uneven_parts`."""
        chunks = self.num_cols // CHUNK_COLS
        even = [parts for parts in range(1, max(1, chunks // MIN_WARPS) + 1) if chunks % parts == 0]
        stages = FEWEST_STAGES if self.num_tiles > self.num_groups else 2
        if (fitting := next((parts for parts in even if self._fits(parts, stages)), None)) is not None:
            return self.knob("parts", fitting)
        # with two stages, if a warp has one chunk of each; integers of 8 bits in any case
        is_one = chunks <= even[-1] * MAX_WARPS or (self.format.bits == 8 and not self.format.is_float8)
        return self.knob("parts", even[-1] if is_one and self._fits(even[-1], 2) else self._uneven_parts(stages))

    def _uneven_parts(self, stages: int) -> int:
        """Parts of the columns in which a warp has one chunk, of which the last part may have fewer; the fewest with
        which so many stages fit. (NVIDIA H200, a step of qwen2.5-7b in Q4_K with 4 layers, whose down has 74 chunks: 5
        parts of 15 chunks, the last of 14, 251.6 us, 6 and 8 parts 253.6, 4 parts of two chunks a warp 257.9, without a
        ring 335.2. 5,120 rows of 17,408 columns, two stages of 4 equal parts and three of uneven ones: Q6_K 25.2 us and
        24.4, FP8 25.8 and 24.0, Q8_0 29.0 and 31.3.)"""
        chunks = self.num_cols // CHUNK_COLS
        counts = [-(-chunks // size) for size in range(MAX_WARPS, MIN_WARPS - 1, -1)]
        return next((parts for parts in counts if self._fits(parts, stages)), counts[-1])

    def _fits(self, parts: int, stages: int) -> bool:
        """Whether so many stages fit beside x."""
        return self._ring_bytes(parts, stages) <= HOPPER_SHARED_BYTES - X_BYTES * self.num_cols - OTHER_BYTES

    def _ring_bytes(self, parts: int, stages: int) -> int:
        """Those of a ring's stages and of the planes of its tiles."""
        copies = self._copies(parts)
        stage = sum(copy.bytes for copy in copies if copy.stride)
        tile = sum(copy.bytes for copy in copies if not copy.stride)
        return stages * stage + -(-(stages + parts - 1) // parts) * tile

    def _copies(self, parts: int) -> tuple[PlaneCopy, ...]:
        part_cols = -(-self.num_cols // CHUNK_COLS // parts) * CHUNK_COLS
        return plane_copies(self.planes, self.format, self.num_cols, part_cols, by_words=False)

    @property
    def part_chunks(self) -> int:
        """Chunks of a part; the last one may have fewer."""
        return -(-self.num_cols // CHUNK_COLS // self.parts)

    @property
    def last_chunks(self) -> int:
        return self.num_cols // CHUNK_COLS - (self.parts - 1) * self.part_chunks

    @property
    def warps(self) -> int:
        """Warps, of which each team splits a stage's blocks: as many as there can be whose shares are equal."""
        return self.knob("warps", wanted_warps(self.part_blocks) * self.teams)

    @property
    def teams(self) -> int:
        """Teams of warps, which take the tiles in turn: two, if there are tiles, warps and stages for them. (NVIDIA
        H200, a step of Llama-3.1-8B in Q6_K, 8 layers: one 553 us, two 574.)"""
        if (chosen := dict(self.chosen).get("teams")) is not None:
            return chosen
        is_short = self.format.bits <= IN_PLACE and not high_bits(self.format)
        return 2 if is_short and self.num_tiles > self.num_groups and has_two_teams(self) else 1

    @property
    def team_warps(self) -> int:
        return self.warps // self.teams

    @property
    def block(self) -> int:
        """Neighboring chunks whose scales are loaded together: two, if enough warps have some."""
        are_pairs = self.part_chunks % 2 == self.last_chunks % 2 == 0
        return self.knob("block", 2 if are_pairs and self.part_chunks >= 2 * MIN_WARPS else 1)

    @property
    def part_blocks(self) -> int:
        return self.part_chunks // self.block

    @property
    def _may_hold_x(self) -> bool:
        return self.parts == 1 and -(-self.part_blocks // self.team_warps) * self.block <= HELD_CHUNKS

    @property
    def is_resident(self) -> bool:
        return False

    @property
    def holds_x(self) -> bool:
        """Whether a warp's x stays in registers, if it is the same in all stages: reading it again for each tile takes
        as many cycles as the codes (28,672 rows of 4,096 columns in Q4_K: 25.3 us instead of 20.1)."""
        return self._may_hold_x and bool(self.knob("holds_x", 1))

    @property
    def stages(self) -> int:
        return self.ring.stages

    @property
    def stages_ahead(self) -> int:
        """Stages that are on their way at once, from when x has been asked for. (NVIDIA H200, a step of Llama-3.1-8B in
        Q4_K, 8 layers: two 411 us, one 426.)"""
        return self.knob("stages_ahead", self._stages_of(BYTES_AHEAD))

    @property
    def early(self) -> int:
        """The same before: the loads of x, and of a norm's weights, wait until they have come."""
        return min(self._stages_of(EARLY_BYTES), self.stages_ahead)

    def _stages_of(self, num_bytes: int) -> int:
        size = TILE_ROWS * sum(size for _, size in self.planes) * self.num_cols / self.parts
        return min(self.stages, max(1, int(num_bytes / size)))

    @cached_property
    def ring(self) -> Ring:
        ring = Ring(
            out_rows=self.out_rows,
            is_gated=self.activation is not None,
            copies=self._copies(self.parts),
            splits=1,
            parts=self.parts,
            stages=1,
            groups=self.num_groups,
            warps=self.warps,
            teams=self.teams,
        )
        room = HOPPER_SHARED_BYTES - self.shared_bytes - self._sum_bytes(ring)
        most = min(MAX_STAGES, max(2, ring.most_tiles * ring.parts))
        fitting = (n for n in range(most, 2, -1) if replace(ring, stages=n).bytes <= room)
        return replace(ring, stages=self.knob("stages", next(fitting, 2)))

    def _sum_bytes(self, ring: Ring) -> int:
        """Of the warps' sums of all tiles."""
        return ring.most_tiles * self.team_warps * TILE_ROWS * 4

    @property
    def dynamic_bytes(self) -> int:
        return max(LEAST_BYTES, self.ring.bytes + self._sum_bytes(self.ring))

    def knobs(self) -> Mapping[str, tuple[int, ...]]:
        return {
            "parts": (1, 2, 4, 5, 7, 8, 14),
            "warps": (7, 8, 14, 15, 16),
            "stages": (2, 3, 4, 5),
            "holds_x": (0, 1),
            "block": (1, 2),
            "stages_ahead": (1, 2),
            "teams": (1, 2),
        }

    def is_possible(self) -> bool:
        return (
            self.num_cols % CHUNK_COLS == 0
            and self.last_chunks > 0
            and self.part_chunks % self.block == self.last_chunks % self.block == 0
            and 1 < self.team_warps <= self.part_blocks
            and self.warps <= MAX_WARPS
            and self.warps % self.teams == 0
            and self._teams_follow
            and self.out_rows % TILE_ROWS == 0
            and self.takes_format
            and 1 <= self.stages_ahead <= self.stages
            and self.experts is None
            and self.split is None
            and self.ring.is_possible
            and self.shared_bytes + self.dynamic_bytes <= HOPPER_SHARED_BYTES
        )

    @property
    def _teams_follow(self) -> bool:
        """Whether a team that waits for a stage's next phase knows that the one before has ended. It knows that of the
        stages before those that were on their way with the last one that it waited for."""
        tiles, between = self.ring.most_tiles, (self.teams - 1) * self.parts
        if self.teams == 1 or tiles * self.parts <= self.stages:
            return tiles >= self.teams
        turn = between if tiles > self.teams else 0
        return self.stages > between and self.stages > turn + self.stages_ahead

    def _shared_bytes(self, staged_run: int) -> int:
        """Of x, its sums, and sums of the warps."""
        return fixed_words(self) * 4 + self.warps * 4 * (1 + (self.sum is not None))


@cache
def has_two_teams(spec: StreamedVectorSpec) -> bool:
    """Whether the row's product is possible with two teams of warps."""
    return replace(spec, chosen=(*spec.chosen, ("teams", 2))).is_possible()


@cached_kernel
def streamed_vector_kernel(spec: StreamedVectorSpec) -> KernelFn:
    """fn(out[, x out], *planes, *RowOperands)."""

    def begin(place: RowPlace, walk: RingWalk, operands: RowOperands, x_out: UOp | None) -> _ByteRow:
        return _ByteRow(spec, place, walk, stage_fixed_row(spec, place, operands, x_out, walk))

    return row_kernel(spec, begin)


def row_kernel(spec: StreamedVectorSpec, begin: Begin) -> KernelFn:
    """fn(out[, x out], *planes, *RowOperands), of a row that `begin` brings into threadgroup memory."""

    def kernel(out: UOp, *rest: UOp) -> UOp:
        buffers = list(rest)
        x_out = buffers.pop(0) if spec.sum is not None else None
        planes = [buffers.pop(0) for _ in range(Planes.count(spec.format))]
        operands = RowOperands.take(spec, buffers)
        place = make_stream_place(spec)
        row = begin(place, _begin_walk(spec, place, planes), operands, x_out)
        return spec.finish(row.staged.stores + row.finish(row.multiply(), out), place.axes)

    return kernel


def make_stream_place(spec: StreamedVectorSpec) -> RowPlace:
    """The place of a thread; one more warp fetches."""
    body = Body()
    group, lane, warp = body.grid(spec.num_groups), body.threads(LANES), body.threads(spec.warps + 1)
    # the fetching warp leaves early, but what is loaded before must exist
    return RowPlace(body, 0, group, lane, warp.minimum(spec.warps - 1), warp)


def _begin_walk(spec: StreamedVectorSpec, place: RowPlace, planes: list[UOp]) -> RingWalk:
    ahead, team = (spec.early, spec.stages_ahead), place.warp // spec.team_warps
    return RingWalk(spec.ring, spec.format, place.body, place.group, 0, planes, spec.dynamic_bytes, ahead, team)


class StreamedRow(ABC, Generic[Staged]):
    """One row's product."""

    def __init__(self, spec: StreamedVectorSpec, place: RowPlace, walk: RingWalk, staged: Staged) -> None:
        self.spec, self.place, self.walk = spec, place, walk
        self.staged = staged

    @abstractmethod
    def _add_block(self, stage: Stage, block: UOp | int, old: list[UOp]) -> list[UOp]:
        """A lane's sums of its two rows after a block, whose number in the stage is given."""

    def multiply(self) -> UOp:
        """The statement after which all warps' sums of all tiles are in threadgroup memory."""
        spec, place, row = self.spec, self.place, self.staged
        before = [*row.values, *self._residual()]
        loop, tile = self.walk.loop()
        outer = place.axes if loop is None else (*place.axes, loop)

        def step(part: UOp | int, old: list[UOp]) -> list[UOp]:
            return self.walk.step(tile, part, old, lambda stage: self._add(stage, old), *before)

        totals = carry(place.body, zeros(2), spec.parts, outer, step)
        stores = []
        for half, total in enumerate(totals):
            total = spec.lanes.sum(total, ROW_MASKS)
            warp = place.warp % spec.team_warps
            at = ((tile * spec.team_warps + warp) * TILE_ROWS + place.lane // 4 + 8 * half) * 4 + spec.ring.bytes
            stores.append(statement(KEEP, (place.lane % 4).eq(0), number(at), total))
        done = together(*stores)
        return UOp(Ops.BARRIER, src=(done if loop is None else done.end(loop),))

    def _add(self, stage: Stage, old: list[UOp]) -> list[UOp]:
        """A lane's sums of its two rows after a stage."""
        spec = self.spec

        def add(block: UOp | int, before: list[UOp]) -> list[UOp]:
            return self._add_block(stage, block, before)

        existing = None
        if spec.last_chunks < spec.part_chunks:
            is_last = number(stage.part).eq(spec.parts - 1)
            existing = is_last.where(UOp.const(spec.last_chunks // spec.block, I32), spec.part_blocks)
        return chunks_of_warp(spec.part_blocks, spec.team_warps, self.place.warp % spec.team_warps, old, add, existing)

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
        spec, size, stores, factor = self.spec, self.spec.ring.out_tile, [], self.staged.factor
        sums = SharedPlane(F32, UOp.const(spec.ring.bytes, I32), summed)
        for tile, row, target, inside in self._results():

            def total(row: UOp, tile: UOp = tile) -> UOp:
                count = spec.team_warps
                value = balanced(sums.at((tile * count + w) * TILE_ROWS + row) for w in range(count))
                return value if factor is None else value * factor

            if spec.activation is not None:
                (value,) = spec.gate(None, [total(row)], [total(row + size)], [target])
            else:
                value = spec.epilogue(self.staged.operands, total(row), target)
            stores.append(out[target.valid(inside)].store(value.cast(out.dtype)))
        return stores


# (place, walk, operands, x out) -> the row, staged
Begin = Callable[[RowPlace, RingWalk, RowOperands, UOp | None], StreamedRow[Any]]


class _ByteRow(StreamedRow[FixedRow]):
    """The product of codes as bytes."""

    def _add_block(self, stage: Stage, block: UOp | int, old: list[UOp]) -> list[UOp]:
        spec, slot = self.spec, self.place.lane % 4
        rows = [self.walk.planes(stage, self.place.lane // 4 + 8 * half) for half in range(2)]
        shape = (spec.format, block * spec.block, spec.block, slot)
        scales = [LaneScales(planes.scale, *shape) for planes in rows]
        minima = [None if planes.minimum is None else LaneScales(planes.minimum, *shape) for planes in rows]
        new = list(old)
        for i in range(spec.block):
            local = block * spec.block + i
            chunk = local + stage.part * spec.part_chunks
            found = [self._multiply_run(stage, rows, local, chunk, side) for side in range(2)]
            unit = self.staged.units[chunk].load()
            code_unit = unit if spec.groups == 2 else unit * byte_forms(spec.format)[1].unit
            for half in range(2):
                values = [products[half] for products, _ in found]
                new[half] = new[half] + scales[half].weigh(i, values) * code_unit
                least = minima[half]
                if least is not None:
                    new[half] = new[half] + least.weigh(i, [sums for _, sums in found]) * unit
        return new

    def _multiply_run(
        self, stage: Stage, rows: list[Planes], local: UOp, chunk: UOp, side: int
    ) -> tuple[list[list[UOp]], list[UOp]]:
        """Of one of the lane's two runs of a chunk: (by row and group, the product; by group, the sum of x), in units
        of x."""
        spec, slot, body = self.spec, self.place.lane % 4 + 4 * side, self.place.body
        run = chunk * SLOTS + slot
        codes = [read_bytes(planes, number(local * SLOTS + slot), spec.mma) for planes in rows]
        x, forms = self._words_of_x(stage, run), byte_forms(spec.format)
        sums = [self.staged.sums[run * spec.groups + g].load() for g in range(spec.groups)]
        parts = []
        for g in range(2):
            words, start = slice(g * PLANE_WORDS // 2, (g + 1) * PLANE_WORDS // 2), [UOp.const(0, I32)] * 4
            products = multiply_bytes(body, [code[words] for code in codes], x[words], start)
            parts.append([products[2 * half] * 256 + products[2 * half + 1] for half in range(2)])
        first, second = forms
        if spec.groups == 2:
            values = [
                [parts[g][half].cast(F32) * form.unit - sums[g] * form.excess for g, form in enumerate(forms)]
                for half in range(2)
            ]
            return values, sums
        times = round(first.unit / second.unit)
        totals = [(parts[0][half] * times + parts[1][half]).cast(F32) for half in range(2)]
        if first.excess:
            totals = [total - sums[0] * second.start for total in totals]
        return [[total] for total in totals], sums

    def _words_of_x(self, stage: Stage, run: UOp) -> list[UOp]:
        """The lane's words of a run of x: of the plane of its token, if that belongs to the run's slot. Read before the
        loop, they stay in registers."""
        spec, token, after = self.spec, self.place.lane // 4, () if self.spec.holds_x else (stage.waited,)
        is_own = (token // 2).eq(self.place.lane % 4)
        at = is_own.where(run * RUN_WORDS + token % 2 * PLANE_WORDS, spec.num_runs * RUN_WORDS)
        return load_cuda_words(self.staged.words, at, PLANE_WORDS, *after)
