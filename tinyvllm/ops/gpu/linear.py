"""Matrix products on devices whose lanes exchange values: one token row by dot products, more on the matrix unit.

Both stream the weights from memory straight into registers; K is split over the lanes and warps of a threadgroup.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tinygrad import UOp, dtypes
from tinygrad.uop.ops import Ops

from tinyvllm.arrays import Format
from tinyvllm.ops.activation import gated, tanh
from tinyvllm.ops.formats.matrix import PANEL, Planes
from tinyvllm.ops.formats.runs import Run, group_sums, read_halves, read_run, run_cols
from tinyvllm.ops.gpu.attention_split import SplitHeads, read_split
from tinyvllm.ops.kernel.body import F16, F32, Body, KernelFn, balanced, cached_kernel, finish
from tinyvllm.ops.kernel.lanes import (
    LANES,
    SHARED_BYTES,
    Lanes,
    Mma,
    await_previous,
    axes_of,
    carry,
    dot,
    grid,
    load_floats,
    warps,
    zeros,
)
from tinyvllm.ops.kernel.tuning import Tunable
from tinyvllm.ops.sampling.token_ids import token_id

FEW_GROUPS = 96
GROUPS_WANTED = 256  # threadgroups that keep every core of a large GPU busy: two each on 132


# -- one token row -----------------------------------------------------------------------------------------------------

VECTOR_COLS = 8  # dense columns of a lane's run: 16 bytes of float16
STAGED_RUN = PANEL + 4  # floats from one run to the next in threadgroup memory: eight lanes' vectors in eight banks


@dataclass(frozen=True)
class VectorSpec:
    """out (N,) = epilogue(norm(x) (K,) @ w.T). Hashable: the key of its kernel."""

    name: str
    lanes: Lanes
    format: Format
    num_rows: int  # N of the matrix
    num_cols: int  # K
    norm_eps: float | None = None  # RMS-norm x on the way
    activation: str | None = None  # rows n and n + N / 2 are gate and up: out = activation(gate) * up
    has_residual: bool = False  # + residual (N,)
    split: SplitHeads | None = None  # x is attention that has still to be combined

    @property
    def out_rows(self) -> int:
        return self.num_rows if self.activation is None else self.num_rows // 2

    @property
    def cols(self) -> int:
        """Columns of a lane's run."""
        return run_cols(self.format, VECTOR_COLS)

    @property
    def num_runs(self) -> int:
        return self.num_cols // self.cols

    @property
    def steps(self) -> int:
        """Iterations of a warp."""
        _, _, across, ahead = self.shape
        return -(-self.num_runs // (LANES * across * ahead))

    @property
    def stages(self) -> bool:
        """Whether a threadgroup first puts x * norm weight into its memory, to be read by runs. A quantised run has 32
        columns: lanes that read those from main memory touch 32 lines at once, and that costs more than the codes."""
        return (
            self.format.is_quantized
            and self.norm_eps is not None
            and self.num_cols % VECTOR_COLS == 0
            and self.num_cols // PANEL * STAGED_RUN * 4 <= SHARED_BYTES // 2
        )

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Rows (or pairs of gate and up) a warp owns, warps by rows, warps by columns, runs a lane loads at once.

        Measured on an H200 for float16: 16 to 32 loads of 16 bytes in flight for each of 8 to 16 warps fill its
        memory. Quantised runs are longer than a vector load of x, whose cost more rows must share."""
        passes = -(-self.num_cols // (self.cols * LANES))  # runs of a lane, if one warp had all columns
        if self.format.is_quantized:
            rows = 4 if self.activation is not None or self.out_rows <= 4096 else 8
            across = _power_below(min(8, passes))
            return rows, max(1, 4 // across), across, 1
        if self.out_rows <= 4096 and passes <= 8:
            return 2, 2, _power_below(min(4, -(-passes // 2))), min(2, passes)
        across = _power_below(min(16, passes))
        return (4 if self.out_rows > 32768 else 2), 1, across, min(2, -(-passes // across))


def _power_below(value: int) -> int:
    """The largest power of two that is not above `value`."""
    return 1 << (value.bit_length() - 1)


@cached_kernel
def vector_kernel(spec: VectorSpec) -> KernelFn:
    """fn(out, *planes, x[, split lse, inputs][, norm_weight][, residual])."""

    def kernel(out: UOp, *rest: UOp) -> UOp:
        operands = list(rest)
        planes = Planes(spec.format, [operands.pop(0) for _ in range(Planes.count(spec.format))])
        body = Body()
        rows, down, across, _ = spec.shape
        group, lane = body.grid(spec.out_rows // (rows * down)), body.threads(LANES)
        column_warp, row_warp = warps(body, across), warps(body, down)
        axes = axes_of(group, lane, column_warp, row_warp)
        first = (group * down + row_warp) * rows
        own = [first + i for i in range(rows)]
        if spec.activation is not None:
            own += [row + spec.out_rows for row in own]
        norm_weight = operands.pop(1 if spec.split is None else 3) if spec.norm_eps is not None else None
        loads = _VectorLoads(spec, planes, norm_weight, own, column_warp, lane)
        only = loads.runs(0) if spec.steps == 1 else []
        x, split, residual = _vector_operands(spec, operands, [value for run in only for value in run.values])
        staged = squares = None
        if spec.stages:
            assert norm_weight is not None
            threads = (row_warp * across + column_warp) * LANES + lane
            staged, squares = _stage(body, spec, x, norm_weight, threads, down * across)

        def read(run: _VectorRun, iteration: UOp | int) -> list[UOp]:
            """The columns of a run of x."""
            start = run.number * spec.cols
            if split is not None:
                assert spec.split is not None
                values = read_split(body, spec.split, x, *split, start, spec.cols, [*axes, *axes_of(iteration)])
            elif staged is not None:
                values = load_floats(staged, run.number * STAGED_RUN, spec.cols)
            else:
                values = load_floats(x, start, spec.cols)
            inside = run.is_inside
            return values if inside is None else [inside.where(value, 0.0) for value in values]

        def step(iteration: UOp | int, old: list[UOp]) -> list[UOp]:
            new = list(old)
            for run in only or loads.runs(iteration):
                values = read(run, iteration)
                if run.norms:
                    new[-1] = new[-1] + dot(values, values)
                    values = [v * w for v, w in zip(values, run.norms, strict=True)]
                sums = group_sums(spec.format, values)
                for i, weight in enumerate(run.weights):
                    new[i] = new[i] + weight.dot(values, sums)
            return new

        count = len(own) + (norm_weight is not None and staged is None)
        totals = [spec.lanes.sum(total) for total in carry(body, zeros(count), spec.steps, axes, step)]
        if across > 1:
            totals = _add_warps(body, totals, row_warp * across + column_warp, row_warp * across, across, down, lane)
        totals = _finish_row(spec, totals if squares is None else [*totals, squares], own, residual)
        is_first = lane.eq(0) & column_warp.eq(0) if isinstance(column_warp, UOp) else lane.eq(0)
        stores = [out[own[i].valid(is_first)].store(total.cast(out.dtype)) for i, total in enumerate(totals)]
        nbytes = spec.num_rows * spec.num_cols * spec.format.bits // 8
        name = f"{spec.name}_{spec.format.name}_1x{spec.num_rows}x{spec.num_cols}"
        return finish(
            UOp.group(*stores).end(*reversed(axes)), name, ops=2 * spec.num_rows * spec.num_cols, nbytes=nbytes
        )

    return kernel


@dataclass(frozen=True)
class _VectorLoads:
    """What a lane loads of the weights of the rows `own`."""

    spec: VectorSpec
    planes: Planes
    norm_weight: UOp | None
    own: list[UOp]
    warp: UOp | int  # of those that share the columns
    lane: UOp

    def runs(self, iteration: UOp | int) -> list[_VectorRun]:
        """The runs of an iteration, all before any is used: as many loads in flight as there are registers for."""
        spec, loaded = self.spec, []
        _, _, across, ahead = spec.shape
        for i in range(ahead):
            wanted = ((iteration * ahead + i) * across + self.warp) * LANES + self.lane
            is_inside = wanted < spec.num_runs if spec.num_runs % (LANES * across * ahead) else None
            run = wanted if is_inside is None else is_inside.where(wanted, 0)
            weights = [read_run(self.planes, row, run, spec.num_cols, spec.cols) for row in self.own]
            norms = []
            if self.norm_weight is not None and not spec.stages:
                norms = load_floats(self.norm_weight, run * spec.cols, spec.cols)
            loaded.append(_VectorRun(run, is_inside, weights, norms))
        return loaded


@dataclass(frozen=True)
class _VectorRun:
    """What a lane has loaded of a run: its rows' weights, and the norm's where they are not staged."""

    number: UOp
    is_inside: UOp | None  # None: all runs are
    weights: list[Run]
    norms: list[UOp]

    @property
    def values(self) -> list[UOp]:
        factors = [value for weight in self.weights for pair in weight.factors for value in pair]
        return [value for weight in self.weights for value in weight.floats] + factors + self.norms


def _vector_operands(
    spec: VectorSpec, operands: list[UOp], ahead: Sequence[UOp]
) -> tuple[UOp, tuple[UOp, UOp] | None, UOp | None]:
    """x, the rest of what a split x is read from, and the residual: `operands` without planes and norm weight, when the
    kernels before have ended. `ahead` is loaded meanwhile."""
    inputs = operands.pop(2) if spec.split is not None else None
    x, *rest = await_previous(spec.lanes, *operands, ahead=ahead)
    split = (rest.pop(0), inputs) if inputs is not None else None
    return x, split, rest.pop() if rest else None


def _stage(body: Body, spec: VectorSpec, x: UOp, norm_weight: UOp, thread: UOp, num_warps: int) -> tuple[UOp, UOp]:
    """x * norm weight in threadgroup memory, run by run, and the sum of x's squares in every thread."""
    shared, sums = body.shared(spec.num_cols // PANEL * STAGED_RUN), body.shared(num_warps)
    threads, pieces = num_warps * LANES, spec.num_cols // VECTOR_COLS
    stores, squares = [], []
    for start in range(0, pieces, threads):
        piece = start + thread
        is_inside = None if start + threads <= pieces else piece < pieces
        piece = piece if is_inside is None else is_inside.where(piece, 0)
        values = load_floats(x, piece * VECTOR_COLS, VECTOR_COLS)
        square = dot(values, values)
        squares.append(square if is_inside is None else is_inside.where(square, 0.0))
        weights = load_floats(norm_weight, piece * VECTOR_COLS, VECTOR_COLS)
        per_run = PANEL // VECTOR_COLS
        at = piece // per_run * STAGED_RUN + piece % per_run * VECTOR_COLS
        for i, (value, weight) in enumerate(zip(values, weights, strict=True)):
            target = at + i if is_inside is None else (at + i).valid(is_inside)
            stores.append(shared[target].store(value * weight))
    total = spec.lanes.sum(balanced(squares))
    stores.append(sums[(thread // LANES).valid((thread % LANES).eq(0))].store(total))
    done = UOp.group(*stores)
    sums = sums.after(done)
    return shared.after(done), balanced(sums[i].load() for i in range(num_warps))


def _finish_row(spec: VectorSpec, totals: list[UOp], own: list[UOp], residual: UOp | None) -> list[UOp]:
    """Norm scale and epilogue on a warp's rows. With a norm the last total is the sum of x's squares."""
    if spec.norm_eps is not None:
        scale = (totals[-1] * (1.0 / spec.num_cols) + spec.norm_eps).sqrt().reciprocal()
        totals = [total * scale for total in totals[:-1]]
    if spec.activation is not None:
        half = len(totals) // 2
        return gated(spec.activation, totals[:half], totals[half:])
    if residual is not None:
        return [total + residual[row].load().cast(F32) for total, row in zip(totals, own, strict=True)]
    return totals


def _add_warps(body: Body, totals: list[UOp], warp: UOp, first: UOp, across: int, down: int, lane: UOp) -> list[UOp]:
    """The sums of `across` warps' totals, in every thread. `warp`: the thread's own; `first` of those to be added."""
    count = len(totals)
    shared = body.shared(down * across * count)
    is_first = lane.eq(0)
    stores = [shared[(warp * count + i).valid(is_first)].store(total) for i, total in enumerate(totals)]
    shared = shared.after(UOp.group(*stores))
    return [balanced(shared[(first + w) * count + i].load() for w in range(across)) for i in range(count)]


# -- many token rows, on the matrix unit -------------------------------------------------------------------------------

TOKENS = 8  # token rows of a tile
DENSE_COLS = 16  # dense columns of a lane's run
MAX_WARPS = 16
EARLY_BYTES = 256  # of a lane
MAX_PAIR_TILES = 4  # tiles of tokens beside which there are registers for weights in pairs
MAX_SUMS = 128  # registers of a lane for them
MAX_TOKEN_TILES = 8  # whose sums a warp keeps in registers; more tokens take more threadgroups


@dataclass(frozen=True)
class MatrixSpec(Tunable):
    """partial (S, T, N) = x (T, K) @ w.T over S parts of K, or out (T, N / 2) = activation(gate) * up."""

    name: str
    lanes: Lanes
    mma: Mma
    format: Format
    num_tokens: int  # T
    num_rows: int  # N
    num_cols: int  # K
    activation: str | None = None  # the matrix is gate over up: out = activation(gate) * up

    @property
    def is_gated(self) -> bool:
        return self.activation is not None

    @property
    def out_rows(self) -> int:
        return self.num_rows // 2 if self.is_gated else self.num_rows

    @property
    def cols(self) -> int:
        return run_cols(self.format, DENSE_COLS)

    @property
    def has_pairs(self) -> bool:
        """Whether weights are unpacked two at a time, in float16."""
        return self.format.is_quantized and self.mma.dtype == F16 and self.token_tiles <= MAX_PAIR_TILES

    @property
    def token_tiles(self) -> int:
        """Tiles of tokens in a threadgroup."""
        return min(MAX_TOKEN_TILES, -(-self.num_tokens // TOKENS))

    @property
    def token_groups(self) -> int:
        """Threadgroups that share a tile of rows."""
        return -(-self.num_tokens // (TOKENS * self.token_tiles))

    @property
    def row_tiles(self) -> int:
        """Tiles of rows a warp owns; gate and up count as two."""
        scale = 16 // self.mma.rows  # METAL's tiles have half the rows
        wanted = 1 if self.token_tiles == 1 and self.num_rows < 8192 else 2
        if self.token_tiles > 4 and (self.num_rows >= 8192 or self.num_cols >= 8192):
            wanted = 4
        if self.is_gated:
            wanted = 4 if self._is_broad else max(2, wanted)
        wanted *= scale
        while wanted > 1 + self.is_gated and self.num_rows % (wanted * self.mma.rows):
            wanted //= 2
        return self.knob("row_tiles", wanted)

    def knobs(self) -> Mapping[str, tuple[int, ...]]:
        splits = () if self.is_gated else (1, 2, 4, 8, 16)
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
            and self.num_rows % (self.row_tiles * self.mma.rows * self.down) == 0
            and self.warps * self.down <= MAX_WARPS
            and (self._sums % self.warps == 0 or self.warps > self._sums)
            and self.row_tiles * self._sums <= MAX_SUMS
            and self.chunks >= self.splits * self.warps * self.ahead
            and self.shared_bytes <= SHARED_BYTES
        )

    @property
    def warps(self) -> int:
        """Warps that share the columns, and at the end a lane's sums."""
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
        """Warps with rows of their own that read the same columns of x, all but one from the nearest cache."""
        is_wanted = self._is_broad or (self._is_chained_gate and self.token_tiles == 1 and not self.has_pairs)
        fits = self.num_rows % (self.row_tiles * self.mma.rows * 2) == 0
        return self.knob("down", 2 if is_wanted and fits and self.chunks >= 8 else 1)

    @property
    def _is_chained_gate(self) -> bool:
        return self.is_gated and self.lanes.is_chained and self.num_rows >= 8192

    @property
    def _is_broad(self) -> bool:
        """Whether x is so much beside the codes that more rows should share it."""
        return self._is_chained_gate and self.has_pairs and self.token_tiles > 2

    @property
    def _sums(self) -> int:
        """A lane's sums of one tile of rows: each of the warps that share the columns keeps some of them, or one."""
        return self.token_tiles * self.mma.elements

    @property
    def shared_bytes(self) -> int:
        return self.down * self.warps * self._sums * LANES * 4 if self.warps > 1 else 0

    @property
    def chunks(self) -> int:
        return -(-self.num_cols // (self.cols * self.mma.slots))

    @property
    def splits(self) -> int:
        """S: parts of K with threadgroups of their own, where there are too few rows to fill the device."""
        splits, groups = 1, self._num_groups
        wanted = GROUPS_WANTED * 3 // 2 if self.token_tiles == 1 else GROUPS_WANTED
        while not self.is_gated and groups * splits < wanted and self.chunks >= 4 * splits * min(4, self.warps):
            splits *= 2
        return self.knob("splits", splits)

    @property
    def _num_groups(self) -> int:
        """Threadgroups, if none shared its columns with another."""
        return self.num_rows // (self.row_tiles * self.mma.rows * self.down) * self.token_groups

    @property
    def steps(self) -> int:
        """Iterations of a warp."""
        return -(-self.chunks // (self.splits * self.warps * self.ahead))

    @property
    def begins_early(self) -> bool:
        """Whether a warp loads its first chunks while the kernel before still runs: where it has registers for all of
        them at once."""
        run_bytes = self.cols * min(self.format.bits, 16) // 8
        return self.lanes.is_chained and self.ahead * self.row_tiles * 2 * run_bytes <= EARLY_BYTES

    @property
    def ahead(self) -> int:
        """Chunks whose loads a warp has in flight: as many as its registers hold beside the sums."""
        most = 2 if self.format.is_quantized or self.down > 1 else 4
        ahead = max(1, most // self.token_tiles)
        while ahead > 1 and self.chunks < self.splits * self.warps * ahead:
            ahead //= 2
        return self.knob("ahead", ahead)


def fits_matrix_unit(mma: Mma, matrix_rows: int, *, is_gated: bool) -> bool:
    """Whether a matrix's rows fill tiles: every matrix's do unless its halves are odd."""
    return (matrix_rows // 2 if is_gated else matrix_rows) % mma.rows == 0


@cached_kernel
def matrix_kernel(spec: MatrixSpec) -> KernelFn:
    """fn(out, *planes, x): see MatrixSpec. Tokens behind T are the last one again, and are not stored."""

    def kernel(out: UOp, *rest: UOp) -> UOp:
        *stored, x = rest
        planes, mma, body = Planes(spec.format, stored), spec.mma, Body()
        row_tiles, token_tiles = spec.row_tiles, spec.token_tiles
        per_group = row_tiles // 2 if spec.is_gated else row_tiles
        token_group = grid(body, spec.token_groups)
        group = body.grid(spec.out_rows // (per_group * mma.rows * spec.down))
        part, lane, warp = grid(body, spec.splits), body.threads(LANES), warps(body, spec.warps)
        row_warp = warps(body, spec.down)
        axes = axes_of(token_group, group, part, lane, warp, row_warp)
        # row tiles alternate between gate and up
        bases = [
            ((group * spec.down + row_warp) * per_group + (i // 2 if spec.is_gated else i)) * mma.rows
            + (spec.out_rows * (i % 2) if spec.is_gated else 0)
            for i in range(row_tiles)
        ]
        first_token = token_group * (token_tiles * TOKENS)
        loads = _MatrixLoads(spec, planes, bases, first_token, part * spec.warps + warp, lane)
        early = loads.weights(0) if spec.begins_early else []
        (x,) = await_previous(spec.lanes, x, ahead=[value for chunk in early for value in chunk.values])

        def step(chunks: list[_MatrixChunk], old: list[UOp]) -> list[UOp]:
            size = mma.elements
            sums = [old[i : i + size] for i in range(0, len(old), size)]
            for chunk in chunks:
                inputs = [loads.inputs(x, chunk.number, tile) for tile in range(token_tiles)]
                for tile in range(len(sums)):
                    operands = (chunk.runs[tile // token_tiles], inputs[tile % token_tiles])
                    sums[tile] = _multiply_tile(body, spec, *operands, sums[tile])
            return [value for tile in sums for value in tile]

        per_tile = token_tiles * mma.elements
        totals, past = zeros(row_tiles * per_tile), 0
        if early:
            totals, past = step(early, totals), 1
        if spec.steps > past:
            totals = carry(body, totals, spec.steps - past, axes, lambda i, old: step(loads.weights(i + past), old))
        pieces = [totals[r * per_tile : (r + 1) * per_tile] for r in range(row_tiles)]
        kept, first = _share_out(body, spec, pieces, warp, row_warp, lane)
        stores = []
        for r in range(0, row_tiles, 2 if spec.is_gated else 1):
            values = kept[r]
            if spec.activation is not None:
                values = gated(spec.activation, values, kept[r + 1])
            stores += _store_tile(spec, out, values, first, lane, first_token, part, bases[r])
        name = f"{spec.name}_{spec.format.name}_{spec.num_tokens}x{spec.num_rows}x{spec.num_cols}"
        nbytes = spec.num_rows * spec.num_cols * spec.format.bits // 8
        ops = 2 * spec.num_tokens * spec.num_rows * spec.num_cols
        return finish(UOp.group(*stores).end(*reversed(axes)), name, ops=ops, nbytes=nbytes)

    return kernel


@dataclass(frozen=True)
class _MatrixChunk:
    """The lane's runs of w of a chunk, by tile of rows."""

    number: UOp
    runs: list[list[list[UOp]]]

    @property
    def values(self) -> list[UOp]:
        return [value for tile in self.runs for run in tile for value in run]


@dataclass(frozen=True)
class _MatrixLoads:
    """What a lane loads. `bases`: where tiles of rows begin; `worker`: number of the warp among those that share K."""

    spec: MatrixSpec
    planes: Planes
    bases: list[UOp]
    first_token: UOp | int
    worker: UOp | int
    lane: UOp

    def weights(self, iteration: UOp | int) -> list[_MatrixChunk]:
        """The chunks of an iteration, all before any is used."""
        spec = self.spec
        first = (self.worker * spec.steps + iteration) * spec.ahead
        return [self._chunk(first + i) for i in range(spec.ahead)]

    def _chunk(self, number: UOp) -> _MatrixChunk:
        places = [(row, self._run(number, slot)[0]) for row, slot in self.spec.mma.row_runs(self.lane)]
        return _MatrixChunk(number, [[self._weights(base + row, run) for row, run in places] for base in self.bases])

    def _weights(self, row: UOp, run: UOp) -> list[UOp]:
        spec = self.spec
        if spec.has_pairs:
            return read_halves(self.planes, row, run, spec.num_cols, spec.mma)
        return read_run(self.planes, row, run, spec.num_cols, spec.cols).values(spec.mma.dtype)

    def inputs(self, x: UOp, chunk: UOp, tile: int) -> list[list[UOp]]:
        """The lane's runs of x, of one tile of tokens."""
        spec, runs = self.spec, []
        for token, slot in spec.mma.token_runs(self.lane):
            run, is_inside = self._run(chunk, slot)
            at = self._token_row(tile, token) * spec.num_cols + run * spec.cols
            if spec.has_pairs:
                values = spec.mma.load_pairs(x, at, spec.cols)
            else:
                values = [x[at + i].load().cast(spec.mma.dtype) for i in range(spec.cols)]
            runs.append(values if is_inside is None else [is_inside.where(v, v.const_like(0)) for v in values])
        return runs

    def _run(self, chunk: UOp, slot: UOp) -> tuple[UOp, UOp | None]:
        """The run of a slot, and whether there is one; None: there always is."""
        spec, run = self.spec, chunk * self.spec.mma.slots + slot
        num_runs = spec.num_cols // spec.cols
        if num_runs % (spec.mma.slots * spec.splits * spec.warps * spec.ahead) == 0:
            return run, None
        return (run < num_runs).where(run, 0), run < num_runs

    def _token_row(self, tile: int, token: UOp) -> UOp:
        row, spec = self.first_token + tile * TOKENS + token, self.spec
        return row if spec.num_tokens % (spec.token_tiles * TOKENS) == 0 else row.minimum(spec.num_tokens - 1)


def _multiply_tile(body: Body, spec: MatrixSpec, w: list[list[UOp]], x: list[list[UOp]], sums: list[UOp]) -> list[UOp]:
    if spec.has_pairs:
        return spec.mma.multiply_pairs(body, w, x, sums)
    total = spec.mma.multiply(w, x, UOp.stack(*sums))
    return [total.index(e) for e in range(spec.mma.elements)]


def _store_tile(
    spec: MatrixSpec,
    out: UOp,
    values: list[UOp],
    first: UOp | int,
    lane: UOp,
    first_token: UOp | int,
    part: UOp | int,
    base: UOp,
) -> list[UOp]:
    """Stores of a lane's elements [first, first + n) of one tile of rows, which begins at row `base`."""
    stores, mma = [], spec.mma
    for i, value in enumerate(values):
        element = first + i
        token, row = mma.place(lane, element % mma.elements)
        at = first_token + element // mma.elements * TOKENS + token
        index = (part * spec.num_tokens + at) * spec.out_rows + base + row
        if spec.num_tokens % (spec.token_tiles * TOKENS):
            index = index.valid(at < spec.num_tokens)
        if spec.warps > spec.token_tiles * mma.elements:
            index = index.valid(element < spec.token_tiles * mma.elements)
        stores.append(out[index].store(value.cast(out.dtype)))
    return stores


def _share_out(
    body: Body, spec: MatrixSpec, pieces: list[list[UOp]], warp: UOp | int, row_warp: UOp | int, lane: UOp
) -> tuple[list[list[UOp]], UOp | int]:
    """Add the warps' sums through threadgroup memory, a tile of rows at a time; each warp keeps its share of a lane's
    elements. Returns the shares, and the number of their first element."""
    if spec.warps == 1:
        return pieces, 0
    count = len(pieces[0])
    share = max(1, count // spec.warps)
    buffer = body.shared(spec.down * spec.warps * count * LANES)
    base = row_warp * spec.warps
    first = warp * share  # of warps beyond a lane's elements, one that is not there
    kept = []
    for r, piece in enumerate(pieces):
        stores = [buffer[((base + warp) * count + i) * LANES + lane].store(value) for i, value in enumerate(piece)]
        shared = buffer.after(UOp.group(*stores))
        own = first.minimum(count - share) if isinstance(first, UOp) and share * spec.warps != count else first
        sums = [
            balanced(shared[((base + w) * count + own + i) * LANES + lane].load() for w in range(spec.warps))
            for i in range(share)
        ]
        if r + 1 < len(pieces):  # the next tile's sums overwrite the buffer: hold these, and wait for the others
            registers = body.registers(share)
            held = UOp.group(*[registers[i].store(value) for i, value in enumerate(sums)])
            buffer = buffer.without_after.after(UOp(Ops.BARRIER, src=(held,)))
            sums = [registers.after(held)[i].load() for i in range(share)]
        kept.append(sums)
    return kept, first


# -- the sums between products -----------------------------------------------------------------------------------------


RUN_COLS = 8  # columns that one thread of a row's reads at once


@dataclass(frozen=True)
class EmbedSpec:
    """Rows of an embedding table, by the step's token ids."""

    format: Format
    num_rows: int
    token_offset: int  # of the ids in the step's inputs
    is_fed: bool  # ids below 0 name rows of the step before's output
    scale: float = 1.0


@dataclass(frozen=True)
class SumSpec:
    """x (T, K) = the sum of S partial products and what an `Epilogue` does to it, or rows of a table; h = RMS-normed x;
    as far as they are asked for."""

    lanes: Lanes
    num_tokens: int  # T
    num_cols: int  # K
    num_parts: int  # S; 0: x is given
    has_residual: bool
    norm_eps: float | None
    embed: EmbedSpec | None = None
    has_bias: bool = False
    post_norm_eps: float | None = None  # of an RMSNorm of the sum, before the residual
    scale: float = 1.0  # of the sum, after its norm
    softcap: float | None = None

    @property
    def num_warps(self) -> int:
        return min(8, max(1, self.num_cols // (LANES * RUN_COLS)))


@cached_kernel
def sum_kernel(spec: SumSpec) -> KernelFn:
    """fn([x][, h], (parts (S, T, K)[, residual][, bias][, post-norm weight] | inputs[, previous_output], *planes | x)
    [, norm weight]): a threadgroup a row. x is written where it is not given, h where a norm is."""

    def kernel(*operands: UOp) -> UOp:
        rest = list(operands)
        x_out = rest.pop(0) if spec.num_parts or spec.embed is not None else None
        h_out = rest.pop(0) if spec.norm_eps is not None else None
        norm_weight = rest.pop() if spec.norm_eps is not None else None
        row = _SumRow(spec, rest)
        values = row.values()
        if x_out is not None:
            values = [[value.cast(x_out.dtype).cast(F32) for value in new] for new in values]
        stores = [] if x_out is None else row.stores(x_out, values)
        if h_out is not None:
            assert norm_weight is not None and spec.norm_eps is not None
            stores += row.stores(h_out, row.normed(values, norm_weight, spec.norm_eps))
        kind = f"sum{spec.num_parts}{'_norm' if h_out is not None else ''}"
        if spec.embed is not None:
            kind = f"embed_{spec.embed.format.name}"
        name = f"{kind}_{spec.num_tokens}x{spec.num_cols}"
        nbytes = spec.num_tokens * spec.num_cols * (4 * spec.num_parts + 6)
        return finish(UOp.group(*stores).end(*reversed(row.axes)), name, nbytes=nbytes)

    return kernel


class _SumRow:
    """A threadgroup's row of x. Each thread holds pieces of RUN_COLS neighbouring values; `inside`: whether a piece is
    one of the row's, None where all are."""

    def __init__(self, spec: SumSpec, operands: list[UOp]) -> None:
        """`operands`: those between the outputs and the norm's weight."""
        self.spec, self.body = spec, Body()
        self.post_weight = operands.pop() if spec.post_norm_eps is not None else None
        self.bias = operands.pop() if spec.has_bias else None
        self.operands = operands
        threads = spec.num_warps * LANES
        self.row, self.lane = self.body.grid(spec.num_tokens), self.body.threads(LANES)
        self.warp = warps(self.body, spec.num_warps)
        self.axes = axes_of(self.row, self.lane, self.warp)
        thread, num_runs = self.warp * LANES + self.lane, spec.num_cols // RUN_COLS
        runs = [thread + i * threads for i in range(-(-num_runs // threads))]
        self.inside = [None if (i + 1) * threads <= num_runs else run < num_runs for i, run in enumerate(runs)]
        self.starts = [
            (run if ok is None else ok.where(run, 0)) * RUN_COLS for run, ok in zip(runs, self.inside, strict=True)
        ]

    def values(self) -> list[list[UOp]]:
        """x by pieces, in float32."""
        if self.spec.embed is not None:
            return [self._read_table(self.spec.embed, start) for start in self.starts]
        source, *residual = await_previous(self.spec.lanes, *self.operands)
        values = [self._read_sum(source, start) for start in self.starts]
        if self.post_weight is not None and self.spec.post_norm_eps is not None:
            values = self.normed(values, self.post_weight, self.spec.post_norm_eps)
        return [self._finished(new, start, residual) for new, start in zip(values, self.starts, strict=True)]

    def _read_table(self, embed: EmbedSpec, start: UOp) -> list[UOp]:
        inputs, *planes = self.operands
        previous = planes.pop(0) if embed.is_fed else None
        token = token_id(inputs[embed.token_offset + self.row].load(), previous, embed.num_rows)
        table = Planes(embed.format, planes)
        values = [table.value(token, start + i, self.spec.num_cols, "row") for i in range(RUN_COLS)]
        return values if embed.scale == 1.0 else [value * embed.scale for value in values]

    def _read_sum(self, source: UOp, start: UOp) -> list[UOp]:
        spec = self.spec
        at, size = self.row * spec.num_cols + start, spec.num_tokens * spec.num_cols
        parts = [load_floats(source, at + part * size, RUN_COLS) for part in range(max(1, spec.num_parts))]
        new = [balanced(column) for column in zip(*parts, strict=True)]
        if self.bias is None:
            return new
        return [a + b for a, b in zip(new, load_floats(self.bias, start, RUN_COLS), strict=True)]

    def _finished(self, new: list[UOp], start: UOp, residual: Sequence[UOp]) -> list[UOp]:
        spec = self.spec
        if spec.scale != 1.0:
            new = [value * spec.scale for value in new]
        for values in residual:
            at = self.row * spec.num_cols + start
            new = [a + b for a, b in zip(new, load_floats(values, at, RUN_COLS), strict=True)]
        if spec.softcap is None:
            return new
        return [tanh(value * (1.0 / spec.softcap), lambda x: x.exp2()) * spec.softcap for value in new]

    def normed(self, values: list[list[UOp]], weight: UOp, eps: float) -> list[list[UOp]]:
        """The row's RMSNorm."""
        squares = [
            dot(v, v) if ok is None else ok.where(dot(v, v), 0.0) for v, ok in zip(values, self.inside, strict=True)
        ]
        spec = self.spec
        total = [spec.lanes.sum(balanced(squares))]
        if spec.num_warps > 1:
            zero = UOp.const(0, dtypes.weakint)
            total = _add_warps(self.body, total, self.warp, zero, spec.num_warps, 1, self.lane)
        scale = (total[0] * (1.0 / spec.num_cols) + eps).sqrt().reciprocal()
        weights = [load_floats(weight, start, RUN_COLS) for start in self.starts]
        return [[v * scale * w for v, w in zip(new, ws, strict=True)] for new, ws in zip(values, weights, strict=True)]

    def stores(self, target: UOp, values: list[list[UOp]]) -> list[UOp]:
        stores = []
        for new, start, ok in zip(values, self.starts, self.inside, strict=True):
            for i, value in enumerate(new):
                at = self.row * self.spec.num_cols + start + i
                stores.append(target[at if ok is None else at.valid(ok)].store(value.cast(target.dtype)))
        return stores
