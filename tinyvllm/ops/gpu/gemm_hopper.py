"""Products of many token rows on Hopper: one warp fetches tiles, eight multiply them.

The fetching warp runs ahead through a ring of stages. A stage holds 64 columns of 128 tokens and of the tile's matrix
rows; the fetching warp waits until it is empty, the other warps until it is full. There are as many threadgroups as
multiprocessors, and each walks along a list of tiles, so the next tile's first stages arrive while the results of this
one are stored. Two neighbors form a cluster: they compute the same matrix rows for different tokens, and share what
they fetch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TypeVar

from tinygrad import UOp
from tinygrad.uop.ops import Ops

from tinyvllm.arrays import Format
from tinyvllm.ops.activation import Arithmetic, gated
from tinyvllm.ops.formats.matrix import PANEL
from tinyvllm.ops.gpu.product import GatedRows
from tinyvllm.ops.gpu.token_tiles import TILE_WORDS, ExpertTile, ExpertTiles, TokenTile
from tinyvllm.ops.kernel.body import (
    F16,
    F32,
    I32,
    LOG2E,
    U32,
    Body,
    KernelFn,
    bits_of_bfloat,
    cached_kernel,
    clamp,
    finish,
)
from tinyvllm.ops.kernel.hopper import (
    CLUSTER,
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
    meet,
    multiply_wgmma,
    read_sums,
    uniform,
    wait,
)
from tinyvllm.ops.kernel.lanes import LANES, Mma, axes_of, load_cuda_floats
from tinyvllm.ops.kernel.tiles import PTX_NAMES, TileMma, store_values, together

TOKEN_TILE = 128
NUM_GROUPS = TOKEN_TILE // WGMMA_TOKENS
FETCHER = NUM_GROUPS * GROUP_WARPS  # the warp that fetches
UNPACKERS = 4  # warps that unpack quantized weights
MAX_STAGES = 8
EXTRA_BYTES = 1024  # after the stages: two tensor maps, and the barriers
BARRIERS_AT = 512
ROW_TILES = (64, 96, 128, 160, 192, 224, 256)
MIN_STEPS = 2  # stages of a tile: tinygrad drops a loop that it knows to run once, and with it the order of its stores
RUN_ROWS = 32  # the output's rows must be a multiple
CACHED_TOKENS = 2048  # rows of x that a large GPU's cache holds in addition to the matrix's
# the cost of a product, in cycles of a multiprocessor (measured on an H200, whose peak is 4 for each row)
CYCLES_PER_SECOND = 1.755e9  # an H200's under a load of products
ROW_CYCLES = 4.25  # a stage's, for each of the tile's rows
TILE_CYCLES = 5000  # a tile's in addition to its stages: waiting for the first one, and storing the results
RUN_CYCLES, FILL_CYCLES = 420, 1000  # of a thread that unpacks: a run of 32 columns, and a stage in addition
CACHE_BYTES_PER_CYCLE = 40  # from the L2 cache to each multiprocessor when all of them read
MEMORY_BYTES_PER_CYCLE = 2400

SWISH = (
    '[&]{{ float r; asm("{{ .reg .f32 d;\\nex2.approx.ftz.f32 d, %1;\\nadd.f32 d, d, 0f3F800000;\\n'
    'rcp.approx.ftz.f32 %0, d; }}" : "=f"(r) : "f"({1})); return {0} * r; }}()'
)


# with an error of a few units in the last place of float32
HOPPER_ARITHMETIC = Arithmetic(
    lambda x: x.exp2(), lambda x, slope: UOp(Ops.CUSTOM, F32, src=(x, x * (slope * -LOG2E)), arg=SWISH)
)


@dataclass(frozen=True)
class WgmmaSpec(GatedRows):
    """partials (S, T, N) = x (T, K) @ w.T over S splits of K, or out (T, N / 2) = activation(gate) * up, in float16. K
    is a multiple of 64 * S, and the output's rows are a multiple of 32. Hashable: the key of its kernel."""

    name: str
    mma: Mma
    num_tokens: int  # T
    num_rows: int  # N
    num_cols: int  # K
    row_tile: int  # rows of the matrix in a tile, a multiple of 32; of gate and up, half each
    splits: int  # S
    activation: str | None = None  # the matrix is gate over up: out = activation(gate) * up
    adds_residual: bool = False  # if S is 1
    format: Format | None = None  # of quantized weights, which are unpacked on their way into the stages

    @property
    def experts(self) -> ExpertTiles | None:
        """Set if the matrix has an axis of experts: then N is of one, and each tile of tokens has its own."""
        return None

    @property
    def out_tile(self) -> int:
        return self.row_tile // 2 if self.is_gated else self.row_tile

    @property
    def cluster(self) -> int:
        return CLUSTER if self.num_tokens > TOKEN_TILE else 1

    @property
    def boxes(self) -> int:
        """Copies that fetch a tile's matrix rows: one each for gate and up, or one for each threadgroup."""
        return 2 if self.is_gated else self.cluster

    @property
    def token_box(self) -> Box:
        """The part of x that a copy fetches."""
        return Box((self.num_cols, self.num_tokens), (self.num_cols * 2,), (WGMMA_COLS, TOKEN_TILE))

    @property
    def run(self) -> int:
        """Consecutive rows among a lane's results: 16 bytes, if each copy's rows are whole runs of four lanes."""
        is_half = self.is_gated or self.adds_residual
        return 8 if is_half and self.row_tile // self.boxes % 32 == 0 else 4

    @property
    def row_box(self) -> Box:
        """The part of the matrix (of all experts') that a copy fetches, with its rows permuted. wgmma gives each of
        four lanes two consecutive rows of every eight. So row (b, l, e) of a tile, of (run / 2, 4, 2), is row (l, b, e)
        of the matrix: a lane's results of run / 2 blocks are consecutive."""
        row, group = self.num_cols * 2, 4 * self.run
        num_rows = self.num_rows * (1 if self.experts is None else self.experts.num_experts)
        sizes = (self.num_cols, 2, 4, self.run // 2, num_rows // group)
        box = (WGMMA_COLS, 2, 4, self.run // 2, self.row_tile // self.boxes // group)
        return Box(sizes, (row, self.run * row, 2 * row, group * row), box)

    @property
    def token_groups(self) -> int:
        """Tiles of tokens, counting a cluster's as one."""
        return -(-self.num_tokens // (TOKEN_TILE * self.cluster))

    @property
    def together(self) -> int:
        """How many of those run next to each other: as many as have their rows of x in the cache."""
        count = min(self.token_groups, CACHED_TOKENS // (TOKEN_TILE * self.cluster))
        return count if self.token_groups % count == 0 else self.token_groups

    @property
    def row_groups(self) -> int:
        return -(-self.out_rows // self.out_tile)

    @property
    def num_tiles(self) -> int:
        """Tiles, counting a cluster's as one."""
        return self.splits * self.token_groups * self.row_groups

    @property
    def num_clusters(self) -> int:
        return min(self.num_tiles, MULTIPROCESSORS // self.cluster)

    @property
    def steps(self) -> int:
        """Stages of a tile."""
        return self.num_cols // WGMMA_COLS // self.splits

    @property
    def unpacked_rows(self) -> int:
        """Rows of a stage that a threadgroup unpacks itself."""
        return self.row_tile // self.cluster

    @property
    def runs(self) -> int:
        """Runs of 32 columns that a thread unpacks for each stage."""
        return self.unpacked_rows * WGMMA_COLS // PANEL // (UNPACKERS * LANES)

    @property
    def fits_unpacking(self) -> bool:
        """Whether the threads that unpack have whole runs, which the other threadgroup's complete to the tile."""
        return self.unpacked_rows * WGMMA_COLS % (UNPACKERS * LANES * PANEL) == 0

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
        """Words of the tensor maps by which the threadgroups describe x and the matrix."""
        return self.num_clusters * self.cluster * 2 * MAP_WORDS

    @property
    def cycles(self) -> float:
        """A rough cost of the product, to choose between tiles."""
        fetched = (TOKEN_TILE + self.row_tile / self.cluster) * WGMMA_COLS * 2 / CACHE_BYTES_PER_CYCLE
        tiles = -(-self.num_tiles // self.num_clusters)
        added = (self.splits - 1) * self.num_tokens * self.num_rows * 8 / MEMORY_BYTES_PER_CYCLE
        stage = max(self.row_tile * ROW_CYCLES, fetched, 0.0 if self.format is None else self.unpacking_cycles)
        return tiles * (self.steps * stage + TILE_CYCLES) + added

    @property
    def unpacking_cycles(self) -> float:
        """The cost of unpacking a stage: one warp cannot hide the latency of its instructions and of its barrier."""
        return FILL_CYCLES + self.runs * RUN_CYCLES


@dataclass(frozen=True)
class ExpertWgmmaSpec(WgmmaSpec):
    """The same with experts: T are the pairs of a token and an expert, and x has a row for each, sorted by expert. S is
    1."""

    expert_tiles: ExpertTiles = field(kw_only=True)
    has_bfloat_results: bool = field(default=False, kw_only=True)  # as bits, in a float16 buffer

    @property
    def experts(self) -> ExpertTiles:
        return self.expert_tiles

    @property
    def cluster(self) -> int:
        return 1

    @property
    def token_groups(self) -> int:
        return self.expert_tiles.num_tiles


@cache
def best_cut(
    num_tokens: int, num_rows: int, num_cols: int, is_gated: bool, fmt: Format | None = None
) -> tuple[int, int]:
    """The fastest (rows of the matrix in a tile, splits of K) for a product, by `WgmmaSpec.cycles`."""
    splits = [s for s in ((1,) if is_gated else (1, 2, 4, 8)) if num_cols % (s * MIN_STEPS * WGMMA_COLS) == 0 or s == 1]
    mma = Mma("CUDA", F16)
    specs = [
        WgmmaSpec("", mma, num_tokens, num_rows, num_cols, row_tile, s, "silu" if is_gated else None, format=fmt)
        for row_tile in ROW_TILES
        for s in splits
    ]
    best = min((spec for spec in specs if fmt is None or spec.fits_unpacking), key=lambda spec: spec.cycles)
    return best.row_tile, best.splits


def expert_row_tile(num_rows: int, num_cols: int, num_tiles: int, is_gated: bool) -> int:
    """The fastest number of an expert's matrix rows in a tile, for so many tiles of tokens."""
    activation = "silu" if is_gated else None
    shape = (num_tiles * TOKEN_TILE, num_rows, num_cols)
    specs = [WgmmaSpec("", Mma("CUDA", F16), *shape, rows, 1, activation) for rows in ROW_TILES]
    return min(specs, key=lambda spec: spec.cycles).row_tile


@cached_kernel
def wgmma_kernel(spec: WgmmaSpec) -> KernelFn:
    """fn(out, maps (map_size,) uint32, w, x[, residual][, tile map, sorted pairs[, bias]]): see WgmmaSpec."""

    def kernel(out: UOp, maps: UOp, w: UOp, x: UOp, *rest: UOp) -> UOp:
        assert spec.steps >= MIN_STEPS, f"{spec} has {spec.steps} stages in a tile"
        return finish_wgmma_kernel(spec, WgmmaWork(spec, out, maps, w, x, rest))

    return kernel


def finish_wgmma_kernel(spec: WgmmaSpec, work: WgmmaWork) -> UOp:
    """The kernel that does a threadgroup's work."""
    ready = work.prepare()
    done = UOp(Ops.BARRIER, src=(work.fetch_tiles(ready), work.multiply_tiles(ready)))
    if spec.cluster > 1:  # neither may end while the other still writes to its memory
        done = meet(done)
    kind = "float16" if spec.mma.dtype == F16 else "bfloat16"
    bits = 16.0
    if spec.format is not None:
        kind, bits = spec.format.name, spec.format.code_bits
    name = f"{spec.name}_{kind}_{spec.num_tokens}x{spec.num_rows}x{spec.num_cols}"
    size = spec.num_rows * spec.num_cols
    nbytes = int(size * bits / 8) * (1 if spec.experts is None else spec.experts.work[1])
    return finish(done.end(*reversed(work.axes)), name, ops=2 * spec.num_tokens * size, nbytes=nbytes)


Number = TypeVar("Number", int, UOp)


def tile_of(spec: WgmmaSpec, number: Number, rank: Number) -> tuple[Number, Number, Number]:
    """(split of K, first row of the output, first token) of a tile of the list, for a threadgroup of the cluster."""
    inner, rest = number % spec.together, number // spec.together
    row_group, rest = rest % spec.row_groups, rest // spec.row_groups
    outer, split = rest % (spec.token_groups // spec.together), rest // (spec.token_groups // spec.together)
    token_group = (outer * spec.together + inner) * spec.cluster + rank
    return split, row_group * spec.out_tile, token_group * TOKEN_TILE


def row_of(spec: WgmmaSpec, block: int, element: int, lane: Number) -> Number:
    """The row, counted from the tile's first, of a lane's result in a block of eight of the tile's rows."""
    blocks = spec.run // 2
    return lane % 4 * spec.run + (block // blocks * 4 * spec.run + block % blocks * 2 + element % 2)


def result_runs(spec: WgmmaSpec) -> list[list[int]]:
    """A lane's results of a tile, by number: in runs of consecutive rows (`WgmmaSpec.row_box`)."""
    blocks = spec.run // 2
    groups = range(0, spec.out_tile // 8, blocks)
    return [
        [(first + block) * 4 + half + i for block in range(blocks) for i in range(2)]
        for first in groups
        for half in (0, 2)
    ]


def load_runs(spec: WgmmaSpec, buffer: UOp, places: Sequence[tuple[UOp, UOp | None]]) -> list[UOp]:
    """What a buffer of the output's shape has where a lane's results go, anything where there are none."""
    values: dict[int, UOp] = {}
    for run, (at, exists) in zip(result_runs(spec), places, strict=True):
        found = load_cuda_floats(buffer, at if exists is None else exists.where(at, 0), spec.run)
        values |= dict(zip(run, found, strict=True))
    return [values[i] for i in range(len(values))]


def store_runs(spec: WgmmaSpec, out: UOp, places: Sequence[tuple[UOp, UOp | None]], values: Sequence[UOp]) -> UOp:
    """Store a lane's results."""
    stores = []
    for run, (at, exists) in zip(result_runs(spec), places, strict=True):
        stores += store_values(out, at, [values[i] for i in run], exists)
    return together(*stores)


class WgmmaWork:
    """One threadgroup's work: its cluster's tiles of the list, one after another."""

    fetchers = 1  # warps that fetch

    def __init__(self, spec: WgmmaSpec, out: UOp, maps: UOp, w: UOp, x: UOp, rest: Sequence[UOp]) -> None:
        self.spec, self.out, self.maps, self.w, self.x = spec, out, maps, w, x
        self.residual = rest[0] if spec.adds_residual else None
        self.sorting = rest[spec.adds_residual :]  # of rows by expert
        body = self.body = Body()
        count = spec.num_clusters * spec.cluster
        self.number: UOp | int = body.grid(count) if count > 1 else 0
        self.lane, self.warp = body.threads(LANES), body.threads(FETCHER + self.fetchers)
        self.role = uniform(self.warp)  # the warp's number, without limits that tinygrad knows
        self.axes = axes_of(self.number, self.lane, self.warp)
        self.rank = self.number % spec.cluster  # in the cluster
        self.unit = self.number // spec.cluster

    @property
    def arrivals(self) -> int:
        """How many make a stage full."""
        return 1

    def prepare(self) -> UOp:
        """The UOp after which tensor maps, barriers and memory are ready."""
        spec, memory = self.spec, declare(self.spec.shared_bytes)
        end = spec.stages * spec.stage_bytes
        word = self.number * (2 * MAP_WORDS)
        # cleared, so that tinygrad sees a write: it does not see those of our own statements
        own = (word + self.warp * MAP_WORDS + self.lane).valid(self.warp < 2)
        maps = self.maps.after(self.maps[own].store(UOp.const(0, U32)))
        described = [describe(0, end, maps[word], self.x[0], spec.token_box, memory)]
        if spec.format is None:
            place = end + MAP_WORDS * 4
            described.append(describe(1, place, maps[word + MAP_WORDS], self.w[0], spec.row_box, memory))
        barriers = make_barriers(end + BARRIERS_AT, spec.stages, self.arrivals, NUM_GROUPS * spec.cluster, memory)
        met = [meet(*described, barriers)] if spec.cluster > 1 else [*described, barriers]
        return UOp(Ops.BARRIER, src=tuple(met))

    # -- places --------------------------------------------------------------------------------------------------------

    def stage(self, count: UOp) -> tuple[UOp, UOp, UOp, UOp]:
        """(tile, full barrier, empty barrier, parity of the phase) of the count-th stage since the beginning; the first
        three as bytes of threadgroup memory."""
        spec = self.spec
        slot, turn = count % spec.stages, count // spec.stages
        full = slot * 8 + (spec.stages * spec.stage_bytes + BARRIERS_AT)
        return slot * spec.stage_bytes, full, full + spec.stages * 8, turn % 2

    def loop_tiles(self, has_role: UOp, *, one_lane: bool) -> tuple[UOp, UOp, UOp]:
        """(a loop over the threadgroup's tiles, the tile's number in the loop, its number in the list). The loop has no
        iterations for warps without the role: tinygrad has no branches.

        `has_role` must depend on `role`, not on `warp`. Inside stores with a condition on the warp, as those of the
        first rows, tinygrad would simplify a condition on the warp, and so make a second loop in which every warp has
        the role."""
        spec = self.spec
        # never a single turn: with a constant turn, the compiler keeps everything that follows from it in registers
        most = max(2, -(-spec.num_tiles // spec.num_clusters))
        if spec.experts is None:
            count = (spec.num_tiles - 1 - self.unit) // spec.num_clusters + 1
        else:
            used = clamp(self.sorting[0][spec.experts.num_tiles * TILE_WORDS].load(), 0, spec.experts.num_tiles)
            count = (used * spec.row_groups + (spec.num_clusters - 1) - self.unit) // spec.num_clusters
        count = uniform(has_role.where(count, 0))
        loop = self.body.fold_while(self.lane.eq(0).where(count, 0) if one_lane else count)
        turn = clamp(loop, 0, most - 1)
        return loop, turn, (turn * spec.num_clusters + self.unit).minimum(spec.num_tiles - 1)

    def tile(self, number: UOp) -> tuple[UOp | int, UOp, TokenTile]:
        """(split of K, first row of the output, token rows) of a tile of the list."""
        spec = self.spec
        if spec.experts is None:
            split, first_row, first_token = tile_of(spec, number, self.rank)
            return split, first_row, TokenTile(first_token, TOKEN_TILE * spec.cluster, spec.num_tokens)
        tile = ExpertTile(spec.experts, number // spec.row_groups, spec.num_rows, self.sorting)
        return 0, number % spec.row_groups * spec.out_tile, tile

    # -- the warp that fetches -----------------------------------------------------------------------------------------

    def fetch_tiles(self, ready: UOp) -> UOp:
        """Fetch all stages of all tiles in order, each as soon as it is empty."""
        spec = self.spec
        loop, turn, number = self.loop_tiles(self.role.eq(FETCHER), one_lane=True)
        split, first_row, tile = self.tile(number)
        maps = [self.maps[self.number * (2 * MAP_WORDS) + i * MAP_WORDS] for i in range(2)]
        acquired = [acquire_map(each, loop, ready) for each in maps]
        step = self.body.fold(spec.steps)
        place, full, empty, parity = self.stage(turn * spec.steps + step)
        col = (split * spec.steps + step) * WGMMA_COLS
        waited = wait(empty, 1 - parity, step, *acquired)
        last = expect(full, spec.stage_bytes, waited)
        last = fetch(place, maps[0], full, [col, UOp.const(0, I32) + tile.first], last)
        rows, box, nil = place + TOKEN_TILE * WGMMA_COLS * 2, spec.row_tile // spec.boxes, UOp.const(0, I32)
        for i in range(1 if spec.cluster > 1 else spec.boxes):
            share = (
                self.rank if spec.cluster > 1 else i
            )  # each threadgroup of a cluster fetches half of the rows for both
            row = tile.matrix_row(first_row + share * (spec.out_rows if spec.is_gated else box))
            at = [col, nil, nil, nil, row // (4 * spec.run)]
            place = rows + share * (box * WGMMA_COLS * 2)
            last = fetch(place, maps[1], full, at, last, is_shared=spec.cluster > 1)
        return last.end(step).end(loop)

    # -- the warps that multiply ---------------------------------------------------------------------------------------

    def multiply_tiles(self, ready: UOp) -> UOp:
        """Multiply all stages in order, each as soon as it is full, and store the results of each tile."""
        spec = self.spec
        count = spec.row_tile // 8 * 4
        loop, turn, number = self.loop_tiles(self.role < FETCHER, one_lane=False)
        tile = self.tile(number)
        places = self._places(*tile)
        registers = self.body.registers(count)
        begun = self._begun(places, *tile[1:])
        empty = registers.after(loop, ready)
        registers = registers.after(UOp.group(*[empty[i].store(value) for i, value in enumerate(begun)]))
        step = self.body.fold(spec.steps)
        place, full, _, parity = self.stage(turn * spec.steps + step)
        group = self.warp // GROUP_WARPS
        left, right = place + group * (WGMMA_TOKENS * WGMMA_COLS * 2), place + TOKEN_TILE * WGMMA_COLS * 2
        waited = wait(full, parity, step, ready)
        added = multiply_wgmma(PTX_NAMES[spec.mma.dtype], left, right, registers.after(step), 1, waited)
        before = (turn * spec.steps + step - 1).maximum(0)
        released = self._release(self.stage(before)[2], step > 0, added)
        registers = registers.after(together(added, released).end(step))
        finished = finish_wgmma(registers)
        released = self._release(self.stage(turn * spec.steps + (spec.steps - 1))[2], None, finished)
        values = read_sums(registers, released)
        if spec.activation is not None:
            half = count // 2
            values = gated(spec.activation, values[:half], values[half:], HOPPER_ARITHMETIC)
        if spec.experts is not None and spec.experts.factor != 1.0:
            factor = spec.experts.factor if spec.is_gated else 1.0 / spec.experts.factor
            values = [value * factor for value in values]
        return store_runs(spec, self.out, places, [self._result(value) for value in values]).end(loop)

    def _begun(self, places: list[tuple[UOp, UOp | None]], first_row: UOp, tile: TokenTile) -> list[UOp]:
        """What the sums start from, loaded while the first stages arrive: the residual, or the rows' biases."""
        spec = self.spec
        if self.residual is not None:
            return load_runs(spec, self.residual, places)
        elements, out_blocks = TileMma(spec.mma).elements, spec.out_tile // 8
        begun, begins_by = [], 1.0 if spec.experts is None or spec.is_gated else spec.experts.factor
        for i in range(spec.row_tile // 8 * elements):
            block, element = i // elements, i % elements
            row = first_row + row_of(spec, block % out_blocks, element, self.lane)
            bias = tile.bias(row.minimum(spec.out_rows - 1) + block // out_blocks * spec.out_rows)
            begun.append(UOp.const(0.0, F32) if bias is None else bias * begins_by)
        return begun

    def _result(self, value: UOp) -> UOp:
        """A result, or its bits as they are stored."""
        if isinstance(self.spec, ExpertWgmmaSpec) and self.spec.has_bfloat_results:
            return bits_of_bfloat(value)
        return value

    def _release(self, empty: UOp, condition: UOp | None, *after: UOp) -> UOp:
        """Tell the cluster's threadgroups that this group of warps has read a stage: one thread tells each of them."""
        spec = self.spec
        is_one = (self.warp % GROUP_WARPS).eq(0) & (self.lane < spec.cluster)
        if condition is not None:
            is_one = is_one & condition
        return arrive(empty, is_one, *after, threadgroup=None if spec.cluster == 1 else self.lane % spec.cluster)

    def _places(self, split: UOp | int, first_row: UOp, tile: TokenTile) -> list[tuple[UOp, UOp | None]]:
        """Where each of the thread's runs of results goes, and whether it exists (None: always)."""
        spec, mma, places = self.spec, TileMma(self.spec.mma), []
        for first, *_ in result_runs(spec):
            block, element = first // mma.elements, first % mma.elements
            token = self.warp * mma.left_rows + mma.place(self.lane, element)[0]
            row, exists = first_row + row_of(spec, block, element, self.lane), tile.exists(token)
            if spec.out_rows % spec.out_tile:  # a whole run or nothing
                is_inside = row < spec.out_rows
                exists = is_inside if exists is None else exists & is_inside
            places.append(((split * spec.num_tokens + tile.target(token)) * spec.out_rows + row, exists))
        return places
