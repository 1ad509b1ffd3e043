"""Products of a few token rows on Hopper: one warp streams the weights, the others multiply them.

With few rows, a product takes as long as its matrix takes to come from memory. So the fetching warp keeps a ring of
stages full, by TMA, whatever the other warps do. A stage holds some columns of all tokens and of the tile's matrix
rows; wgmma multiplies them, with groups of 64 tokens as its left operand. The first stages' weights, which no kernel
writes, are fetched while the previous kernel still runs. Only the token rows wait for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TypeVar

from tinygrad import UOp
from tinygrad.uop.ops import Ops

from tinyvllm.ops.activation import gated
from tinyvllm.ops.gpu.gemm_hopper import HOPPER_ARITHMETIC
from tinyvllm.ops.gpu.plane_ring import LEAST_BYTES
from tinyvllm.ops.gpu.product import GatedRows
from tinyvllm.ops.gpu.token_tiles import TokenTile
from tinyvllm.ops.kernel.body import F16, F32, I32, U32, Body, KernelFn, cached_kernel, clamp, finish
from tinyvllm.ops.kernel.hopper import (
    GROUP_WARPS,
    HOPPER_SHARED_BYTES,
    MAP_WORDS,
    MULTIPROCESSORS,
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
    multiply_wgmma,
    read_sums,
    statement,
    uniform,
    wait,
)
from tinyvllm.ops.kernel.lanes import CHAIN, LANES, Lanes, Mma, axes_of
from tinyvllm.ops.kernel.tiles import PTX_NAMES, TileMma, together
from tinyvllm.ops.kernel.tuning import Tunable

MAX_STREAMED = 128  # token rows of a product, at most
# bytes of the smallest matrices that are worth it, and those of a step of few rows
MIN_BYTES, MIN_BYTES_OF_FEW, FEW_TOKENS = 4 << 20, 24 << 20, 16
MANY_TOKENS, MIN_COLS_OF_MANY = 64, 4096
PANEL_ROW_BYTES = WGMMA_COLS * 2
EXTRA_BYTES = 1024  # after the stages: two tensor maps, and the barriers
BARRIERS_AT = 512
STAGE_ROOM = HOPPER_SHARED_BYTES - EXTRA_BYTES
MIN_STAGES = 3  # that keep memory busy: one is multiplied meanwhile
MAX_STAGES = 32  # whose two barriers fit there
MAX_ROW_TILE = 256  # rows of a wgmma's right operand
ROW_STEP = 16  # the output's rows, and a tile's, are a multiple
MIN_SPLIT_COLS = 512  # the fewest columns that are worth a threadgroup
UNIT_WORDS = 3 * MAP_WORDS  # of a threadgroup: two maps, and a word that it writes so that tinygrad sees a write
MAP_SIZE = MULTIPROCESSORS * UNIT_WORDS
# Kernels that describe their operands before the wait, each to memory of its own, since many of them may have started
# by then. Their threadgroups share no multiprocessor (LEAST_BYTES), so that fewer than these fit on the device at once
NUM_MAPS = 32
LEAST_UNITS = MULTIPROCESSORS // (NUM_MAPS - 1) + 1
# what a product costs, in ns and in bytes per ns (measured on an H200)
MEMORY_RATE = 4400.0  # from memory to all multiprocessors
CACHE_RATE = 65.0  # from the L2 cache to each of them
ROW_TIME = 1.05  # of the tensor cores: 64 columns of a matrix row, times 64 tokens
CHAIN_TIME = 135.0  # of four wgmma that add to the same sums, at least
STAGE_TIME = 30.0  # of a stage: to wait for it and to release it
FIRST_TIME, TURN_TIME = 1500.0, 500.0  # of the first tile and of each other one: to store its results, above all


Number = TypeVar("Number", int, UOp)


@dataclass(frozen=True)
class StreamSpec(GatedRows, Tunable):
    """partials (S, T, N) = x (T, K) @ w.T over S splits of K, or out (T, N / 2) = activation(gate) * up, or, if S is 1,
    out (T, N) = residual + x @ w.T."""

    name: str
    lanes: Lanes
    mma: Mma
    num_tokens: int  # T, up to 128
    num_rows: int  # N
    num_cols: int  # K
    activation: str | None = None  # the matrix is gate over up: out = activation(gate) * up
    adds_residual: bool = False  # if S is 1

    @property
    def boxes(self) -> int:
        """Copies that fetch a panel of the tile's matrix rows: one each for gate and up."""
        return 2 if self.is_gated else 1

    @property
    def row_tile(self) -> int:
        """Rows of the matrix in a tile; of gate and up, half each."""
        return self.knob("row_tile", self._cut[0])

    @property
    def _cut(self) -> tuple[int, int]:
        """(rows of the matrix in a tile, splits of K) by the rule."""
        chosen = dict(self.chosen)
        if "row_tile" in chosen and "splits" in chosen:  # as in `best_cut`
            return chosen["row_tile"], chosen["splits"]
        return best_cut(self.num_tokens, self.num_rows, self.num_cols, self.is_gated, self.adds_residual)

    @property
    def out_tile(self) -> int:
        return self.row_tile // 2 if self.is_gated else self.row_tile

    @property
    def splits(self) -> int:
        """S."""
        return self.knob("splits", self._cut[1])

    @property
    def panels(self) -> int:
        """Panels of 64 columns of a stage."""
        cols, pair = self.num_cols // self.splits, 2 * (self.row_tile + self.token_rows) * PANEL_ROW_BYTES
        is_pair = cols % (2 * WGMMA_COLS) == 0 and cols >= 4 * WGMMA_COLS and MIN_STAGES * pair <= STAGE_ROOM
        return self.knob("panels", 2 if is_pair else 1)

    @property
    def groups(self) -> int:
        """Groups of four warps, each of which multiplies 64 token rows."""
        return -(-self.num_tokens // WGMMA_TOKENS)

    @property
    def fetcher(self) -> int:
        """The warp that fetches."""
        return self.groups * GROUP_WARPS

    @property
    def token_rows(self) -> int:
        """Token rows in a stage: those of the step, in whole blocks of 8. wgmma reads whole groups of 64: what it reads
        after them, as token rows, gives results that are not stored."""
        return -(-self.num_tokens // 8) * 8

    @property
    def row_groups(self) -> int:
        return -(-self.out_rows // self.out_tile)

    @property
    def reads_once(self) -> bool:
        """Whether a step reads each row of the matrix once."""
        return self.token_groups == 1

    @property
    def token_groups(self) -> int:
        """Tiles of tokens."""
        return 1

    @property
    def num_tiles(self) -> int:
        return self.splits * self.row_groups * self.token_groups

    @property
    def units(self) -> int:
        """Threadgroups. Each walks along a list of tiles."""
        return min(self.num_tiles, MULTIPROCESSORS)

    def turns_of(self, unit: Number) -> Number:
        """How many tiles a threadgroup has."""
        return (self.num_tiles - 1 - unit) // self.units + 1

    def tile_of(self, number: Number) -> tuple[Number, Number, Number]:
        """(split of K, first row of the output, first token) of a tile of the list. Neighbors share the matrix's
        rows."""
        rows, token_group = number // self.token_groups, number % self.token_groups
        return rows // self.row_groups, rows % self.row_groups * self.out_tile, token_group * self.token_rows

    @property
    def steps(self) -> int:
        """Stages of a tile."""
        return self.num_cols // (WGMMA_COLS * self.panels) // self.splits

    @property
    def token_bytes(self) -> int:
        """Bytes of a stage's panel of token rows."""
        return self.token_rows * PANEL_ROW_BYTES

    @property
    def stage_bytes(self) -> int:
        return (self.token_rows + self.row_tile) * PANEL_ROW_BYTES * self.panels

    @property
    def stages(self) -> int:
        return min(MAX_STAGES, STAGE_ROOM // self.stage_bytes)

    @property
    def early(self) -> int:
        """Stages that are fetched in advance."""
        return min(self.stages, self.steps)

    @property
    def barriers_at(self) -> int:
        return self.stages * self.stage_bytes + BARRIERS_AT

    @property
    def shared_bytes(self) -> int:
        """Threadgroup memory of the kernel."""
        extra = max(EXTRA_BYTES, self.read_bytes - self.stage_bytes)
        return max(LEAST_BYTES, self.stages * self.stage_bytes + extra)

    @property
    def read_bytes(self) -> int:
        """Bytes from the beginning of a stage on that are read, of which those after it do not matter."""
        return (self.panels - 1) * self.token_bytes + self.groups * WGMMA_TOKENS * PANEL_ROW_BYTES

    @property
    def readers(self) -> int:
        """How many say that they have read a stage: one warp of each group."""
        return self.groups

    @property
    def map_size(self) -> int:
        """Words of the tensor maps by which the threadgroups describe x and the matrix."""
        return self.units * UNIT_WORDS

    @property
    def run(self) -> int:
        """Consecutive rows among a lane's results: 16 bytes, if each copy's rows are whole runs of four lanes."""
        is_half = self.is_gated or self.adds_residual
        return 8 if is_half and self.row_tile // self.boxes % 32 == 0 else 4

    @property
    def token_box(self) -> Box:
        """The part of x that a copy fetches."""
        return Box((self.num_cols, self.num_tokens), (self.num_cols * 2,), (WGMMA_COLS, self.token_rows))

    @property
    def row_box(self) -> Box:
        """The part of the matrix that a copy fetches, with its rows permuted as in `WgmmaSpec.row_box`."""
        row, group = self.num_cols * 2, 4 * self.run
        sizes = (self.num_cols, 2, 4, self.run // 2, self.num_rows // group)
        box = (WGMMA_COLS, 2, 4, self.run // 2, self.row_tile // self.boxes // group)
        return Box(sizes, (row, self.run * row, 2 * row, group * row), box)

    @property
    def is_wanted(self) -> bool:
        """Whether this kernel is faster than `matrix_kernel` or `wgmma_kernel`: 15 to 40 % on an H200, except for small
        matrices, since it begins later (it describes its operands to the copy engine first). With more than 64 rows the
        products of 8B gain 1 to 11 %, but a 1B model's step of 128 took 11 % longer."""
        if self.num_tokens > MANY_TOKENS and self.num_cols < MIN_COLS_OF_MANY:
            return False
        least = MIN_BYTES if self.num_tokens > FEW_TOKENS else MIN_BYTES_OF_FEW
        return self.num_tokens <= MAX_STREAMED and self.num_rows * self.num_cols * 2 >= least

    @property
    def predicted_s(self) -> float:
        return self.nanoseconds / 1e9

    @property
    def nanoseconds(self) -> float:
        """A rough cost, to choose between tiles. A turn of tiles takes as long as the slowest of: its rows from memory,
        rows and tokens from the L2 cache, and the products. In addition, partial sums are written and read."""
        rows, tokens = self.row_tile * PANEL_ROW_BYTES, self.token_rows * PANEL_ROW_BYTES
        cached = (rows + tokens) / CACHE_RATE
        multiplied = max(self.groups * self.row_tile * ROW_TIME, CHAIN_TIME) + STAGE_TIME / self.panels
        turns = [min(self.num_tiles - first, self.units) for first in range(0, self.num_tiles, self.units)]
        panels = sum(max(active * rows / MEMORY_RATE, cached, multiplied) for active in turns)
        added = 0.0 if self.is_gated else 8 * self.splits * self.num_tokens * self.num_rows / MEMORY_RATE
        return self.steps * self.panels * panels + FIRST_TIME + (len(turns) - 1) * TURN_TIME + added

    def knobs(self) -> Mapping[str, tuple[int, ...]]:
        return {
            "row_tile": (32, 48, 64, 96, 112, 128, 160, 192, 224, 256),
            "splits": () if self.is_gated or self.adds_residual else (1, 2, 4, 8),
            "panels": (1, 2, 4),
        }

    def is_possible(self) -> bool:
        cols = WGMMA_COLS * self.panels * self.splits
        return (
            self.row_tile <= MAX_ROW_TILE
            and self.row_tile // self.boxes % ROW_STEP == 0
            and self.num_tokens <= MAX_STREAMED
            and self.out_rows % (4 * self.run) == 0
            and self.num_cols % cols == 0
            and self.steps >= 2
            and self.stages >= 2
            and self.units >= LEAST_UNITS
            and (self.groups * GROUP_WARPS + 1) * LANES * (self.row_tile // 2 + 48) <= 64 << 10
        )


@cache
def best_cut(num_tokens: int, num_rows: int, num_cols: int, is_gated: bool, adds_residual: bool) -> tuple[int, int]:
    """The fastest (rows of the matrix in a tile, splits of K) for a product, by `nanoseconds`."""
    activation = "silu" if is_gated else None
    whole = StreamSpec("", Lanes("CUDA"), Mma("CUDA", F16), num_tokens, num_rows, num_cols, activation, adds_residual)
    specs = [
        replace(whole, chosen=(("row_tile", rows), ("splits", splits)))
        for rows in range(16 * whole.boxes, MAX_ROW_TILE + 1, 16 * whole.boxes)
        for splits in ((1,) if is_gated or adds_residual else (1, 2, 4, 8))
        if num_cols // splits >= MIN_SPLIT_COLS or splits == 1
    ]
    possible = [spec for spec in specs if spec.is_possible()] or specs
    best = min(possible, key=lambda spec: spec.nanoseconds)
    return best.row_tile, best.splits


@cached_kernel
def stream_kernel(spec: StreamSpec) -> KernelFn:
    """fn(out, maps (map_size,) uint32, w, x[, residual]): see StreamSpec."""

    def kernel(out: UOp, maps: UOp, w: UOp, x: UOp, *rest: UOp) -> UOp:
        assert spec.is_possible(), f"{spec} {spec.chosen} is not possible"
        kind = "float16" if spec.mma.dtype == F16 else "bfloat16"
        return finish_stream_kernel(spec, StreamWork(spec, out, maps, w, x, rest), kind, 16)

    return kernel


def finish_stream_kernel(spec: StreamSpec, work: StreamWork, kind: str, bits: float) -> UOp:
    """The kernel that does a threadgroup's work. `kind`: the weights' format; `bits`: of a weight."""
    ready = work.prepare()
    begun = work.await_previous(work.fetch_early(ready))
    done = UOp(Ops.BARRIER, src=(work.fetch_rest(begun), work.multiply(begun)))
    name = f"{spec.name}_{kind}_{spec.num_tokens}x{spec.num_rows}x{spec.num_cols}"
    size = spec.num_rows * spec.num_cols
    return finish(done.end(*reversed(work.axes)), name, ops=2 * spec.num_tokens * size, nbytes=int(size * bits / 8))


def row_of(spec: StreamSpec, block: int, element: int, lane: Number) -> Number:
    """The row, counted from the tile's first, of a lane's result in a block of eight of the tile's rows."""
    blocks = spec.run // 2
    return lane % 4 * spec.run + (block // blocks * 4 * spec.run + block % blocks * 2 + element % 2)


Stage = tuple[UOp, UOp, UOp, UOp]  # see `StreamWork._stage`
Tile = tuple[UOp, UOp, UOp]  # see `StreamSpec.tile_of`


class StreamWork:
    """One threadgroup's work: its tiles of the list, one after another."""

    def __init__(self, spec: StreamSpec, out: UOp, maps: UOp, w: UOp, x: UOp, rest: Sequence[UOp]) -> None:
        self.spec, self.out, self.maps, self.w, self.x = spec, out, maps, w, x
        self.residual = rest[0] if spec.adds_residual else None
        body = self.body = Body()
        self.unit = body.grid(spec.units)
        self.lane, self.warp = body.threads(LANES), body.threads(spec.fetcher + 1)
        self.role = uniform(self.warp)  # the warp's number, without limits that tinygrad knows
        self.axes = axes_of(self.unit, self.lane, self.warp)
        self.is_fetcher = self.role.eq(spec.fetcher)
        # for the conditions of stores: if they told tinygrad the warp, it would simplify the loops around the stores by
        # it, and so make second loops
        self.multiplier = clamp(self.role, 0, spec.fetcher - 1)
        self.turns, self.first_turn = spec.turns_of(self.unit), UOp.const(0, I32)

    def prepare(self) -> UOp:
        """The UOp after which tensor maps, barriers and memory are ready."""
        spec, memory = self.spec, declare(self.spec.shared_bytes)
        end, word = spec.stages * spec.stage_bytes, self.unit * UNIT_WORDS
        # tinygrad does not see the writes of our own statements
        own = (word + 2 * MAP_WORDS).valid(self.warp.eq(0) & self.lane.eq(0))
        maps = self.maps.after(self.maps[own].store(UOp.const(0, U32)))
        described = [
            describe(0, end, maps[word], self.x[0], spec.token_box, memory),
            describe(1, end + MAP_WORDS * 4, maps[word + MAP_WORDS], self.w[0], spec.row_box, memory),
        ]
        barriers = make_barriers(spec.barriers_at, spec.stages, 1, spec.readers, memory)
        return UOp(Ops.BARRIER, src=(*described, barriers))

    def await_previous(self, fetched: UOp) -> UOp:
        """The UOp after which what the previous kernels have written may be read."""
        return UOp(Ops.BARRIER, src=(statement(CHAIN, fetched) if self.spec.lanes.is_chained else fetched,))

    # -- places --------------------------------------------------------------------------------------------------------

    def _stage(self, count: UOp) -> Stage:
        """(stage, full barrier, empty barrier, parity of the phase) of the count-th stage since the beginning; the
        first three as bytes of threadgroup memory."""
        spec = self.spec
        slot, turn = count % spec.stages, count // spec.stages
        full = slot * 8 + spec.barriers_at
        return slot * spec.stage_bytes, full, full + spec.stages * 8, turn % 2

    def _tile(self, turn: UOp) -> Tile:
        """The threadgroup's tile number `turn`."""
        spec = self.spec
        return spec.tile_of((turn * spec.units + self.unit).minimum(spec.num_tiles - 1))

    @property
    def most_turns(self) -> int:
        # never a single turn: with a constant turn, the compiler keeps everything that follows from it in registers
        return max(2, -(-self.spec.num_tiles // self.spec.units))

    # -- the warp that fetches -----------------------------------------------------------------------------------------

    def _fold(self, count: UOp | int) -> UOp:
        """A loop of the fetching warp's first lane; without iterations for all others: tinygrad has no branches."""
        is_first = self.lane.eq(0).where(UOp.const(1, I32), 0)
        return self.body.fold_while(uniform(self.is_fetcher.where(count, 0)) * is_first)

    def fetch_early(self, ready: UOp) -> UOp:
        """Fetch the weights of the first stages."""
        loop = self._fold(self.spec.early)
        step = clamp(loop, 0, self.spec.early - 1)
        acquired = [acquire_map(self._map(which), ready, warp=self.spec.fetcher) for which in range(2)]
        stage = self._stage(step)
        expected = expect(stage[1], self.spec.stage_bytes, loop, *acquired)
        return self._fetch_rows(stage, step, self._tile(self.first_turn), expected).end(loop)

    def fetch_rest(self, begun: UOp) -> UOp:
        """Fetch the token rows of the first stages, and then all other stages, each as soon as it is empty."""
        spec, tile = self.spec, self._tile(self.first_turn)
        loop = self._fold(spec.early)
        step = clamp(loop, 0, spec.early - 1)
        done = self._fetch_tokens(self._stage(step), step, tile, loop, begun).end(loop)
        if spec.steps > spec.early:
            loop = self._fold(spec.steps - spec.early)
            step = clamp(loop, 0, spec.steps - spec.early - 1) + spec.early
            done = self._fetch(step, step, tile, loop, done).end(loop)
        if spec.num_tiles > spec.units:
            loop = self._fold(self.turns - 1)
            turn = clamp(loop, 0, self.most_turns - 1) + 1  # never a single one, as there
            step = self.body.fold(spec.steps)
            done = self._fetch(turn * spec.steps + step, step, self._tile(turn), step, loop, done).end(step).end(loop)
        return done

    def _fetch(self, number: UOp, step: UOp, tile: Tile, *after: UOp) -> UOp:
        """Fetch a stage, as soon as it is empty."""
        stage = _, full, empty, parity = self._stage(number)
        expected = expect(full, self.spec.stage_bytes, wait(empty, 1 - parity, *after))
        return self._fetch_rows(stage, step, tile, self._fetch_tokens(stage, step, tile, expected))

    def _map(self, which: int) -> UOp:
        return self.maps[self.unit * UNIT_WORDS + which * MAP_WORDS]

    def _fetch_rows(self, stage: Stage, step: UOp, tile: Tile, *after: UOp) -> UOp:
        """Fetch the matrix's rows of a stage."""
        spec, (place, full, *_), (split, first_row, _) = self.spec, stage, tile
        last, nil = after, UOp.const(0, I32)
        for panel in range(spec.panels):
            col = ((split * spec.steps + step) * spec.panels + panel) * WGMMA_COLS
            for box in range(spec.boxes):
                row = first_row + box * spec.out_rows
                target = self._rows(place, panel) + box * (spec.row_tile // spec.boxes * PANEL_ROW_BYTES)
                at = [col, nil, nil, nil, row // (4 * spec.run)]
                last = (fetch(target, self._map(1), full, at, *last, is_read_once=spec.reads_once),)
        return last[0]

    def _rows(self, place: UOp, panel: int) -> UOp:
        """Where a panel of the matrix's rows begins in the stage at `place`."""
        return place + (self.spec.panels * self.spec.token_bytes + panel * self.spec.row_tile * PANEL_ROW_BYTES)

    def _fetch_tokens(self, stage: Stage, step: UOp, tile: Tile, *after: UOp) -> UOp:
        """Fetch the token rows of a stage."""
        spec, (place, full, *_), (split, _, first_token) = self.spec, stage, tile
        last = after
        for panel in range(spec.panels):
            col = ((split * spec.steps + step) * spec.panels + panel) * WGMMA_COLS
            last = (fetch(place + panel * spec.token_bytes, self._map(0), full, [col, first_token], *last),)
        return last[0]

    # -- the warps that multiply ---------------------------------------------------------------------------------------

    def multiply(self, begun: UOp) -> UOp:
        """Multiply all stages in order, each as soon as it is full, and store the results of each tile."""
        spec, count = self.spec, self.spec.row_tile // 2
        loop = self.body.fold_while(uniform(self.is_fetcher.where(0, self.turns)))
        turn = clamp(loop, 0, self.most_turns - 1)
        places = self._places(turn)
        registers = self.body.registers(count)
        empty = registers.after(loop, begun)
        first = [UOp.const(0.0, F32)] * count
        if self.residual is not None:
            residual = self.residual.after(begun)
            first = [residual[at].load().cast(F32) for at in places]
        registers = registers.after(UOp.group(*[empty[i].store(value) for i, value in enumerate(first)]))
        step = self.body.fold(spec.steps)
        number = turn * spec.steps + step
        added = self._add_stage(number, registers.after(step), begun, step > 0)
        registers = registers.after(added.end(step))
        finished = finish_wgmma(registers)
        released = self._release(turn * spec.steps + (spec.steps - 1), None, finished)
        values = read_sums(registers, released)
        if spec.activation is not None:
            half = count // 2
            values = gated(spec.activation, values[:half], values[half:], HOPPER_ARITHMETIC)
        stores = [self.out[at].store(value.cast(self.out.dtype)) for at, value in zip(places, values, strict=True)]
        return UOp.group(*stores).end(loop)

    def _add_stage(self, number: UOp, sums: UOp, begun: UOp, has_previous: UOp) -> UOp:
        """Start to add the products of a stage, and release the previous one."""
        spec, (place, full, _, parity) = self.spec, self._stage(number)
        group, statements = self.warp // GROUP_WARPS, []
        last = wait(full, parity, begun)
        for panel in range(spec.panels):
            left = place + (panel * spec.token_bytes) + group * (WGMMA_TOKENS * PANEL_ROW_BYTES)
            last = multiply_wgmma(PTX_NAMES[spec.mma.dtype], left, self._rows(place, panel), sums, 1, last)
            statements.append(last)
            if panel == 0:
                last = self._release((number - 1).maximum(0), has_previous, last)
                statements.append(last)
        return together(*statements)

    def _release(self, number: UOp, condition: UOp | None, *after: UOp) -> UOp:
        """Tell the fetching warp that this group of warps has read a stage."""
        is_one = (self.warp % GROUP_WARPS).eq(0) & self.lane.eq(0)
        return arrive(self._stage(number)[2], is_one if condition is None else is_one & condition, *after)

    def _places(self, turn: UOp) -> list[UOp]:
        """Where the thread's results of a tile go: runs of consecutive rows."""
        spec, mma, places = self.spec, TileMma(self.spec.mma), []
        split, first_row, _ = self._tile(turn)
        tile = TokenTile(0, spec.groups * WGMMA_TOKENS, spec.num_tokens)
        for block in range(spec.out_tile // 8):
            for element in range(mma.elements):
                token = self.multiplier * mma.left_rows + mma.place(self.lane, element)[0]
                row = first_row + row_of(spec, block, element, self.lane)
                run = first_row + row_of(spec, block // (spec.run // 2) * (spec.run // 2), 0, self.lane)
                at = (split * spec.num_tokens + tile.target(token)) * spec.out_rows + row
                exists = tile.exists(token)
                if exists is not None:
                    at = at.valid(exists)
                if spec.out_rows % spec.out_tile:
                    at = at.valid(run < spec.out_rows)  # a whole run or nothing
                places.append(at)
        return places
