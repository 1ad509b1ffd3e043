"""Products of many token rows on Hopper: one warp fetches tiles, eight multiply them.

The fetching warp runs ahead through a ring of stages, each of which holds 64 columns of 128 tokens and of the tile's
matrix rows; it waits for a stage to be empty, the others for it to be full. As many threadgroups as the device has
multiprocessors each walk along a list of tiles, so the next tile's first stages arrive while this one's results are
stored. Two neighbours form a cluster: they compute the same matrix rows for other tokens, and share what they fetch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TypeVar

from tinygrad import UOp
from tinygrad.uop.ops import Ops

from tinyvllm.ops.activation import Arithmetic, gated
from tinyvllm.ops.kernel.body import F16, F32, I32, LOG2E, U32, Body, KernelFn, cached_kernel, clamp, finish
from tinyvllm.ops.kernel.hopper import (
    CLUSTER,
    HOPPER_SHARED_BYTES,
    MAP_WORDS,
    WGMMA_COLS,
    WGMMA_TOKENS,
    Box,
    acquire_map,
    arrive,
    declare,
    describe,
    expect,
    fetch,
    finish_wgmma,
    make_barriers,
    meet,
    multiply_wgmma,
    read_sums,
    uniform,
    wait,
)
from tinyvllm.ops.kernel.lanes import LANES, Mma, axes_of
from tinyvllm.ops.kernel.tiles import PTX_NAMES, TileMma, together

MULTIPROCESSORS = 132  # of an H100 or H200; on another, threadgroups take turns
TOKEN_TILE = 128
GROUP_WARPS = 4  # that multiply together
NUM_GROUPS = TOKEN_TILE // WGMMA_TOKENS
FETCHER = NUM_GROUPS * GROUP_WARPS  # the warp that fetches
MAX_STAGES = 8
EXTRA_BYTES = 1024  # behind the stages: two maps, and the barriers
BARRIERS_AT = 512
ROW_TILES = (64, 96, 128, 192, 256)
MIN_STEPS = 2  # stages of a tile: tinygrad drops a loop that it knows to run once, and the order of what is in it
RUN_ROWS = 32  # of the output: a multiple of these
CACHED_TOKENS = 2048  # rows of x that a large GPU's cache holds beside the matrix's
# what a product takes, in cycles of a multiprocessor (measured on an H200, where 4 a row would be the most there is)
ROW_CYCLES = 4.25  # of a stage, for each of the tile's rows
TILE_CYCLES = 5000  # of a tile beside its stages: the first of them, and the results
CACHE_BYTES_PER_CYCLE = 40  # that the L2 cache gives a multiprocessor, all of them at it
MEMORY_BYTES_PER_CYCLE = 2400

SWISH = (
    '[&]{{ float r; asm("{{ .reg .f32 d;\\nex2.approx.ftz.f32 d, %1;\\nadd.f32 d, d, 0f3F800000;\\n'
    'rcp.approx.ftz.f32 %0, d; }}" : "=f"(r) : "f"({1})); return {0} * r; }}()'
)


# good to a few units in the last place of float32
HOPPER_ARITHMETIC = Arithmetic(
    lambda x: x.exp2(), lambda x, slope: UOp(Ops.CUSTOM, F32, src=(x, x * (slope * -LOG2E)), arg=SWISH)
)


@dataclass(frozen=True)
class WgmmaSpec:
    """partial (S, T, N) = x (T, K) @ w.T over S parts of K, or out (T, N / 2) = activation(gate) * up, in float16. K is
    a multiple of 64 * S, the output's rows of 32. Hashable: the key of its kernel."""

    name: str
    mma: Mma
    num_tokens: int  # T
    num_rows: int  # N
    num_cols: int  # K
    row_tile: int  # rows of the matrix in a tile, a multiple of 32: where it is gated, half of them gate and half up
    splits: int  # S
    activation: str | None = None  # the matrix is gate over up: out = activation(gate) * up
    adds_residual: bool = False  # to the one part

    @property
    def is_gated(self) -> bool:
        return self.activation is not None

    @property
    def out_rows(self) -> int:
        return self.num_rows // 2 if self.is_gated else self.num_rows

    @property
    def out_tile(self) -> int:
        return self.row_tile // 2 if self.is_gated else self.row_tile

    @property
    def cluster(self) -> int:
        return CLUSTER if self.num_tokens > TOKEN_TILE else 1

    @property
    def boxes(self) -> int:
        """Copies that fetch a tile's matrix rows: gates and up, or each threadgroup's share."""
        return 2 if self.is_gated else self.cluster

    @property
    def token_box(self) -> Box:
        """What a copy fetches of x."""
        return Box((self.num_cols, self.num_tokens), (self.num_cols * 2,), (WGMMA_COLS, TOKEN_TILE))

    @property
    def run(self) -> int:
        """Neighbours among a lane's results: 16 bytes of them, where the tile's shares are whole runs of four lanes."""
        is_half = self.is_gated or self.adds_residual
        return 8 if is_half and self.row_tile // self.boxes % 32 == 0 else 4

    @property
    def row_box(self) -> Box:
        """What a copy fetches of the matrix: its rows in another order. The unit gives a lane two neighbours of every
        eight rows of a tile, and four lanes the others; so the tile's rows are (b, l, e) of (run / 2, 4, 2) where the
        matrix's are (l, b, e), and a lane's results of run / 2 blocks are neighbours."""
        row, group = self.num_cols * 2, 4 * self.run
        sizes = (self.num_cols, 2, 4, self.run // 2, self.num_rows // group)
        box = (WGMMA_COLS, 2, 4, self.run // 2, self.row_tile // self.boxes // group)
        return Box(sizes, (row, self.run * row, 2 * row, group * row), box)

    @property
    def token_groups(self) -> int:
        """Tiles of tokens, by clusters."""
        return -(-self.num_tokens // (TOKEN_TILE * self.cluster))

    @property
    def together(self) -> int:
        """Of those, as many as caches hold the rows of x."""
        count = min(self.token_groups, CACHED_TOKENS // (TOKEN_TILE * self.cluster))
        return count if self.token_groups % count == 0 else self.token_groups

    @property
    def row_groups(self) -> int:
        return -(-self.out_rows // self.out_tile)

    @property
    def num_tiles(self) -> int:
        """Of clusters."""
        return self.splits * self.token_groups * self.row_groups

    @property
    def num_clusters(self) -> int:
        return min(self.num_tiles, MULTIPROCESSORS // self.cluster)

    @property
    def steps(self) -> int:
        """Stages of a tile."""
        return self.num_cols // WGMMA_COLS // self.splits

    @property
    def stage_bytes(self) -> int:
        return (TOKEN_TILE + self.row_tile) * WGMMA_COLS * 2

    @property
    def stages(self) -> int:
        return min(MAX_STAGES, (HOPPER_SHARED_BYTES - EXTRA_BYTES) // self.stage_bytes)

    @property
    def shared_bytes(self) -> int:
        """Threadgroup memory of the kernel."""
        return self.stages * self.stage_bytes + EXTRA_BYTES

    @property
    def map_size(self) -> int:
        """Words of the maps that the threadgroups describe x and the matrix by."""
        return self.num_clusters * self.cluster * 2 * MAP_WORDS

    @property
    def cycles(self) -> float:
        """What the product takes, roughly: for choosing among tiles."""
        fetched = (TOKEN_TILE + self.row_tile / self.cluster) * WGMMA_COLS * 2 / CACHE_BYTES_PER_CYCLE
        turns = -(-self.num_tiles // self.num_clusters)
        added = (self.splits - 1) * self.num_tokens * self.num_rows * 8 / MEMORY_BYTES_PER_CYCLE
        return turns * (self.steps * max(self.row_tile * ROW_CYCLES, fetched) + TILE_CYCLES) + added


@cache
def best_cut(num_tokens: int, num_rows: int, num_cols: int, is_gated: bool) -> tuple[int, int]:
    """The quickest (rows of the matrix in a tile, parts of K) of a product."""
    splits = [s for s in ((1,) if is_gated else (1, 2, 4, 8)) if num_cols % (s * MIN_STEPS * WGMMA_COLS) == 0 or s == 1]
    mma = Mma("CUDA", F16)
    specs = [
        WgmmaSpec("", mma, num_tokens, num_rows, num_cols, row_tile, s, "silu" if is_gated else None)
        for row_tile in ROW_TILES
        for s in splits
    ]
    best = min(specs, key=lambda spec: spec.cycles)
    return best.row_tile, best.splits


@cached_kernel
def wgmma_kernel(spec: WgmmaSpec) -> KernelFn:
    """fn(out, maps (map_size,) uint32, w, x[, residual]): see WgmmaSpec."""

    def kernel(out: UOp, maps: UOp, w: UOp, x: UOp, *residual: UOp) -> UOp:
        assert spec.steps >= MIN_STEPS, f"{spec} has {spec.steps} stages a tile"
        work = _WgmmaKernel(spec, out, maps, w, x, residual[0] if residual else None)
        ready = work.prepare()
        done = UOp(Ops.BARRIER, src=(work.fetch_tiles(ready), work.multiply_tiles(ready)))
        if spec.cluster > 1:  # none may leave whose memory the other still writes to
            done = meet(done)
        name = f"{spec.name}_float16_{spec.num_tokens}x{spec.num_rows}x{spec.num_cols}"
        size = spec.num_rows * spec.num_cols
        return finish(done.end(*reversed(work.axes)), name, ops=2 * spec.num_tokens * size, nbytes=2 * size)

    return kernel


Number = TypeVar("Number", int, UOp)


def tile_of(spec: WgmmaSpec, number: Number, rank: Number) -> tuple[Number, Number, Number]:
    """(part of K, first row of the output, first token) of a tile of the list, for a threadgroup of the cluster."""
    inner, rest = number % spec.together, number // spec.together
    row_group, rest = rest % spec.row_groups, rest // spec.row_groups
    outer, part = rest % (spec.token_groups // spec.together), rest // (spec.token_groups // spec.together)
    token_group = (outer * spec.together + inner) * spec.cluster + rank
    return part, row_group * spec.out_tile, token_group * TOKEN_TILE


def row_of(spec: WgmmaSpec, block: int, element: int, lane: Number) -> Number:
    """The row, from the tile's first, of a lane's result of a block of eight of the tile's rows."""
    blocks = spec.run // 2
    return lane % 4 * spec.run + (block // blocks * 4 * spec.run + block % blocks * 2 + element % 2)


class _WgmmaKernel:
    """One threadgroup's work inside the kernel: of the list of tiles those of its cluster, one after another."""

    def __init__(self, spec: WgmmaSpec, out: UOp, maps: UOp, w: UOp, x: UOp, residual: UOp | None) -> None:
        self.spec, self.out, self.maps, self.w, self.x, self.residual = spec, out, maps, w, x, residual
        body = self.body = Body()
        count = spec.num_clusters * spec.cluster
        self.number: UOp | int = body.grid(count) if count > 1 else 0
        self.lane, self.warp = body.threads(LANES), body.threads(FETCHER + 1)
        self.role = uniform(self.warp)  # the warp's number, which tinygrad cannot know the limits of
        self.axes = axes_of(self.number, self.lane, self.warp)
        self.rank = self.number % spec.cluster  # in the cluster
        self.unit = self.number // spec.cluster

    def prepare(self) -> UOp:
        """Maps, barriers, and memory are there."""
        spec, memory = self.spec, declare(self.spec.shared_bytes)
        end = spec.stages * spec.stage_bytes
        word = self.number * (2 * MAP_WORDS)
        # cleared, so that tinygrad knows them to be written: statements of ours it does not understand
        own = (word + self.warp * MAP_WORDS + self.lane).valid(self.warp < 2)
        maps = self.maps.after(self.maps[own].store(UOp.const(0, U32)))
        described = [
            describe(0, end, maps[word], self.x[0], spec.token_box, memory),
            describe(1, end + MAP_WORDS * 4, maps[word + MAP_WORDS], self.w[0], spec.row_box, memory),
        ]
        barriers = make_barriers(end + BARRIERS_AT, spec.stages, 1, NUM_GROUPS * spec.cluster, memory)
        met = [meet(*described, barriers)] if spec.cluster > 1 else [*described, barriers]
        return UOp(Ops.BARRIER, src=tuple(met))

    # -- places --------------------------------------------------------------------------------------------------------

    def _stage(self, count: UOp) -> tuple[UOp, UOp, UOp, UOp]:
        """Of the count-th stage since the beginning: where its tile and its barriers (full, empty) lie, and the parity
        of its phase."""
        spec = self.spec
        slot, turn = count % spec.stages, count // spec.stages
        full = slot * 8 + (spec.stages * spec.stage_bytes + BARRIERS_AT)
        return slot * spec.stage_bytes, full, full + spec.stages * 8, turn % 2

    def _loop_tiles(self, has_role: UOp, *, one_lane: bool) -> tuple[UOp, UOp, UOp]:
        """A loop over the threadgroup's tiles, of the warps that have a role: where tinygrad has no branch, a loop may
        run not at all. And the tile's number in the loop, and in the list.

        `has_role` hangs on `role`, not on `warp`: behind a condition on the warp, as of stores of the first rows alone,
        tinygrad would have another loop, whose warps all have the role."""
        spec = self.spec
        # never one turn alone: what is the same in all turns, the compiler keeps in registers from before the loop
        most = max(2, -(-spec.num_tiles // spec.num_clusters))
        count = (spec.num_tiles - 1 - self.unit) // spec.num_clusters + 1
        count = uniform(has_role.where(count, 0))
        loop = self.body.fold_while(self.lane.eq(0).where(count, 0) if one_lane else count)
        turn = clamp(loop, 0, most - 1)
        return loop, turn, (turn * spec.num_clusters + self.unit).minimum(spec.num_tiles - 1)

    # -- the warp that fetches -----------------------------------------------------------------------------------------

    def fetch_tiles(self, ready: UOp) -> UOp:
        """All stages of all tiles, one after another, each as soon as it is empty."""
        spec = self.spec
        loop, turn, number = self._loop_tiles(self.role.eq(FETCHER), one_lane=True)
        part, first_row, first_token = tile_of(spec, number, self.rank)
        maps = [self.maps[self.number * (2 * MAP_WORDS) + i * MAP_WORDS] for i in range(2)]
        acquired = [acquire_map(each, loop, ready) for each in maps]
        step = self.body.fold(spec.steps)
        place, full, empty, parity = self._stage(turn * spec.steps + step)
        col = (part * spec.steps + step) * WGMMA_COLS
        waited = wait(empty, 1 - parity, step, *acquired)
        last = expect(full, spec.stage_bytes, waited)
        last = fetch(place, maps[0], full, [col, first_token], last)
        rows, box, nil = place + TOKEN_TILE * WGMMA_COLS * 2, spec.row_tile // spec.boxes, UOp.const(0, I32)
        for i in range(1 if spec.cluster > 1 else spec.boxes):
            share = self.rank if spec.cluster > 1 else i  # of a cluster's threadgroups each fetches a half for both
            row = first_row + share * (spec.out_rows if spec.is_gated else box)
            at = [col, nil, nil, nil, row // (4 * spec.run)]
            place = rows + share * (box * WGMMA_COLS * 2)
            last = fetch(place, maps[1], full, at, last, is_shared=spec.cluster > 1)
        return last.end(step).end(loop)

    # -- the warps that multiply ---------------------------------------------------------------------------------------

    def multiply_tiles(self, ready: UOp) -> UOp:
        """The products of all stages, each as soon as it is full, and the results of each tile."""
        spec = self.spec
        count = spec.row_tile // 8 * 4
        loop, turn, number = self._loop_tiles(self.role < FETCHER, one_lane=False)
        places = self._places(*tile_of(spec, number, self.rank))
        registers = self.body.registers(count)
        begun = [UOp.const(0.0, F32)] * count
        if self.residual is not None:  # where it is added first, it is fetched while the first stages are
            begun = [self.residual[at].load().cast(F32) for at in places]
        empty = registers.after(loop, ready)
        registers = registers.after(UOp.group(*[empty[i].store(value) for i, value in enumerate(begun)]))
        step = self.body.fold(spec.steps)
        place, full, _, parity = self._stage(turn * spec.steps + step)
        group = self.warp // GROUP_WARPS
        left, right = place + group * (WGMMA_TOKENS * WGMMA_COLS * 2), place + TOKEN_TILE * WGMMA_COLS * 2
        waited = wait(full, parity, step, ready)
        added = multiply_wgmma(PTX_NAMES[spec.mma.dtype], left, right, registers.after(step), 1, waited)
        before = (turn * spec.steps + step - 1).maximum(0)
        released = self._release(self._stage(before)[2], step > 0, added)
        registers = registers.after(together(added, released).end(step))
        finished = finish_wgmma(registers)
        released = self._release(self._stage(turn * spec.steps + (spec.steps - 1))[2], None, finished)
        values = read_sums(registers, released)
        if spec.activation is not None:
            half = count // 2
            values = gated(spec.activation, values[:half], values[half:], HOPPER_ARITHMETIC)
        stores = [self.out[at].store(value.cast(self.out.dtype)) for at, value in zip(places, values, strict=True)]
        return UOp.group(*stores).end(loop)

    def _release(self, empty: UOp, condition: UOp | None, *after: UOp) -> UOp:
        """One thread of a group tells the cluster's threadgroups that the group has read a stage."""
        spec = self.spec
        is_one = (self.warp % GROUP_WARPS).eq(0) & (self.lane < spec.cluster)
        if condition is not None:
            is_one = is_one & condition
        return arrive(empty, is_one, *after, threadgroup=None if spec.cluster == 1 else self.lane % spec.cluster)

    def _places(self, part: UOp, first_row: UOp, first_token: UOp) -> list[UOp]:
        """Where the thread's results of a tile go: runs of neighbours (`WgmmaSpec.row_box`)."""
        spec, mma, places = self.spec, TileMma(self.spec.mma), []
        for block in range(spec.out_tile // 8):
            for element in range(mma.elements):
                token = first_token + self.warp * mma.left_rows + mma.place(self.lane, element)[0]
                row = first_row + row_of(spec, block, element, self.lane)
                run = first_row + row_of(spec, block // (spec.run // 2) * (spec.run // 2), 0, self.lane)
                at = (part * spec.num_tokens + token) * spec.out_rows + row
                if spec.num_tokens % (TOKEN_TILE * spec.cluster):
                    at = at.valid(token < spec.num_tokens)
                if spec.out_rows % spec.out_tile:
                    at = at.valid(run < spec.out_rows)  # all of a run or none
                places.append(at)
        return places
