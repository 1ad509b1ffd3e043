"""What happens between products of several rows: the sum of split-K partial products, the epilogue and the RMSNorm.

One kernel (`sum_kernel`) does all of it in one pass over a row. It can also read its rows from an embedding table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tinygrad import UOp, dtypes

from tinyvllm.arrays import Format
from tinyvllm.ops.activation import tanh
from tinyvllm.ops.formats.matrix import Planes
from tinyvllm.ops.gpu.token_order import token_places
from tinyvllm.ops.kernel.body import F32, Body, KernelFn, balanced, bits_of_bfloat, cached_kernel, finish
from tinyvllm.ops.kernel.lanes import LANES, Lanes, await_previous, axes_of, dot, load_floats, warps
from tinyvllm.ops.sampling.token_ids import token_id

RUN_COLS, FEW_COLS = 8, 4  # columns that a thread reads at once; where kernels are chained


@dataclass(frozen=True)
class EmbedSpec:
    """Rows of an embedding table, by the step's token ids."""

    format: Format
    num_rows: int
    token_offset: int  # of the ids in the step's inputs
    is_fed: bool  # ids below 0 name rows of the previous step's output
    scale: float = 1.0


@dataclass(frozen=True)
class SumSpec:
    """x (T, K) = the epilogue of the sum of S partial products, or rows of an embedding table, or given; and optionally
    h = RMSNorm(x)."""

    lanes: Lanes
    num_tokens: int  # T
    num_cols: int  # K
    num_partials: int  # S; 0: x is given, or read from a table
    has_residual: bool
    norm_eps: float | None
    embed: EmbedSpec | None = None
    has_bias: bool = False
    post_norm_eps: float | None = None  # of an RMSNorm of the sum, before the residual
    scale: float = 1.0  # of the sum, after its norm
    has_out_scale: bool = False  # of what the residual has been added to: data
    softcap: float | None = None
    is_weighted: bool = False  # the partial products are (T, S, K), of S experts of each token, and have weights (T, S)
    has_bfloat_bits: bool = False  # the partial products are bfloat16, in a float16 buffer
    rounds_norm: bool = False  # so is h
    orders_norm: bool = False  # h is in the order of token_order.py
    factor: float = 1.0  # what the partial products were multiplied by

    @property
    def run_cols(self) -> int:
        """Columns that a thread reads at once. In a chain everything waits for this kernel, so its loads must all be
        in flight at once: the compiler uses the first ones before it issues the seventh."""
        return FEW_COLS if self.lanes.is_chained else RUN_COLS

    @property
    def num_warps(self) -> int:
        most = 32 if self.lanes.is_chained else 16 if self.num_tokens == 1 else 8
        return min(most, max(1, self.num_cols // (LANES * self.run_cols)))


@cached_kernel
def sum_kernel(spec: SumSpec) -> KernelFn:
    """fn([x][, h], SOURCE[, norm weight]): a threadgroup for each row. Writes x unless it is given, and h if there is a
    norm. SOURCE: partials (S, T, K)[, residual][, bias][, post-norm weight][, out scale][, weights], or
    inputs[, previous_output], *planes, or x."""

    def kernel(*operands: UOp) -> UOp:
        rest = list(operands)
        x_out = rest.pop(0) if spec.num_partials or spec.embed is not None else None
        h_out = rest.pop(0) if spec.norm_eps is not None else None
        norm_weight = rest.pop() if spec.norm_eps is not None else None
        row = _SumRow(spec, rest, norm_weight)
        values = row.values()
        if x_out is not None:
            values = [[value.cast(x_out.dtype).cast(F32) for value in new] for new in values]
        stores = [] if x_out is None else row.stores(x_out, values)
        if h_out is not None:
            assert norm_weight is not None and spec.norm_eps is not None
            normed = row.normed(values, norm_weight, spec.norm_eps)
            if spec.rounds_norm:
                normed = [[bits_of_bfloat(value) for value in new] for new in normed]
            stores += row.stores(h_out, normed, is_ordered=spec.orders_norm)
        kind = f"sum{spec.num_partials}{'_norm' if h_out is not None else ''}"
        if spec.embed is not None:
            kind = f"embed_{spec.embed.format.name}"
        name = f"{kind}_{spec.num_tokens}x{spec.num_cols}"
        nbytes = spec.num_tokens * spec.num_cols * (4 * spec.num_partials + 6)
        return finish(UOp.group(*stores).end(*reversed(row.axes)), name, nbytes=nbytes)

    return kernel


class _SumRow:
    """A threadgroup's row of x. Each thread holds some runs of consecutive values; `inside`: for each, whether it
    exists; None: always."""

    def __init__(self, spec: SumSpec, operands: list[UOp], norm_weight: UOp | None) -> None:
        """`operands`: those between the outputs and the last norm's weight."""
        self.spec, self.body, self.norm_weight = spec, Body(), norm_weight
        self.weights = operands.pop() if spec.is_weighted else None
        self.out_scale = operands.pop() if spec.has_out_scale else None
        self.post_weight = operands.pop() if spec.post_norm_eps is not None else None
        self.bias = operands.pop() if spec.has_bias else None
        self.operands = operands
        threads = spec.num_warps * LANES
        self.row, self.lane = self.body.grid(spec.num_tokens), self.body.threads(LANES)
        self.warp = warps(self.body, spec.num_warps)
        self.axes = axes_of(self.row, self.lane, self.warp)
        thread, num_runs = self.warp * LANES + self.lane, spec.num_cols // spec.run_cols
        runs = [thread + i * threads for i in range(-(-num_runs // threads))]
        self.inside = [None if (i + 1) * threads <= num_runs else run < num_runs for i, run in enumerate(runs)]
        self.starts = [
            (run if ok is None else ok.where(run, 0)) * spec.run_cols for run, ok in zip(runs, self.inside, strict=True)
        ]

    def values(self) -> list[list[UOp]]:
        """The thread's runs of x, in float32."""
        if self.spec.embed is not None:
            return [self._read_table(self.spec.embed, start) for start in self.starts]
        weights = [] if self.weights is None else [self.weights]
        constants = [buffer for buffer in (self.norm_weight, self.post_weight, self.bias) if buffer is not None]
        ahead = [value for buffer in constants for start in self.starts for value in self._floats(buffer, start)]
        source, *residual = await_previous(self.spec.lanes, *self.operands, *weights, ahead=ahead)
        if self.weights is not None:
            self.weights = residual.pop()
        values = [self._read_sum(source, start) for start in self.starts]
        if self.post_weight is not None and self.spec.post_norm_eps is not None:
            values = self.normed(values, self.post_weight, self.spec.post_norm_eps)
        return [self._finished(new, start, residual) for new, start in zip(values, self.starts, strict=True)]

    def _read_table(self, embed: EmbedSpec, start: UOp) -> list[UOp]:
        inputs, *planes = self.operands
        previous = planes.pop(0) if embed.is_fed else None
        token = token_id(inputs[embed.token_offset + self.row].load(), previous, embed.num_rows)
        table = Planes(embed.format, planes)
        values = [table.value(token, start + i, self.spec.num_cols, "row") for i in range(self.spec.run_cols)]
        return values if embed.scale == 1.0 else [value * embed.scale for value in values]

    def _read_sum(self, source: UOp, start: UOp) -> list[UOp]:
        spec, count = self.spec, max(1, self.spec.num_partials)
        at, size = self.row * spec.num_cols + start, spec.num_tokens * spec.num_cols
        if self.weights is None:
            partials = [self._load(source, at + s * size) for s in range(count)]
        else:
            rows = [self.row * count + s for s in range(count)]
            weights = [self.weights[row].load() for row in rows]
            values = [self._load(source, row * spec.num_cols + start) for row in rows]
            partials = [[value * w for value in new] for new, w in zip(values, weights, strict=True)]
        new = [balanced(column) for column in zip(*partials, strict=True)]
        if spec.factor != 1.0:
            new = [value * (1.0 / spec.factor) for value in new]
        if self.bias is None:
            return new
        return [a + b for a, b in zip(new, self._floats(self.bias, start), strict=True)]

    def _floats(self, buffer: UOp, at: UOp) -> list[UOp]:
        """A run of a buffer."""
        return load_floats(buffer, at, self.spec.run_cols)

    def _load(self, source: UOp, at: UOp) -> list[UOp]:
        """A run of the partial products."""
        if not self.spec.has_bfloat_bits:
            return self._floats(source, at)
        return [source[at + i].load().bitcast(dtypes.bfloat16).cast(F32) for i in range(self.spec.run_cols)]

    def _finished(self, new: list[UOp], start: UOp, residual: Sequence[UOp]) -> list[UOp]:
        spec = self.spec
        if spec.scale != 1.0:
            new = [value * spec.scale for value in new]
        for values in residual:
            at = self.row * spec.num_cols + start
            new = [a + b for a, b in zip(new, self._floats(values, at), strict=True)]
        if self.out_scale is not None:
            new = [value * self.out_scale[0].load() for value in new]
        if spec.softcap is None:
            return new
        return [tanh(value * (1.0 / spec.softcap), lambda x: x.exp2()) * spec.softcap for value in new]

    def normed(self, values: list[list[UOp]], weight: UOp, eps: float) -> list[list[UOp]]:
        """The RMSNorm of the row. Reads `weight` (K,)."""
        squares = [
            dot(v, v) if ok is None else ok.where(dot(v, v), 0.0) for v, ok in zip(values, self.inside, strict=True)
        ]
        spec = self.spec
        total = [spec.lanes.sum(balanced(squares))]
        if spec.num_warps > 1:
            zero = UOp.const(0, dtypes.weakint)
            total = add_warps(self.body, total, self.warp, zero, spec.num_warps, 1, self.lane)
        scale = (total[0] * (1.0 / spec.num_cols) + eps).sqrt().reciprocal()
        weights = [self._floats(weight, start) for start in self.starts]
        return [[v * scale * w for v, w in zip(new, ws, strict=True)] for new, ws in zip(values, weights, strict=True)]

    def stores(self, target: UOp, values: list[list[UOp]], *, is_ordered: bool = False) -> list[UOp]:
        stores, cols = [], self.spec.num_cols
        for new, start, ok in zip(values, self.starts, self.inside, strict=True):
            places = [self.row * cols + start + i for i in range(len(new))]
            if is_ordered:
                places = token_places(self.row, start, len(new), self.spec.num_tokens)
            for at, value in zip(places, new, strict=True):
                stores.append(target[at if ok is None else at.valid(ok)].store(value.cast(target.dtype)))
        return stores


def add_warps(body: Body, totals: list[UOp], warp: UOp, first: UOp, across: int, down: int, lane: UOp) -> list[UOp]:
    """Each of `totals` summed over the warps [first, first + across), in every thread. `warp`: the thread's own, of
    `down` * `across`; the totals must be equal in a warp's lanes."""
    count = len(totals)
    shared = body.shared(down * across * count)
    is_first = lane.eq(0)
    stores = [shared[(warp * count + i).valid(is_first)].store(total) for i, total in enumerate(totals)]
    shared = shared.after(UOp.group(*stores))
    return [balanced(shared[(first + w) * count + i].load() for w in range(across)) for i in range(count)]
