"""Matrix products on devices whose lanes exchange values: one token row by dot products, more on the matrix unit.

Both stream the weights from memory straight into registers; K is split over the lanes and warps of a threadgroup.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tinygrad import UOp, dtypes
from tinygrad.uop.ops import Ops

from tinyvllm.ops.gpu_kernel import (
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
from tinyvllm.ops.gpu_runs import group_sums, read_run, run_cols
from tinyvllm.ops.gpu_split import SplitHeads, read_split
from tinyvllm.ops.kernel import F32, LOG2E, Body, KernelFn, balanced, cached_kernel, finish
from tinyvllm.ops.matrix import PANEL, Format, Planes
from tinyvllm.ops.token_ids import token_id
from tinyvllm.ops.tuning import Tunable

FEW_GROUPS = 96
GROUPS_WANTED = 256  # threadgroups that keep every core of a large GPU busy: two each on 132


def fast_silu(x: UOp) -> UOp:
    """x * sigmoid(x), with the device's own exponential."""
    return x / ((x * -LOG2E).exp2() + 1.0)


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
    epilogue: str = "none"  # "residual": + residual (N,); "silu": rows n and n + N / 2 are gate and up
    split: SplitHeads | None = None  # x is attention that has still to be combined

    @property
    def out_rows(self) -> int:
        return self.num_rows // 2 if self.epilogue == "silu" else self.num_rows

    @property
    def cols(self) -> int:
        """Columns of a lane's run."""
        return run_cols(self.format, VECTOR_COLS)

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
            rows = 4 if self.epilogue == "silu" or self.out_rows <= 4096 else 8
            across = _power_below(min(8, passes))
            return rows, max(1, 4 // across), across, 1
        if self.out_rows <= 4096 and passes <= 8:
            return 2, 2, _power_below(min(4, -(-passes // 2))), min(2, passes)
        return (4 if self.out_rows > 32768 else 2), 1, _power_below(min(16, passes)), 1


def _power_below(value: int) -> int:
    """The largest power of two that is not above `value`."""
    return 1 << (value.bit_length() - 1)


@cached_kernel
def vector_kernel(spec: VectorSpec) -> KernelFn:
    """fn(out, *planes, x[, split lse, inputs][, norm_weight][, residual])."""

    def kernel(out: UOp, *rest: UOp) -> UOp:
        operands = list(rest)
        planes = Planes(spec.format, [operands.pop(0) for _ in range(Planes.count(spec.format))])
        x, split, norm_weight, residual = _vector_operands(spec, operands)
        body = Body()
        rows, down, across, ahead = spec.shape
        group, lane = body.grid(spec.out_rows // (rows * down)), body.threads(LANES)
        column_warp, row_warp = warps(body, across), warps(body, down)
        axes = axes_of(group, lane, column_warp, row_warp)
        first = (group * down + row_warp) * rows
        own = [first + i for i in range(rows)]
        if spec.epilogue == "silu":
            own += [row + spec.out_rows for row in own]

        staged = squares = None
        if spec.stages:
            assert norm_weight is not None
            threads = (row_warp * across + column_warp) * LANES + lane
            staged, squares = _stage(body, spec, x, norm_weight, threads, down * across)
        num_runs = spec.num_cols // spec.cols
        steps = -(-num_runs // (LANES * across * ahead))
        is_ragged = num_runs % (LANES * across * ahead) != 0

        def step(iteration: UOp | int, old: list[UOp]) -> list[UOp]:
            wanted = [((iteration * ahead + i) * across + column_warp) * LANES + lane for i in range(ahead)]
            runs = [(run < num_runs).where(run, 0) if is_ragged else run for run in wanted]
            # all weights first: as many loads in flight as there are registers for
            weights = [[read_run(planes, row, run, spec.num_cols, spec.cols) for row in own] for run in runs]
            new = list(old)
            for run, asked, row_runs in zip(runs, wanted, weights, strict=True):
                if split is not None:
                    assert spec.split is not None
                    outer = [*axes, *axes_of(iteration)]
                    values = read_split(body, spec.split, x, *split, run * spec.cols, spec.cols, outer)
                elif staged is not None:
                    values = load_floats(staged, run * STAGED_RUN, spec.cols)
                else:
                    values = load_floats(x, run * spec.cols, spec.cols)
                if is_ragged:
                    values = [(asked < num_runs).where(value, 0.0) for value in values]
                if norm_weight is not None and staged is None:
                    new[-1] = new[-1] + dot(values, values)
                    values = [
                        v * w for v, w in zip(values, load_floats(norm_weight, run * spec.cols, spec.cols), strict=True)
                    ]
                sums = group_sums(spec.format, values)
                for i, weight in enumerate(row_runs):
                    new[i] = new[i] + weight.dot(values, sums)
            return new

        count = len(own) + (norm_weight is not None and staged is None)
        totals = [spec.lanes.sum(total) for total in carry(body, zeros(count), steps, axes, step)]
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


def _vector_operands(
    spec: VectorSpec, operands: list[UOp]
) -> tuple[UOp, tuple[UOp, UOp] | None, UOp | None, UOp | None]:
    """x, the rest of what a split x is read from, the norm's weight and the residual, taken from `operands`."""
    (x,) = await_previous(spec.lanes, operands.pop(0))
    split = norm_weight = residual = None
    if spec.split is not None:
        split = (await_previous(spec.lanes, operands.pop(0))[0], operands.pop(0))
    if spec.norm_eps is not None:
        norm_weight = operands.pop(0)
    if spec.epilogue == "residual":
        (residual,) = await_previous(spec.lanes, operands.pop(0))
    return x, split, norm_weight, residual


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
    if spec.epilogue == "silu":
        half = len(totals) // 2
        return [fast_silu(gate) * up for gate, up in zip(totals[:half], totals[half:], strict=True)]
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
MAX_SUMS = 128  # registers of a lane for them
MAX_TOKEN_TILES = 8  # whose sums a warp keeps in registers; more tokens take more threadgroups


@dataclass(frozen=True)
class MatrixSpec(Tunable):
    """partial (S, T, N) = x (T, K) @ w.T over S parts of K, or out (T, N / 2) = silu(gate) * up."""

    name: str
    lanes: Lanes
    mma: Mma
    format: Format
    num_tokens: int  # T
    num_rows: int  # N
    num_cols: int  # K
    is_gated: bool = False

    @property
    def out_rows(self) -> int:
        return self.num_rows // 2 if self.is_gated else self.num_rows

    @property
    def cols(self) -> int:
        return run_cols(self.format, DENSE_COLS)

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
            wanted = max(2, wanted)
        wanted *= scale
        while wanted > 1 + self.is_gated and self.num_rows % (wanted * self.mma.rows):
            wanted //= 2
        return self.knob("row_tiles", wanted)

    def knobs(self) -> Mapping[str, tuple[int, ...]]:
        splits = () if self.is_gated else (1, 2, 4, 8, 16)
        return {"row_tiles": (1, 2, 4, 8), "splits": splits}

    def is_possible(self) -> bool:
        least = 2 if self.is_gated else 1
        return (
            self.row_tiles >= least
            and self.num_rows % (self.row_tiles * self.mma.rows) == 0
            and self.row_tiles * self.token_tiles * self.mma.elements <= MAX_SUMS
            and self.chunks >= self.splits
        )

    @property
    def warps(self) -> int:
        """Warps that share the columns, and at the end a lane's sums."""
        if self.chunks < 8:
            return 1
        share = self.token_tiles * self.mma.elements
        if 2 < self.token_tiles <= 4 and share % 8 == 0 and self._num_groups < FEW_GROUPS and not self.is_gated:
            return 8
        return 4 if share % 4 == 0 else 2

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
        return self.num_rows // (self.row_tiles * self.mma.rows) * self.token_groups

    @property
    def ahead(self) -> int:
        """Chunks whose loads a warp has in flight: as many as its registers hold beside the sums."""
        ahead = max(1, (4 if not self.format.is_quantized else 2) // self.token_tiles)
        while ahead > 1 and self.chunks < self.splits * self.warps * ahead:
            ahead //= 2
        return ahead


def fits_matrix_unit(mma: Mma, matrix_rows: int, *, is_gated: bool) -> bool:
    """Whether a matrix's rows fill tiles: every matrix's do unless its halves are odd."""
    return (matrix_rows // 2 if is_gated else matrix_rows) % mma.rows == 0


@cached_kernel
def matrix_kernel(spec: MatrixSpec) -> KernelFn:
    """fn(out, *planes, x): see MatrixSpec. Tokens behind T are the last one again, and are not stored."""

    def kernel(out: UOp, *rest: UOp) -> UOp:
        operands, mma = list(rest), spec.mma
        planes = Planes(spec.format, [operands.pop(0) for _ in range(Planes.count(spec.format))])
        (x,) = await_previous(spec.lanes, operands.pop(0))
        body, row_tiles, token_tiles = Body(), spec.row_tiles, spec.token_tiles
        per_group = row_tiles // 2 if spec.is_gated else row_tiles
        token_group = grid(body, spec.token_groups)
        group = body.grid(spec.out_rows // (per_group * mma.rows))
        part, lane, warp = grid(body, spec.splits), body.threads(LANES), warps(body, spec.warps)
        axes = axes_of(token_group, group, part, lane, warp)
        # row tiles alternate between gate and up
        bases = [
            (group * per_group + (i // 2 if spec.is_gated else i)) * mma.rows
            + (spec.out_rows * (i % 2) if spec.is_gated else 0)
            for i in range(row_tiles)
        ]
        first_token = token_group * (token_tiles * TOKENS)

        def token_row(tile: int, token: UOp) -> UOp:
            row = first_token + tile * TOKENS + token
            return row if spec.num_tokens % (token_tiles * TOKENS) == 0 else row.minimum(spec.num_tokens - 1)

        num_runs = spec.num_cols // spec.cols
        stride = spec.splits * spec.warps * spec.ahead
        steps = -(-spec.chunks // stride)
        ragged = num_runs % (mma.slots * stride) != 0

        def load(chunk: UOp) -> tuple[list[list[list[UOp]]], list[list[list[UOp]]]]:
            """The lane's runs of w by tile of rows, and of x by tile of tokens."""

            def run_of(slot: UOp) -> tuple[UOp, UOp]:
                run = chunk * mma.slots + slot
                return ((run < num_runs).where(run, 0), run < num_runs) if ragged else (run, run)

            weights = [
                [
                    read_run(planes, base + row, run_of(slot)[0], spec.num_cols, spec.cols).values(mma.dtype)
                    for row, slot in mma.row_runs(lane)
                ]
                for base in bases
            ]
            inputs = []
            for tile in range(token_tiles):
                runs = []
                for token, slot in mma.token_runs(lane):
                    run, inside = run_of(slot)
                    at = token_row(tile, token) * spec.num_cols + run * spec.cols
                    values = [x[at + i].load().cast(mma.dtype) for i in range(spec.cols)]
                    runs.append([inside.where(v, v.const_like(0.0)) for v in values] if ragged else values)
                inputs.append(runs)
            return weights, inputs

        def step(iteration: UOp | int, old: list[UOp]) -> list[UOp]:
            first = ((part * spec.warps + warp) * steps + iteration) * spec.ahead
            size = mma.elements
            sums = [UOp.stack(*old[i : i + size]) for i in range(0, len(old), size)]
            for weights, inputs in [load(first + i) for i in range(spec.ahead)]:
                for tile in range(len(sums)):
                    sums[tile] = mma.multiply(weights[tile // token_tiles], inputs[tile % token_tiles], sums[tile])
            return [tile.index(e) for tile in sums for e in range(size)]

        per_tile = token_tiles * mma.elements
        totals = carry(body, zeros(row_tiles * per_tile), steps, axes, step)
        pieces = [totals[r * per_tile : (r + 1) * per_tile] for r in range(row_tiles)]
        kept, first = _share_out(body, spec, pieces, warp, lane)
        stores = []
        for r in range(0, row_tiles, 2 if spec.is_gated else 1):
            values = kept[r]
            if spec.is_gated:
                values = [fast_silu(gate) * up for gate, up in zip(values, kept[r + 1], strict=True)]
            stores += _store_tile(spec, out, values, first, lane, first_token, part, bases[r])
        name = f"{spec.name}_{spec.format.name}_{spec.num_tokens}x{spec.num_rows}x{spec.num_cols}"
        nbytes = spec.num_rows * spec.num_cols * spec.format.bits // 8
        ops = 2 * spec.num_tokens * spec.num_rows * spec.num_cols
        return finish(UOp.group(*stores).end(*reversed(axes)), name, ops=ops, nbytes=nbytes)

    return kernel


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
        stores.append(out[index].store(value.cast(out.dtype)))
    return stores


def _share_out(
    body: Body, spec: MatrixSpec, pieces: list[list[UOp]], warp: UOp | int, lane: UOp
) -> tuple[list[list[UOp]], UOp | int]:
    """Add the warps' sums through threadgroup memory, a tile of rows at a time; each warp keeps its share of a lane's
    elements. Returns the shares, and the number of their first element."""
    if spec.warps == 1:
        return pieces, 0
    count, share = len(pieces[0]), len(pieces[0]) // spec.warps
    buffer = body.shared(spec.warps * count * LANES)
    assert spec.warps * count * LANES * 4 <= SHARED_BYTES
    first = warp * share
    kept = []
    for r, piece in enumerate(pieces):
        stores = [buffer[(warp * count + i) * LANES + lane].store(value) for i, value in enumerate(piece)]
        shared = buffer.after(UOp.group(*stores))
        sums = [
            balanced(shared[(w * count + first + i) * LANES + lane].load() for w in range(spec.warps))
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


@dataclass(frozen=True)
class SumSpec:
    """x (T, K) = residual + the sum of S partial products, or rows of a table, and h = RMS-normed x, as far as they are
    asked for."""

    lanes: Lanes
    num_tokens: int  # T
    num_cols: int  # K
    num_parts: int  # S; 0: x is given
    has_residual: bool
    norm_eps: float | None
    embed: EmbedSpec | None = None

    @property
    def num_warps(self) -> int:
        return min(8, max(1, self.num_cols // (LANES * RUN_COLS)))


@cached_kernel
def sum_kernel(spec: SumSpec) -> KernelFn:
    """fn([x][, h], (parts (S, T, K)[, residual] | inputs[, newest], *planes | x)[, norm_weight]): a threadgroup a row.
    x is written where it is not given, h where a norm is."""

    def kernel(*operands: UOp) -> UOp:
        rest = list(operands)
        x_out = rest.pop(0) if spec.num_parts or spec.embed is not None else None
        h_out = rest.pop(0) if spec.norm_eps is not None else None
        norm_weight = rest.pop() if spec.norm_eps is not None else None
        read = _row_reader(spec, rest)
        body, cols, width = Body(), spec.num_cols, RUN_COLS
        threads = spec.num_warps * LANES
        row, lane, warp = body.grid(spec.num_tokens), body.threads(LANES), warps(body, spec.num_warps)
        axes = axes_of(row, lane, warp)
        thread, num_runs = warp * LANES + lane, cols // width
        runs = [thread + i * threads for i in range(-(-num_runs // threads))]
        inside = [None if (i + 1) * threads <= num_runs else run < num_runs for i, run in enumerate(runs)]
        starts = [(run if ok is None else ok.where(run, 0)) * width for run, ok in zip(runs, inside, strict=True)]
        values = [read(row, start) for start in starts]
        if x_out is not None:
            values = [[value.cast(x_out.dtype).cast(F32) for value in new] for new in values]
        stores = []

        def store(target: UOp, piece: int, new: list[UOp]) -> None:
            for i, value in enumerate(new):
                at, ok = row * cols + starts[piece] + i, inside[piece]
                stores.append(target[at if ok is None else at.valid(ok)].store(value.cast(target.dtype)))

        if x_out is not None:
            for piece, new in enumerate(values):
                store(x_out, piece, new)
        if h_out is not None:
            assert norm_weight is not None and spec.norm_eps is not None
            squares = [
                dot(v, v) if ok is None else ok.where(dot(v, v), 0.0) for v, ok in zip(values, inside, strict=True)
            ]
            total = [spec.lanes.sum(balanced(squares))]
            if spec.num_warps > 1:
                total = _add_warps(body, total, warp, UOp.const(0, dtypes.weakint), spec.num_warps, 1, lane)
            scale = (total[0] * (1.0 / cols) + spec.norm_eps).sqrt().reciprocal()
            for piece, new in enumerate(values):
                weight = load_floats(norm_weight, starts[piece], width)
                store(h_out, piece, [v * scale * w for v, w in zip(new, weight, strict=True)])
        kind = f"sum{spec.num_parts}{'_norm' if h_out is not None else ''}"
        if spec.embed is not None:
            kind = f"embed_{spec.embed.format.name}"
        name = f"{kind}_{spec.num_tokens}x{cols}"
        nbytes = spec.num_tokens * cols * (4 * spec.num_parts + 6)
        return finish(UOp.group(*stores).end(*reversed(axes)), name, nbytes=nbytes)

    return kernel


def _row_reader(spec: SumSpec, operands: list[UOp]) -> Callable[[UOp, UOp], list[UOp]]:
    """A function from a row and a column to RUN_COLS elements of x from there on."""
    size = spec.num_tokens * spec.num_cols

    def read_table(row: UOp, start: UOp) -> list[UOp]:
        embed = spec.embed
        assert embed is not None
        inputs, *planes = operands
        newest = planes.pop(0) if embed.is_fed else None
        token = token_id(inputs[embed.token_offset + row].load(), newest, embed.num_rows)
        table = Planes(embed.format, planes)
        return [table.value(token, start + i, spec.num_cols, "row") for i in range(RUN_COLS)]

    def read_sum(row: UOp, start: UOp) -> list[UOp]:
        source, *residual = await_previous(spec.lanes, *operands)
        at = row * spec.num_cols + start
        parts = [load_floats(source, at + part * size, RUN_COLS) for part in range(max(1, spec.num_parts))]
        new = [balanced(column) for column in zip(*parts, strict=True)]
        for values in residual:
            new = [a + b for a, b in zip(new, load_floats(values, at, RUN_COLS), strict=True)]
        return new

    return read_table if spec.embed is not None else read_sum
