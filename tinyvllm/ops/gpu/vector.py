"""One token row times a matrix that is not quantized: dot products, on devices whose lanes exchange values.

The weights stream from memory straight into registers. K is split between the lanes, and between warps, of a
threadgroup. Quantized matrices come here only if quantized_vector.py does not cover them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

from tinygrad import UOp

from tinyvllm.arrays import Format
from tinyvllm.ops.activation import gated, tanh
from tinyvllm.ops.formats.matrix import PANEL, Planes
from tinyvllm.ops.formats.runs import Run, aligned_planes, group_sums, read_run, run_cols
from tinyvllm.ops.gpu.attention_split import SplitHeads, SplitOperands
from tinyvllm.ops.gpu.chosen import ChosenExperts, ChosenRows
from tinyvllm.ops.gpu.row_sum import add_warps
from tinyvllm.ops.kernel.body import F32, Body, KernelFn, balanced, cached_kernel, finish
from tinyvllm.ops.kernel.cost import H200, Streaming
from tinyvllm.ops.kernel.lanes import (
    LANES,
    SHARED_BYTES,
    Lanes,
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

FEW_ROWS = 4096  # rows that need more warps each to fill a large GPU
VECTOR_COLS = 8  # dense columns of a lane's run: 16 bytes of float16
MAX_WARPS = 16
MAX_LOADS = 16  # runs of weights that a lane loads at once: of float16, 64 of its registers
ROWS, DOWN, ACROSS, AHEAD = (1, 2, 4, 8), (1, 2, 4), (1, 2, 4, 5, 6, 7, 8, 12, 16), (1, 2, 3, 4)
MARGIN = 0.08
# fitted to times on an H200 (ops/kernel/cost.py): registers of a lane besides those of its loads; cycles of a scheduler
# for a load of 8 values and their products, for the norm of x and its weights, for a sum, and at the end
OWN_REGISTERS, MAX_REGISTERS = 54, 255
LOAD_INSTRUCTIONS, NORM_INSTRUCTIONS, SUM_INSTRUCTIONS, END_INSTRUCTIONS = 35.3, 44.8, 8.1, 85.1
Shape = tuple[int, int, int, int]  # see VectorSpec.shape
STAGED_RUN = PANEL + 4  # floats from one run to the next in threadgroup memory: eight lanes' vectors in eight banks


@dataclass(frozen=True)
class NormedSum:
    """x = (residual + scale * RMSNorm(y)) * out_scale: a sum that the next product's kernel computes where it reads
    it."""

    eps: float
    scale: float = 1.0
    has_out_scale: bool = False  # data


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
    has_bias: bool = False  # + bias (N,)
    scale: float = 1.0  # * scale
    has_residual: bool = False  # + residual (N,)
    softcap: float | None = None  # softcap * tanh(y / softcap)
    split: SplitHeads | None = None  # x is attention whose splits are still to be combined
    sum: NormedSum | None = None  # x is a sum that is still to be computed, which the kernel also writes
    # Of a block-diagonal matrix: the rows of a block, which multiply columns of their own of x, and the columns of x
    # from one block's first to the next one's. 0: it is not one
    block_rows: int = 0
    block_stride: int = 0

    @property
    def experts(self) -> ChosenExperts | None:
        """Set if the matrix has an axis of experts: then N is of one, and K of x, which may hold several."""
        return None

    @property
    def matrix_cols(self) -> int:
        """Columns of a row as it is stored."""
        return self.num_cols if self.experts is None else self.experts.num_cols

    @property
    def slots(self) -> int:
        """Experts that have threadgroups of their own."""
        return 1 if self.experts is None or self.experts.adds_up else self.experts.count

    @property
    def out_rows(self) -> int:
        return self.num_rows if self.activation is None else self.num_rows // 2

    def locate(self, chosen: ChosenRows | None, row: UOp, run: UOp, cols: int) -> tuple[UOp, UOp]:
        """(row of the whole matrix, run in it) of a run of `cols` columns of x."""
        return (row, run) if chosen is None else chosen.locate(row, run, cols)

    def gate(self, chosen: ChosenRows | None, gates: list[UOp], ups: list[UOp], rows: Sequence[UOp]) -> list[UOp]:
        """activation(gate) * up of the output's `rows`."""
        assert self.activation is not None
        if chosen is None:
            return gated(self.activation, gates, ups)
        gates = [chosen.biased(value, row) for value, row in zip(gates, rows, strict=True)]
        ups = [chosen.biased(value, row + self.out_rows) for value, row in zip(ups, rows, strict=True)]
        return [chosen.weighted(value) for value in gated(self.activation, gates, ups)]

    def epilogue(self, operands: RowOperands, value: UOp, row: UOp) -> UOp:
        """What follows a row's product, except an activation."""
        if operands.chosen is not None:
            value = operands.chosen.biased(value, row)
        if operands.bias is not None:
            value = value + operands.bias[row].load()
        if self.scale != 1.0:
            value = value * self.scale
        if operands.residual is not None:
            value = value + operands.residual[row].load().cast(F32)
        if self.softcap is not None:
            value = tanh(value * (1.0 / self.softcap), lambda x: x.exp2()) * self.softcap
        return value

    def finish(self, stores: Sequence[UOp], axes: Sequence[UOp]) -> UOp:
        """Close the kernel."""
        return finish(
            UOp.group(*stores).end(*reversed(axes)),
            f"{self.name}_{self.format.name}_{self.slots}x{self.num_rows}x{self.num_cols}",
            ops=2 * self.slots * self.num_rows * self.num_cols,
            nbytes=int(self.slots * self.num_rows * self.num_cols * self.format.code_bits / 8),
        )


@dataclass(frozen=True, kw_only=True)
class RowOperands:
    """The operands of a row's product after the weights, in this order; None for those that it does not have."""

    x: UOp  # of a normed sum: y
    split_sums: UOp | None
    inputs: UOp | None  # the step's, with a split
    sum_residual: UOp | None
    sum_weight: UOp | None  # of the sum's norm
    sum_out_scale: UOp | None
    norm_weight: UOp | None
    bias: UOp | None
    residual: UOp | None
    ids: UOp | None = None  # of the row's experts
    weights: UOp | None = None  # of the row's experts
    expert_bias: UOp | None = None
    chosen: ChosenRows | None = None  # made of these

    @classmethod
    def take(cls, spec: RowProductSpec, rest: list[UOp]) -> RowOperands:
        """The operands at the front of `rest`, which are removed."""

        def take_if(has: bool) -> UOp | None:
            return rest.pop(0) if has else None

        return cls(
            x=rest.pop(0),
            split_sums=take_if(spec.split is not None),
            inputs=take_if(spec.split is not None),
            sum_residual=take_if(spec.sum is not None),
            sum_weight=take_if(spec.sum is not None),
            sum_out_scale=take_if(spec.sum is not None and spec.sum.has_out_scale),
            norm_weight=take_if(spec.norm_eps is not None),
            bias=take_if(spec.has_bias),
            residual=take_if(spec.has_residual),
            ids=take_if(spec.experts is not None),
            weights=take_if(spec.experts is not None),
            expert_bias=take_if(spec.experts is not None and spec.experts.has_bias),
        )

    def awaited(self, lanes: Lanes, ahead: Iterable[UOp]) -> RowOperands:
        """The same, to be read once the previous kernels have ended. `ahead`: as in `await_previous`."""
        written = ("x", "split_sums", "sum_residual", "residual", "ids", "weights")  # by kernels of the step
        given = {name: getattr(self, name) for name in written if getattr(self, name) is not None}
        awaited = await_previous(lanes, *given.values(), ahead=ahead, has_barrier=False)
        return replace(self, **dict(zip(given, awaited, strict=True)))

    def with_experts(self, spec: RowProductSpec, slot: UOp | int) -> RowOperands:
        """The same, once they are awaited, for the threadgroups of one of the row's experts."""
        if spec.experts is None or self.ids is None or self.weights is None:
            return self
        rows = ChosenRows(spec.experts, spec.num_rows, slot, self.ids, self.weights, self.expert_bias)
        return replace(self, chosen=rows)


@dataclass(frozen=True, kw_only=True)
class VectorSpec(RowProductSpec, Tunable):
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
            and self.sum is None
            and self.num_cols % VECTOR_COLS == 0
            and self.num_cols // PANEL * STAGED_RUN * 4 <= SHARED_BYTES // 2
        )

    @property
    def shape(self) -> Shape:
        """(rows, or pairs of gate and up, of a warp; warps along the rows; warps along the columns; runs that a lane
        loads at once): the knobs, or else `rule`."""
        return self.rows, self.down, self.across, self.ahead

    @property
    def rows(self) -> int:
        return self._value("rows", 0)

    @property
    def down(self) -> int:
        return self._value("down", 1)

    @property
    def across(self) -> int:
        return self._value("across", 2)

    @property
    def ahead(self) -> int:
        return self._value("ahead", 3)

    def _value(self, name: str, place: int) -> int:
        return self.knob(name, self.rule[place])

    def knobs(self) -> Mapping[str, tuple[int, ...]]:
        return {"rows": ROWS, "down": DOWN, "across": ACROSS, "ahead": AHEAD}

    def is_possible(self) -> bool:
        rows, down, across, ahead = self.shape
        loads = rows * ahead * (1 if self.activation is None else 2) * (2 if self.format.is_quantized else 1)
        return (
            self.out_rows % (rows * down) == 0
            and self.block_rows % rows == 0
            and down * across <= MAX_WARPS
            and loads <= MAX_LOADS
            and LANES * across * (ahead - 1) < self.num_runs
            and LANES * (across - 1) < self.num_runs
        )

    @property
    def rule(self) -> Shape:
        """The `shape` without knobs. For 16 bits on CUDA, the usual one unless the model of ops/kernel/cost.py rejects
        it, as it does where four warps with four loads divide the columns unevenly."""
        return improve(self._dense, self._usual) if self._is_modeled else self._usual

    @property
    def _is_modeled(self) -> bool:
        """Whether the model's constants are those of such a kernel and device."""
        is_dense = self.format.bits == 16 and not self.format.is_quantized and not self.block_rows
        return is_dense and self.lanes.kind == "CUDA"

    @property
    def _usual(self) -> Shape:
        """Enough bytes in flight by Little's law: two rows with four loads of 16 bytes for each lane, in four warps
        that share the columns, so that few columns are one step, whose loads precede the wait for the previous kernel.
        For few rows, more warps of such a step, which else would be too few to fill the device. For many rows, as in a
        head, four rows share the loads of x and of the norm's weights.

        Quantized runs are longer than a vector load of x, so more rows must share the cost of loading x."""
        passes = -(-self.num_cols // (self.cols * LANES))  # runs of a lane, if one warp had all columns
        if self.block_rows:  # few columns: without warps beside each other there would be thousands of threadgroups
            return 4, 4, 1, min(2, passes)
        if self.format.is_quantized:
            per_warp = 4 if self.activation is not None or self.out_rows <= 4096 else 8
            across = _power_below(min(8, passes))
            return per_warp, max(1, 4 // across), across, 1
        rows = self.out_rows * self.slots
        if rows <= FEW_ROWS and passes <= 8:
            return 4, 2, _power_below(min(4, -(-passes // 2))), min(2, passes)
        if rows <= FEW_ROWS and self.norm_eps is None and passes <= 16:
            return 2, 2, 8, 2
        if rows <= FEW_ROWS * 3 // 4 and self.norm_eps is None:
            return 2, 1, 16, min(4, -(-passes // 16))
        across = _power_below(min(4, passes))
        return (4 if rows > 32768 else 2), 1, across, min(4, -(-passes // across))

    @property
    def _dense(self) -> DenseRow:
        return DenseRow(
            out_rows=self.out_rows,
            num_cols=self.num_cols,
            slots=self.slots,
            is_gated=self.activation is not None,
            is_normed=self.norm_eps is not None,
            may_begin_early=self.experts is None,
        )

    @property
    def predicted_s(self) -> float | None:
        return self._dense.work(self.shape).seconds(H200) if self._is_modeled else None


@dataclass(frozen=True, kw_only=True)
class ExpertVectorSpec(VectorSpec):
    """The same of a row's experts."""

    chosen_experts: ChosenExperts

    @property
    def experts(self) -> ChosenExperts:
        return self.chosen_experts

    @property
    def rule(self) -> Shape:
        """Experts that are added up have long rows: with more rows of a warp, threadgroups read less of x. Six warps of
        four runs take 13 % less than sixteen of two (NVIDIA H200, 2,048 rows of 6,144 columns)."""
        passes = -(-self.num_cols // (self.cols * LANES))
        if not self.chosen_experts.adds_up or self.format.is_quantized or passes < 24:
            return super().rule
        across = next(count for count in (6, 5, 4, 7, 8) if passes % (count * 4) == 0 or count == 8)
        return 4, 1, across, 4


@dataclass(frozen=True)
class DenseRow:
    """One row's product with a matrix of 16-bit values, as far as its time depends on it."""

    out_rows: int
    num_cols: int
    slots: int  # matrices with threadgroups of their own
    is_gated: bool
    is_normed: bool
    may_begin_early: bool  # which matrix it is does not depend on the previous kernel

    def work(self, shape: Shape) -> Streaming:
        """The kernel's work in a shape."""
        rows, down, across, ahead = shape
        sums = rows * (2 if self.is_gated else 1)
        loads, steps = sums * ahead, -(-self.num_cols // (VECTOR_COLS * LANES * across * ahead))
        step = loads * LOAD_INSTRUCTIONS + (ahead * NORM_INSTRUCTIONS if self.is_normed else 0)
        return Streaming(
            nbytes=self.slots * self.out_rows * (2 if self.is_gated else 1) * self.num_cols * 2,
            groups=self.slots * self.out_rows // (rows * down),
            warps=down * across,
            registers=min(MAX_REGISTERS, OWN_REGISTERS + 4 * loads),
            steps=steps,
            loads=loads,
            instructions=steps * step + sums * SUM_INSTRUCTIONS + END_INSTRUCTIONS,
            begins_early=steps == 1 and self.may_begin_early,
        )

    def allows(self, shape: Shape) -> bool:
        """Whether a kernel in this shape has whole warps, registers for its loads, and loads for its warps."""
        rows, down, across, ahead = shape
        passes = -(-self.num_cols // (VECTOR_COLS * LANES))
        loads = rows * ahead * (2 if self.is_gated else 1)
        fits = down * across <= MAX_WARPS and loads <= MAX_LOADS and self.out_rows % (rows * down) == 0
        return fits and across * (ahead - 1) < passes and across <= passes


@cache
def improve(product: DenseRow, usual: Shape) -> Shape:
    """The usual shape; or the shape with one value changed that is predicted to take the least time on an H200, if that
    is MARGIN less: predictions of two shapes of a product differ from measured times by 5 %."""

    def seconds(shape: Shape) -> float:
        return product.work(shape).seconds(H200)

    rows, down, across, ahead = usual
    turned: list[Shape] = [
        *((count, down, across, ahead) for count in ROWS),
        *((rows, count, across, ahead) for count in DOWN),
        *((rows, down, 1 << power, ahead) for power in range(5)),
        *((rows, down, across, count) for count in AHEAD),
    ]
    best = min(filter(product.allows, turned), key=seconds, default=usual)
    return best if seconds(best) < (1 - MARGIN) * seconds(usual) else usual


def _power_below(value: int) -> int:
    """The largest power of two up to `value`."""
    return 1 << (value.bit_length() - 1)


@cached_kernel
def vector_kernel(spec: VectorSpec) -> KernelFn:
    """fn(out[, x out], *planes, *RowOperands)."""

    def kernel(out: UOp, *rest: UOp) -> UOp:
        buffers = list(rest)
        x_out = buffers.pop(0) if spec.sum is not None else None
        own = [buffers.pop(0) for _ in range(Planes.count(spec.format))]
        planes = aligned_planes(spec.format, own, spec.lanes.kind)
        operands, place = RowOperands.take(spec, buffers), _make_place(spec)
        loads = _Loads(spec, place, planes, operands)
        only = loads.runs(0) if spec.steps == 1 and spec.experts is None else []
        x = _Input(spec, place, operands, [value for run in only for value in run.values])
        loads = replace(loads, operands=x.operands)

        def step(iteration: UOp | int, old: list[UOp]) -> list[UOp]:
            return _add_runs(spec, only or loads.runs(iteration), x, iteration, old)

        totals = carry(place.body, zeros(_num_sums(spec, place)), spec.steps, place.axes, step)
        totals = _add_columns(spec, totals, place)
        stores = []
        if x_out is not None:
            totals, factor = _join_sums(spec, totals, len(place.rows))
            stores = _store_sum(spec, place, x, factor, x_out)
            if operands.sum_out_scale is not None:
                out_scale = operands.sum_out_scale[0].load()
                rows = len(place.rows)
                totals = [total * out_scale for total in totals[:rows]] + [
                    square * out_scale * out_scale for square in totals[rows:]
                ]
        results = _finish_rows(spec, totals, x, place)
        stores += [
            out[x.target(row).valid(place.is_first)].store(value.cast(out.dtype))
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
    slot: UOp | int  # which of the row's experts
    group: UOp  # the threadgroup's number
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
    slot = grid(body, spec.slots)
    group, lane = body.grid(spec.out_rows // (count * down)), body.threads(LANES)
    column_warp, row_warp = warps(body, across), warps(body, down)
    first = (group * down + row_warp) * count
    rows = [first + i for i in range(count)]
    if spec.activation is not None:
        rows += [row + spec.out_rows for row in rows]
    axes = axes_of(slot, group, lane, column_warp, row_warp)
    return _Place(body, across, down, rows, axes, slot, group, lane, column_warp, row_warp)


# -- loading -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _LoadedRun:
    """A lane's run: the weights of each row, the norm's weights unless they are staged, and those of a sum's norm."""

    number: UOp
    is_inside: UOp | None  # whether the run exists; None: all do
    weights: list[Run]
    norms: list[UOp]
    sum_norms: list[UOp]

    @property
    def values(self) -> list[UOp]:
        return [value for weight in self.weights for value in weight.loaded] + self.norms + self.sum_norms


@dataclass(frozen=True)
class _Loads:
    """A lane's loads of weights."""

    spec: VectorSpec
    place: _Place
    planes: Planes
    operands: RowOperands

    def runs(self, iteration: UOp | int) -> list[_LoadedRun]:
        """The runs of an iteration, all loaded before any is used: as many loads in flight as there are registers."""
        spec, place, loaded = self.spec, self.place, []
        _, _, across, ahead = spec.shape
        for i in range(ahead):
            wanted = ((iteration * ahead + i) * across + place.column_warp) * LANES + place.lane
            is_inside = wanted < spec.num_runs if spec.num_runs % (LANES * across * ahead) else None
            run = wanted if is_inside is None else is_inside.where(wanted, 0)
            places = [spec.locate(self.operands.chosen, row, run, spec.cols) for row in place.rows]
            weights = [read_run(self.planes, *at, spec.matrix_cols, spec.cols) for at in places]
            norm_weight = None if spec.is_staged else self.operands.norm_weight
            norms, sum_norms = (
                [] if weight is None else load_floats(weight, run * spec.cols, spec.cols)
                for weight in (norm_weight, self.operands.sum_weight)
            )
            loaded.append(_LoadedRun(run, is_inside, weights, norms, sum_norms))
        return loaded


class _Input:
    """x: in a buffer, in the splits of an attention, or staged in threadgroup memory; and the residual."""

    def __init__(self, spec: VectorSpec, place: _Place, operands: RowOperands, ahead: Sequence[UOp]) -> None:
        """Waits for the previous kernels, and loads `ahead` meanwhile."""
        self.spec, self.place, self.split = spec, place, None
        self.operands = operands.awaited(spec.lanes, ahead).with_experts(spec, place.slot)
        self.x, sums, inputs = self.operands.x, self.operands.split_sums, self.operands.inputs
        if spec.split is not None and sums is not None and inputs is not None:
            self.split = SplitOperands(spec.split, self.x, sums, inputs)
        self.staged = self.squares = None  # `squares`: the sum of x's squares
        if spec.is_staged:
            assert operands.norm_weight is not None
            self.staged, self.squares = _stage(place, spec, self.x, operands.norm_weight)

    def read(self, run: _LoadedRun, iteration: UOp | int) -> list[UOp]:
        """The columns of a run, 0 outside the matrix."""
        start, cols = run.number * self.spec.cols, self.spec.cols
        if self.spec.block_rows:  # all rows of a warp are in one block
            start = start + self.place.rows[0] // self.spec.block_rows * self.spec.block_stride
        if self.split is not None:
            values = self.split.read(self.place.body, start, cols, [*self.place.axes, *axes_of(iteration)])
        elif self.staged is not None:
            values = load_floats(self.staged, run.number * STAGED_RUN, cols)
        else:
            values = load_floats(self.x, start, cols)
        return _inside(run, values)

    def target(self, row: UOp) -> UOp:
        """The place of a row's result."""
        chosen = self.operands.chosen
        return row if chosen is None else chosen.target(row, self.spec.out_rows)

    def read_residual(self, run: _LoadedRun) -> list[UOp]:
        """The same of a sum's residual."""
        assert self.operands.sum_residual is not None
        return _inside(run, load_floats(self.operands.sum_residual, run.number * self.spec.cols, self.spec.cols))


def _inside(run: _LoadedRun, values: list[UOp]) -> list[UOp]:
    """0 for the values of a run that does not exist."""
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


def _num_sums(spec: VectorSpec, place: _Place) -> int:
    """A lane's sums: see `_add_runs` and `_add_sum_run`."""
    if spec.sum is not None:
        return 2 * len(place.rows) + 4
    return len(place.rows) + (spec.norm_eps is not None and not spec.is_staged)


def _add_runs(spec: VectorSpec, runs: list[_LoadedRun], x: _Input, iteration: UOp | int, old: list[UOp]) -> list[UOp]:
    """The lane's sums after some runs: one for each row, and that of x's squares if it is normed without staging."""
    new = list(old)
    for run in runs:
        values = x.read(run, iteration)
        if spec.sum is not None:
            new = _add_sum_run(spec, run, x.read_residual(run), values, new)
            continue
        if run.norms:
            new[-1] = new[-1] + dot(values, values)
            values = [v * w for v, w in zip(values, run.norms, strict=True)]
        sums = group_sums(spec.format, values)
        for i, weight in enumerate(run.weights):
            new[i] = new[i] + weight.dot(values, sums)
    return new


def _add_sum_run(spec: VectorSpec, run: _LoadedRun, r: list[UOp], y: list[UOp], old: list[UOp]) -> list[UOp]:
    """The lane's sums after a run of x = r + s * u, u = y * weight, whose factor s depends on all of y: those of each
    row with r, then with u, and the sums of y * y, r * r, r * u and u * u."""
    u = [a * b for a, b in zip(y, run.sum_norms, strict=True)]
    squares = [dot(y, y), dot(r, r), dot(r, u), dot(u, u)]
    if run.norms:
        r, u = ([v * w for v, w in zip(values, run.norms, strict=True)] for values in (r, u))
    rows = []
    for values in (r, u):
        sums = group_sums(spec.format, values)
        rows += [weight.dot(values, sums) for weight in run.weights]
    return [a + b for a, b in zip(old, [*rows, *squares], strict=True)]


def _join_sums(spec: VectorSpec, totals: list[UOp], num_rows: int) -> tuple[list[UOp], UOp]:
    """(the rows' sums with x, and with a norm that of x's squares; the factor s), from those of `_add_sum_run`."""
    assert spec.sum is not None
    yy, rr, ru, uu = totals[2 * num_rows :]
    factor = (yy * (1.0 / spec.num_cols) + spec.sum.eps).sqrt().reciprocal() * spec.sum.scale
    rows = [totals[i] + factor * totals[num_rows + i] for i in range(num_rows)]
    squares = rr + factor * (ru * 2.0 + factor * uu)
    return rows + ([] if spec.norm_eps is None else [squares]), factor


def _store_sum(spec: VectorSpec, place: _Place, x: _Input, factor: UOp, out: UOp) -> list[UOp]:
    """Stores of the threadgroup's share of x = (residual + factor * y * weight) * out_scale."""
    residual, weight = x.operands.sum_residual, x.operands.sum_weight
    assert residual is not None and weight is not None
    threads, groups = place.down * place.across * LANES, spec.out_rows // (spec.shape[0] * place.down)
    share, stores = -(-spec.num_cols // groups), []
    for start in range(0, share, threads):
        index = start + place.warp * LANES + place.lane
        col = place.group * share + index
        is_own = (index < share) & (col < spec.num_cols)
        at = is_own.where(col, 0)
        value = residual[at].load().cast(F32) + factor * (x.x[at].load().cast(F32) * weight[at].load())
        if x.operands.sum_out_scale is not None:
            value = value * x.operands.sum_out_scale[0].load()
        stores.append(out[at.valid(is_own)].store(value.cast(out.dtype)))
    return stores


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
        return spec.gate(x.operands.chosen, totals[:half], totals[half:], place.rows[:half])
    return [spec.epilogue(x.operands, total, row) for total, row in zip(totals, place.rows, strict=True)]
