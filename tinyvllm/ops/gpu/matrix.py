"""A few token rows (2 to 64) times a matrix, on the matrix unit, on devices whose lanes exchange values.

The weights stream from memory straight into registers. K is split between the lanes and warps of a threadgroup, and
between threadgroups where the rows alone would not fill the device (split-K).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from tinygrad import UOp
from tinygrad.uop.ops import Ops

from tinyvllm.arrays import Format
from tinyvllm.ops.activation import gated
from tinyvllm.ops.formats.matrix import Planes
from tinyvllm.ops.formats.pairs import read_halves
from tinyvllm.ops.formats.runs import read_run, run_cols
from tinyvllm.ops.gpu.product import GatedRows
from tinyvllm.ops.gpu.token_tiles import ExpertTile, ExpertTiles, TokenTile
from tinyvllm.ops.kernel.body import F16, Body, KernelFn, balanced, cached_kernel, finish
from tinyvllm.ops.kernel.lanes import (
    LANES,
    SHARED_BYTES,
    Lanes,
    Mma,
    await_previous,
    axes_of,
    carry,
    grid,
    warps,
    zeros,
)
from tinyvllm.ops.kernel.tuning import Tunable

FEW_GROUPS = 96
MANY_GROUPS = 8192  # threadgroups that may as well be half as many
GROUPS_WANTED = 256  # threadgroups that keep every core of a large GPU busy: two each on 132

TOKENS = 8  # token rows of a tile
DENSE_COLS = 16  # dense columns of a lane's run
MAX_WARPS = 16
EARLY_BYTES = 256  # that a lane may load before the previous kernel has ended
MAX_PAIR_TILES = 4  # tiles of tokens that leave registers for weights in pairs
MAX_SUMS = 128  # a lane's registers for sums
MAX_TOKEN_TILES = 8  # tiles whose sums fit into a warp's registers; more tokens take more threadgroups


@dataclass(frozen=True)
class MatrixSpec(GatedRows, Tunable):
    """partials (S, T, N) = x (T, K) @ w.T over S splits of K, or out (T, N / 2) = activation(gate) * up."""

    name: str
    lanes: Lanes
    mma: Mma
    format: Format
    num_tokens: int  # T
    num_rows: int  # N
    num_cols: int  # K
    activation: str | None = None  # the matrix is gate over up: out = activation(gate) * up
    # Of a block-diagonal matrix: the rows of a block, which multiply columns of their own of x, and the columns of x
    # from one block's first to the next one's; num_cols is a block's K. 0: it is not one
    block_rows: int = 0
    block_stride: int = 0
    # x is bfloat16, in a float16 buffer, and so is the matrix: words of both go into the matrix unit as they are (CUDA)
    has_words: bool = field(default=False, repr=False)

    @property
    def x_cols(self) -> int:
        """Columns of x."""
        return self.num_rows // self.block_rows * self.block_stride if self.block_rows else self.num_cols

    @property
    def experts(self) -> ExpertTiles | None:
        """Set if the matrix has an axis of experts: then N is of one, and each tile of tokens has its own."""
        return None

    @property
    def cols(self) -> int:
        return run_cols(self.format, DENSE_COLS)

    @property
    def has_pairs(self) -> bool:
        """Whether weights are unpacked two at a time, in float16."""
        few = self.token_tiles <= MAX_PAIR_TILES and not self.block_rows  # whose x may be in float32
        return self.format.is_quantized and self.mma.dtype == F16 and few

    @property
    def token_tiles(self) -> int:
        """Tiles of tokens in a threadgroup."""
        # of a block's few columns, a warp multiplies more tokens only if there are enough for all cores
        most = 2 if self.block_rows and self.num_tokens <= 64 else MAX_TOKEN_TILES
        return min(most, -(-self.num_tokens // TOKENS))

    @property
    def token_groups(self) -> int:
        """Threadgroups that share a tile of rows."""
        return -(-self.num_tokens // (TOKENS * self.token_tiles))

    @property
    def row_tiles(self) -> int:
        """Tiles of rows of a warp; gate and up count as two."""
        scale = 16 // self.mma.rows  # METAL's tiles have half the rows
        wanted = 1 if self.token_tiles == 1 and self.num_rows < 8192 else 2
        if self.token_tiles > 4 and (self.num_rows >= 8192 or self.num_cols >= 8192):
            wanted = 4
        if self.is_gated:
            wanted = 4 if self._is_broad else max(2, wanted)
        wanted *= scale
        while wanted > 1 + self.is_gated and (self.block_rows or self.num_rows) % (wanted * self.mma.rows):
            wanted //= 2
        return self.knob("row_tiles", wanted)

    def knobs(self) -> Mapping[str, tuple[int, ...]]:
        splits = () if self.is_gated or self.block_rows else (1, 2, 4, 8, 16)
        return {
            "row_tiles": (1, 2, 4, 8),
            "splits": splits,
            "warps": (1, 2, 4, 8, 16),
            "down": (1, 2, 4),
            "ahead": (1, 2, 4),
        }

    def is_possible(self) -> bool:
        least = 2 if self.is_gated else 1
        return (
            self.row_tiles >= least
            and self.block_rows % (self.row_tiles * self.mma.rows) == 0
            and self.num_rows % (self.row_tiles * self.mma.rows * self.down) == 0
            and self.warps * self.down <= MAX_WARPS
            and (self._sums % self.warps == 0 or self.warps > self._sums)
            and self.row_tiles * self._sums <= MAX_SUMS
            and self.chunks >= self.splits * self.warps * self.ahead
            and self.shared_bytes <= SHARED_BYTES
        )

    @property
    def warps(self) -> int:
        """Warps that split the columns between them, and at the end the sums."""
        if self.chunks < 8:
            return 1
        if self._is_broad:
            return self.knob("warps", 2)
        share = self.token_tiles * self.mma.elements
        if 2 < self.token_tiles <= 4 and share % 8 == 0 and self._num_groups < FEW_GROUPS and not self.is_gated:
            return 8
        return self.knob("warps", 4 if share % 4 == 0 else 2)

    @property
    def down(self) -> int:
        """Warps with different rows that read the same columns of x: all but one read them from the nearest cache."""
        is_wanted = self._is_broad or (self._is_chained_gate and self.token_tiles == 1 and not self.has_pairs)
        fits = self.num_rows % (self.row_tiles * self.mma.rows * 2) == 0
        return self.knob("down", 2 if is_wanted and fits and self.chunks >= 8 else 1)

    @property
    def _is_chained_gate(self) -> bool:
        return self.is_gated and self.lanes.is_chained and self.num_rows >= 8192

    @property
    def _is_broad(self) -> bool:
        """Whether loading x costs so much, compared with the codes, that more rows should share it."""
        return self._is_chained_gate and self.has_pairs and self.token_tiles > 2

    @property
    def _sums(self) -> int:
        """A lane's sums of one tile of rows. Each of the warps that share the columns keeps some of them in the end."""
        return self.token_tiles * self.mma.elements

    @property
    def shared_bytes(self) -> int:
        return self.down * self.warps * self._sums * LANES * 4 if self.warps > 1 else 0

    @property
    def chunks(self) -> int:
        return -(-self.num_cols // (self.cols * self.mma.slots))

    @property
    def splits(self) -> int:
        """S: splits of K, each with its own threadgroups, if there are too few rows to fill the device."""
        splits, groups = 1, self._num_groups
        wanted = GROUPS_WANTED * 3 // 2 if self.token_tiles == 1 else GROUPS_WANTED
        while (
            not (self.is_gated or self.block_rows)
            and groups * splits < wanted
            and self.chunks >= 4 * splits * min(4, self.warps)
        ):
            splits *= 2
        return self.knob("splits", splits)

    @property
    def _num_groups(self) -> int:
        """Threadgroups without split-K."""
        return self.num_rows // (self.row_tiles * self.mma.rows * self.down) * self.token_groups

    @property
    def steps(self) -> int:
        """Iterations of a warp."""
        return -(-self.chunks // (self.splits * self.warps * self.ahead))

    @property
    def begins_early(self) -> bool:
        """Whether a warp loads its first chunks while the previous kernel still runs: if it has registers for all of
        them at once."""
        run_bytes = self.cols * int(min(self.format.code_bits, 16)) // 8
        return self.lanes.is_chained and self.ahead * self.row_tiles * 2 * run_bytes <= EARLY_BYTES

    @property
    def ahead(self) -> int:
        """Chunks whose loads a warp has in flight: as many as fit into its registers in addition to the sums."""
        most = 2 if self.format.is_quantized or self.down > 1 else 4
        ahead = max(1, most // self.token_tiles)
        while ahead > 1 and self.chunks < self.splits * self.warps * ahead:
            ahead //= 2
        return self.knob("ahead", ahead)


@dataclass(frozen=True)
class ExpertMatrixSpec(MatrixSpec):
    """The same with experts: T are the rows of a tile, and out has a row for each pair of a token and an expert."""

    tiles: ExpertTiles = field(kw_only=True)

    @property
    def experts(self) -> ExpertTiles:
        return self.tiles

    @property
    def token_groups(self) -> int:
        return self.tiles.num_tiles

    @property
    def splits(self) -> int:
        return 1

    @property
    def row_tiles(self) -> int:
        """Two also without gate and up, where there are enough threadgroups anyway (6 % less on an NVIDIA H200)."""
        rule = super().row_tiles
        wanted = max(rule, 2)
        is_enough = self.token_groups * self.num_rows // (wanted * self.mma.rows) >= MANY_GROUPS
        fits = self.num_rows % (wanted * self.mma.rows) == 0
        return self.knob("row_tiles", wanted if is_enough and fits else rule)

    @property
    def begins_early(self) -> bool:
        return False  # the previous kernel chooses the experts

    def knobs(self) -> Mapping[str, tuple[int, ...]]:
        return {name: values for name, values in super().knobs().items() if name != "splits"}


def fits_matrix_unit(mma: Mma, matrix_rows: int, *, is_gated: bool) -> bool:
    """Whether a matrix's rows (of gate and up, each half) fill whole tiles."""
    return (matrix_rows // 2 if is_gated else matrix_rows) % mma.rows == 0


@cached_kernel
def matrix_kernel(spec: MatrixSpec) -> KernelFn:
    """fn(out, *planes, x[, tile map, sorted pairs[, bias]]): see MatrixSpec. Token rows after the last repeat it, and
    are not stored."""

    def kernel(out: UOp, *operands: UOp) -> UOp:
        count = Planes.count(spec.format)
        planes, (x, *sorting) = operands[:count], operands[count:]
        place = _make_place(spec)
        # not aligned_planes: words in vectors make a step of 8 rows of Llama-3.2-1B 7 % longer in Q4_0 on an H200, and
        # 11 % in MLX's 4 bits
        loads = _Loads(spec, place, Planes(spec.format, planes))
        early = loads.weights(0) if spec.begins_early else []
        x, *sorting = await_previous(spec.lanes, x, *sorting, ahead=[v for chunk in early for v in chunk.values])
        if spec.experts is not None:
            place = replace(place, tile=ExpertTile(spec.experts, place.token_group, spec.num_rows, sorting))
            loads = replace(loads, place=place)
        totals = _multiply(loads, x, early)
        kept, first = _add_warps(spec, place, totals)
        stores = _store(spec, place, out, kept, first)
        rows, matrices = (spec.num_tokens, 1) if spec.experts is None else spec.experts.work
        size = spec.num_rows * spec.num_cols
        return finish(
            UOp.group(*stores).end(*reversed(place.axes)),
            f"{spec.name}_{spec.format.name}_{rows}x{spec.num_rows}x{spec.num_cols}",
            ops=2 * rows * size,
            nbytes=int(matrices * size * spec.format.code_bits / 8),
        )

    return kernel


@dataclass(frozen=True)
class _Place:
    """A thread's place. `bases`: the first row of each of the warp's tiles, which alternate between gate and up if the
    matrix has both; `warp`: among those that share the columns; `row_warp`: among those with other rows. An axis of
    length 1 is the constant 0."""

    body: Body
    axes: tuple[UOp, ...]
    bases: list[UOp]
    token_group: UOp | int
    tile: TokenTile
    split: UOp | int  # of the columns
    warp: UOp | int
    row_warp: UOp | int
    lane: UOp


def _make_place(spec: MatrixSpec) -> _Place:
    body, row_tiles = Body(), spec.row_tiles
    per_group = row_tiles // 2 if spec.is_gated else row_tiles
    token_group = grid(body, spec.token_groups)
    group = body.grid(spec.out_rows // (per_group * spec.mma.rows * spec.down))
    split, lane, warp = grid(body, spec.splits), body.threads(LANES), warps(body, spec.warps)
    row_warp = warps(body, spec.down)
    bases = [
        ((group * spec.down + row_warp) * per_group + (i // 2 if spec.is_gated else i)) * spec.mma.rows
        + (spec.out_rows * (i % 2) if spec.is_gated else 0)
        for i in range(row_tiles)
    ]
    rows = spec.token_tiles * TOKENS
    tile = TokenTile(token_group * rows, rows, spec.num_tokens)
    axes = axes_of(token_group, group, split, lane, warp, row_warp)
    return _Place(body, axes, bases, token_group, tile, split, warp, row_warp, lane)


# -- loading -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Chunk:
    """The lane's weights of a chunk of columns: its runs, for each tile of rows."""

    number: UOp
    runs: list[list[list[UOp]]]

    @property
    def values(self) -> list[UOp]:
        return [value for tile in self.runs for run in tile for value in run]


@dataclass(frozen=True)
class _Loads:
    """A lane's loads of weights and of x."""

    spec: MatrixSpec
    place: _Place
    planes: Planes

    def weights(self, iteration: UOp | int) -> list[_Chunk]:
        """The weights of an iteration's chunks, all loaded before any is used."""
        spec, worker = self.spec, self.place.split * self.spec.warps + self.place.warp
        first = (worker * spec.steps + iteration) * spec.ahead
        return [self._chunk(first + i) for i in range(spec.ahead)]

    def _chunk(self, number: UOp) -> _Chunk:
        places = [(row, self._run(number, slot)[0]) for row, slot in self.spec.mma.row_runs(self.place.lane)]
        bases = [self.place.tile.matrix_row(base) for base in self.place.bases]
        return _Chunk(number, [[self._weights(base + row, run) for row, run in places] for base in bases])

    def _weights(self, row: UOp, run: UOp) -> list[UOp]:
        spec = self.spec
        if spec.has_words:
            start = row * (spec.num_cols // 2) + run * (spec.cols // 2)
            return [self.planes.codes[start + i].load() for i in range(spec.cols // 2)]
        if spec.has_pairs:
            return read_halves(self.planes, row, run, spec.num_cols, spec.mma)
        return read_run(self.planes, row, run, spec.num_cols, spec.cols).values(spec.mma.dtype)

    def inputs(self, x: UOp, chunk: UOp, tile: int) -> list[list[UOp]]:
        """The lane's runs of x for one tile of tokens."""
        spec, runs = self.spec, []
        for token, slot in spec.mma.token_runs(self.place.lane):
            run, is_inside = self._run(chunk, slot)
            at = self.place.tile.source(tile * TOKENS + token) * spec.x_cols + run * spec.cols
            if spec.block_rows:  # all rows of a warp are in one block
                at = at + self.place.bases[0] // spec.block_rows * spec.block_stride
            if spec.has_pairs or spec.has_words:
                values = spec.mma.load_pairs(x, at, spec.cols)
            else:
                values = [x[at + i].load().cast(spec.mma.dtype) for i in range(spec.cols)]
            runs.append(values if is_inside is None else [is_inside.where(v, v.const_like(0)) for v in values])
        return runs

    def _run(self, chunk: UOp, slot: UOp) -> tuple[UOp, UOp | None]:
        """(the run of a slot, whether it exists; None: always)."""
        spec, run = self.spec, chunk * self.spec.mma.slots + slot
        num_runs = spec.num_cols // spec.cols
        if num_runs % (spec.mma.slots * spec.splits * spec.warps * spec.ahead) == 0:
            return run, None
        return (run < num_runs).where(run, 0), run < num_runs


# -- computing ---------------------------------------------------------------------------------------------------------


def _multiply(loads: _Loads, x: UOp, early: list[_Chunk]) -> list[UOp]:
    """The lane's sums over its warp's columns, by tile of rows, tile of tokens, and element. `early`: the chunks of the
    first iteration, if they are loaded already."""
    spec, place = loads.spec, loads.place
    totals, past = zeros(spec.row_tiles * spec.token_tiles * spec.mma.elements), 0
    if early:
        totals, past = _add_chunks(loads, x, early, totals), 1
    steps = spec.steps - past
    if steps == 0:
        return totals

    def step(iteration: UOp | int, old: list[UOp]) -> list[UOp]:
        return _add_chunks(loads, x, loads.weights(place.tile.turn(iteration, steps) + past), old)

    return carry(place.body, totals, place.tile.turns(steps), place.axes, step)


def _add_chunks(loads: _Loads, x: UOp, chunks: list[_Chunk], old: list[UOp]) -> list[UOp]:
    """The lane's sums after some chunks."""
    spec, size = loads.spec, loads.spec.mma.elements
    sums = [old[i : i + size] for i in range(0, len(old), size)]
    for chunk in chunks:
        inputs = [loads.inputs(x, chunk.number, tile) for tile in range(spec.token_tiles)]
        for tile in range(len(sums)):
            operands = (chunk.runs[tile // spec.token_tiles], inputs[tile % spec.token_tiles])
            sums[tile] = _multiply_tile(loads.place.body, spec, *operands, sums[tile])
    return [value for tile in sums for value in tile]


def _multiply_tile(body: Body, spec: MatrixSpec, w: list[list[UOp]], x: list[list[UOp]], sums: list[UOp]) -> list[UOp]:
    """`sums` of a tile of rows and one of tokens, after a chunk."""
    if spec.has_pairs or spec.has_words:
        return spec.mma.multiply_pairs(body, w, x, sums)
    total = spec.mma.multiply(w, x, UOp.stack(*sums))
    return [total.index(e) for e in range(spec.mma.elements)]


# -- finishing ---------------------------------------------------------------------------------------------------------


def _add_warps(spec: MatrixSpec, place: _Place, totals: list[UOp]) -> tuple[list[list[UOp]], UOp | int]:
    """Add the warps' sums through threadgroup memory, one tile of rows at a time. Each warp keeps a share of a lane's
    elements. Returns (the warp's elements by tile of rows, the number of the first one)."""
    count = spec.token_tiles * spec.mma.elements
    pieces = [totals[r * count : (r + 1) * count] for r in range(spec.row_tiles)]
    if spec.warps == 1:
        return pieces, 0
    share = max(1, count // spec.warps)
    buffer = place.body.shared(spec.down * spec.warps * count * LANES)
    base, lane = place.row_warp * spec.warps, place.lane
    first = place.warp * share  # not an element's, for warps beyond the number of elements
    kept = []
    for r, piece in enumerate(pieces):
        stores = [
            buffer[((base + place.warp) * count + i) * LANES + lane].store(value) for i, value in enumerate(piece)
        ]
        shared = buffer.after(UOp.group(*stores))
        own = first.minimum(count - share) if isinstance(first, UOp) and share * spec.warps != count else first
        sums = [
            balanced(shared[((base + w) * count + own + i) * LANES + lane].load() for w in range(spec.warps))
            for i in range(share)
        ]
        if r + 1 < len(pieces):  # the next tile's sums overwrite the buffer: hold these, and wait for the other warps
            registers = place.body.registers(share)
            held = UOp.group(*[registers[i].store(value) for i, value in enumerate(sums)])
            buffer = buffer.without_after.after(UOp(Ops.BARRIER, src=(held,)))
            sums = [registers.after(held)[i].load() for i in range(share)]
        kept.append(sums)
    return kept, first


def _store(spec: MatrixSpec, place: _Place, out: UOp, kept: list[list[UOp]], first: UOp | int) -> list[UOp]:
    """Stores of a lane's elements, from number `first` on, of each tile of rows; of gate and up, their product."""
    stores = []
    for r in range(0, spec.row_tiles, 2 if spec.is_gated else 1):
        values = _biased(spec, place, kept[r], place.bases[r], first)
        if spec.activation is not None:
            values = gated(spec.activation, values, _biased(spec, place, kept[r + 1], place.bases[r + 1], first))
        for i, value in enumerate(values):
            at = _output(spec, place, place.bases[r], first + i)
            value = place.tile.passed_on(value)
            stores.append(out[at].store(value.cast(out.dtype)))
    return stores


def _biased(spec: MatrixSpec, place: _Place, values: list[UOp], base: UOp, first: UOp | int) -> list[UOp]:
    """A lane's elements of the tile that begins at row `base`, plus the bias of their rows."""
    rows = [base + spec.mma.place(place.lane, (first + i) % spec.mma.elements)[1] for i in range(len(values))]
    return [place.tile.finished(value, row) for value, row in zip(values, rows, strict=True)]


def _output(spec: MatrixSpec, place: _Place, base: UOp, element: UOp | int) -> UOp:
    """Where a lane's element of the tile that begins at row `base` goes: valid only if the element and its token
    exist."""
    token, row = spec.mma.place(place.lane, element % spec.mma.elements)
    at = element // spec.mma.elements * TOKENS + token
    index = (place.split * spec.num_tokens + place.tile.target(at)) * spec.out_rows + base + row
    exists = place.tile.exists(at)
    if exists is not None:
        index = index.valid(exists)
    if spec.warps > spec.token_tiles * spec.mma.elements:
        index = index.valid(element < spec.token_tiles * spec.mma.elements)
    return index
