"""One token row times a matrix that is not quantized: dot products, on devices whose lanes exchange values.

The weights stream from memory straight into registers. K is split between the lanes, and between warps, of a
threadgroup. Quantized matrices come here only if quantized_vector.py does not cover them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tinygrad import UOp

from tinyvllm.arrays import Format
from tinyvllm.ops.activation import gated
from tinyvllm.ops.formats.matrix import PANEL, Planes
from tinyvllm.ops.formats.runs import Run, group_sums, read_run, run_cols
from tinyvllm.ops.gpu.attention_split import SplitHeads, SplitOperands
from tinyvllm.ops.gpu.row_sum import add_warps
from tinyvllm.ops.kernel.body import F32, Body, KernelFn, balanced, cached_kernel, finish
from tinyvllm.ops.kernel.lanes import (
    LANES,
    SHARED_BYTES,
    Lanes,
    await_previous,
    axes_of,
    carry,
    dot,
    load_floats,
    warps,
    zeros,
)

VECTOR_COLS = 8  # dense columns of a lane's run: 16 bytes of float16
STAGED_RUN = PANEL + 4  # floats from one run to the next in threadgroup memory: eight lanes' vectors in eight banks


@dataclass(frozen=True, kw_only=True)
class RowProductSpec:
    """out (N,) = epilogue(norm(x) (K,) @ w.T), of one token row. Hashable: the key of its kernel."""

    name: str
    lanes: Lanes
    format: Format
    num_rows: int  # N of the matrix
    num_cols: int  # K
    norm_eps: float | None = None  # of an RMSNorm of x, inside the kernel
    activation: str | None = None  # rows n and n + N / 2 are gate and up: out = activation(gate) * up
    has_residual: bool = False  # + residual (N,)
    split: SplitHeads | None = None  # x is attention whose splits are still to be combined

    @property
    def out_rows(self) -> int:
        return self.num_rows if self.activation is None else self.num_rows // 2

    def finish(self, stores: Sequence[UOp], axes: Sequence[UOp]) -> UOp:
        """Close the kernel."""
        return finish(
            UOp.group(*stores).end(*reversed(axes)),
            f"{self.name}_{self.format.name}_1x{self.num_rows}x{self.num_cols}",
            ops=2 * self.num_rows * self.num_cols,
            nbytes=self.num_rows * self.num_cols * self.format.bits // 8,
        )


@dataclass(frozen=True, kw_only=True)
class VectorSpec(RowProductSpec):
    """A product by dot products."""

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
    def is_staged(self) -> bool:
        """Whether a threadgroup first puts x * norm weight into its memory, and reads it there by runs. A quantized run
        has 32 columns: lanes that read those from main memory touch 32 lines at once, which costs more than the
        codes."""
        return (
            self.format.is_quantized
            and self.norm_eps is not None
            and self.num_cols % VECTOR_COLS == 0
            and self.num_cols // PANEL * STAGED_RUN * 4 <= SHARED_BYTES // 2
        )

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(rows, or pairs of gate and up, of a warp; warps along the rows; warps along the columns; runs that a lane
        loads at once).

        Measured on an H200 for float16: 16 to 32 loads of 16 bytes in flight for each of 8 to 16 warps use all of its
        bandwidth. Quantized runs are longer than a vector load of x, so more rows must share the cost of loading x."""
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
    """The largest power of two up to `value`."""
    return 1 << (value.bit_length() - 1)


@cached_kernel
def vector_kernel(spec: VectorSpec) -> KernelFn:
    """fn(out, *planes, x[, split sums, inputs][, norm weight][, residual])."""

    def kernel(out: UOp, *rest: UOp) -> UOp:
        operands = list(rest)
        planes = Planes(spec.format, [operands.pop(0) for _ in range(Planes.count(spec.format))])
        place = _make_place(spec)
        norm_weight = operands.pop(1 if spec.split is None else 3) if spec.norm_eps is not None else None
        loads = _Loads(spec, place, planes, norm_weight)
        only = loads.runs(0) if spec.steps == 1 else []
        x = _Input(spec, place, operands, norm_weight, [value for run in only for value in run.values])

        def step(iteration: UOp | int, old: list[UOp]) -> list[UOp]:
            return _add_runs(spec, only or loads.runs(iteration), x, iteration, old)

        count = len(place.rows) + (norm_weight is not None and not spec.is_staged)
        totals = carry(place.body, zeros(count), spec.steps, place.axes, step)
        results = _finish_rows(spec, _add_columns(spec, totals, place), x, place)
        stores = [
            out[row.valid(place.is_first)].store(value.cast(out.dtype))
            for row, value in zip(place.rows, results, strict=False)  # of gate and up, gate's rows
        ]
        return spec.finish(stores, place.axes)

    return kernel


@dataclass(frozen=True)
class _Place:
    """A thread's place. `rows`: those of its warp, gate's before up's; a warp axis of length 1 is the constant 0."""

    body: Body
    across: int  # warps along the columns
    down: int  # warps along the rows
    rows: list[UOp]
    axes: tuple[UOp, ...]
    lane: UOp
    column_warp: UOp | int
    row_warp: UOp | int

    @property
    def warp(self) -> UOp | int:
        """The warp's number in the threadgroup."""
        return self.row_warp * self.across + self.column_warp

    @property
    def is_first(self) -> UOp:
        """Whether this is the one thread that writes the rows' results."""
        return self.lane.eq(0) & self.column_warp.eq(0) if isinstance(self.column_warp, UOp) else self.lane.eq(0)


def _make_place(spec: VectorSpec) -> _Place:
    body = Body()
    count, down, across, _ = spec.shape
    group, lane = body.grid(spec.out_rows // (count * down)), body.threads(LANES)
    column_warp, row_warp = warps(body, across), warps(body, down)
    first = (group * down + row_warp) * count
    rows = [first + i for i in range(count)]
    if spec.activation is not None:
        rows += [row + spec.out_rows for row in rows]
    return _Place(body, across, down, rows, axes_of(group, lane, column_warp, row_warp), lane, column_warp, row_warp)


# -- loading -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _LoadedRun:
    """A lane's run: the weights of each row, and the norm's weights unless they are staged."""

    number: UOp
    is_inside: UOp | None  # whether the run exists; None: all do
    weights: list[Run]
    norms: list[UOp]

    @property
    def values(self) -> list[UOp]:
        factors = [value for weight in self.weights for pair in weight.factors for value in pair]
        return [value for weight in self.weights for value in weight.floats] + factors + self.norms


@dataclass(frozen=True)
class _Loads:
    """A lane's loads of weights."""

    spec: VectorSpec
    place: _Place
    planes: Planes
    norm_weight: UOp | None

    def runs(self, iteration: UOp | int) -> list[_LoadedRun]:
        """The runs of an iteration, all loaded before any is used: as many loads in flight as there are registers."""
        spec, place, loaded = self.spec, self.place, []
        _, _, across, ahead = spec.shape
        for i in range(ahead):
            wanted = ((iteration * ahead + i) * across + place.column_warp) * LANES + place.lane
            is_inside = wanted < spec.num_runs if spec.num_runs % (LANES * across * ahead) else None
            run = wanted if is_inside is None else is_inside.where(wanted, 0)
            weights = [read_run(self.planes, row, run, spec.num_cols, spec.cols) for row in place.rows]
            norms = []
            if self.norm_weight is not None and not spec.is_staged:
                norms = load_floats(self.norm_weight, run * spec.cols, spec.cols)
            loaded.append(_LoadedRun(run, is_inside, weights, norms))
        return loaded


class _Input:
    """x: in a buffer, in the splits of an attention, or staged in threadgroup memory; and the residual."""

    def __init__(
        self, spec: VectorSpec, place: _Place, operands: list[UOp], norm_weight: UOp | None, ahead: Sequence[UOp]
    ) -> None:
        """Waits for the previous kernels, and loads `ahead` meanwhile. `operands`: those after the planes, without the
        norm's weight."""
        self.spec, self.place, self.split = spec, place, None
        inputs = operands.pop(2) if spec.split is not None else None
        self.x, *rest = await_previous(spec.lanes, *operands, ahead=ahead)
        if spec.split is not None and inputs is not None:
            self.split = SplitOperands(spec.split, self.x, rest.pop(0), inputs)
        self.residual = rest.pop() if rest else None
        self.staged = self.squares = None  # `squares`: the sum of x's squares
        if spec.is_staged:
            assert norm_weight is not None
            self.staged, self.squares = _stage(place, spec, self.x, norm_weight)

    def read(self, run: _LoadedRun, iteration: UOp | int) -> list[UOp]:
        """The columns of a run, 0 outside the matrix."""
        start, cols = run.number * self.spec.cols, self.spec.cols
        if self.split is not None:
            values = self.split.read(self.place.body, start, cols, [*self.place.axes, *axes_of(iteration)])
        elif self.staged is not None:
            values = load_floats(self.staged, run.number * STAGED_RUN, cols)
        else:
            values = load_floats(self.x, start, cols)
        inside = run.is_inside
        return values if inside is None else [inside.where(value, 0.0) for value in values]


def _stage(place: _Place, spec: VectorSpec, x: UOp, norm_weight: UOp) -> tuple[UOp, UOp]:
    """x * norm weight in threadgroup memory, run by run, and the sum of x's squares, in every thread."""
    body, num_warps, thread = place.body, place.down * place.across, place.warp * LANES + place.lane
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


# -- computing and finishing -------------------------------------------------------------------------------------------


def _add_runs(spec: VectorSpec, runs: list[_LoadedRun], x: _Input, iteration: UOp | int, old: list[UOp]) -> list[UOp]:
    """The lane's sums after some runs: one for each row, and that of x's squares if it is normed without staging."""
    new = list(old)
    for run in runs:
        values = x.read(run, iteration)
        if run.norms:
            new[-1] = new[-1] + dot(values, values)
            values = [v * w for v, w in zip(values, run.norms, strict=True)]
        sums = group_sums(spec.format, values)
        for i, weight in enumerate(run.weights):
            new[i] = new[i] + weight.dot(values, sums)
    return new


def _add_columns(spec: VectorSpec, totals: list[UOp], place: _Place) -> list[UOp]:
    """The lanes' sums added up, over the lanes and the warps along the columns."""
    totals = [spec.lanes.sum(total) for total in totals]
    if place.across == 1:
        return totals
    first = place.row_warp * place.across
    return add_warps(place.body, totals, place.warp, first, place.across, place.down, place.lane)


def _finish_rows(spec: VectorSpec, totals: list[UOp], x: _Input, place: _Place) -> list[UOp]:
    """The norm's scale and the epilogue. Without staging, a norm's last total is the sum of x's squares."""
    if spec.norm_eps is not None:
        *totals, squares = totals if x.squares is None else [*totals, x.squares]
        scale = (squares * (1.0 / spec.num_cols) + spec.norm_eps).sqrt().reciprocal()
        totals = [total * scale for total in totals]
    if spec.activation is not None:
        half = len(totals) // 2
        return gated(spec.activation, totals[:half], totals[half:])
    if x.residual is not None:
        return [total + x.residual[row].load().cast(F32) for total, row in zip(totals, place.rows, strict=True)]
    return totals
