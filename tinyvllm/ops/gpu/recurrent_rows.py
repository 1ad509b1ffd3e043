"""What all forms of recurrent layers on GPUs share: where they find their operands, and the kernels that handle rows on
their own, before the recurrence (convolution, norms of queries and keys, gates) and after it (norm, gate).
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence as Many
from dataclasses import dataclass
from math import gcd

from tinygrad import Tensor, UOp, dtypes
from tinygrad.dtype import DType

from tinyvllm.ops.activation import LOG2E
from tinyvllm.ops.backend import Step
from tinyvllm.ops.kernel.body import F32, Body, KernelFn, balanced, cached_kernel, clamp, empty, finish, run_kernel
from tinyvllm.ops.kernel.lanes import LANES, Lanes, axes_of, dot, grid, warps
from tinyvllm.ops.kernel.tiles import quick_division
from tinyvllm.ops.recurrent_spec import (
    BETAS,
    DECAYS,
    GATES,
    KEYS,
    QUERIES,
    UNIT_EPS,
    VALUES,
    RecurrentLayer,
    RecurrentSpec,
    Sequence,
    decay_exponent,
    sequence_of,
)

VECTOR = 4  # values of a load: the widest vector of all devices
STATE_THREADS = 32  # of a threadgroup whose threads hold whole columns of the state


@dataclass(frozen=True, kw_only=True)
class GpuRecurrentSpec(RecurrentSpec):
    """`partials`: the number of partial products whose sum each part of the projections is. `lanes`: None on devices
    whose threads exchange values through threadgroup memory only."""

    partials: tuple[int, ...]
    lanes: Lanes | None = None

    @property
    def unit_cols(self) -> int:
        """Columns of `units`: queries, keys."""
        return 2 * self.kind.key_size

    @property
    def mixed_cols(self) -> int:
        """Columns of `mixed`: values, the exponents of decays, betas."""
        return self.kind.value_size + 2 * self.kind.num_heads

    @property
    def gate_starts(self) -> tuple[int, int]:
        """Where the exponents and the betas begin in a row of `mixed`."""
        return self.kind.value_size, self.kind.value_size + self.kind.num_heads

    @property
    def rows_at_once(self) -> int:
        """Rows of a warp of the kernels before and after the recurrence: neighbors read the same inputs of the
        convolution."""
        return 4 if self.layout.num_tokens >= 64 and self.layout.num_tokens % 4 == 0 else 1

    def row_warps(self, items: int) -> int:
        """Warps of a threadgroup of these kernels, of `items` in all: a GPU takes time to start a threadgroup."""
        return 1 if self.lanes is None else next(count for count in (8, 4, 2, 1) if items % count == 0)

    @property
    def down(self) -> int:
        """Lanes that share a column of the state."""
        dims = self.kind.key_dim, self.kind.value_dim
        if self.lanes is None or dims[0] % 32 or dims[1] % 16:
            return 1
        return 8

    @property
    def across(self) -> int:
        """Columns of the state in a threadgroup."""
        wanted = STATE_THREADS if self.down == 1 else 16
        return next(count for count in range(wanted, 0, -1) if self.kind.value_dim % count == 0)

    @property
    def rows(self) -> int:
        """Rows of the state that a thread holds of its column."""
        return self.kind.key_dim // self.down

    def row(self, lane: UOp, i: int) -> UOp:
        """The i-th row of the state that a lane of those that share a column holds. Neighbors hold neighboring vectors
        of rows."""
        run = gcd(self.rows, VECTOR)
        return lane % self.down * run + (i // run * (self.down * run) + i % run)


def mix_rows(
    spec: GpuRecurrentSpec, layer: RecurrentLayer, step: Step, parts: Many[Tensor], dtype: DType = F32
) -> tuple[Tensor, Tensor]:
    """(`units` in a dtype, `mixed`): what the recurrence reads of each row."""
    convs, device = step.pool.convs[layer.index], str(step.inputs.device)
    assert isinstance(convs, Tensor)
    read, tables = [step.inputs, convs, layer.conv], [layer.log_decay, layer.decay_bias]
    units, mixed = (
        empty(step.num_tokens * cols, t, device) for cols, t in ((spec.unit_cols, dtype), (spec.mixed_cols, F32))
    )
    held = [[parts[i] for i in spec.parts(*sections)] for sections in ((QUERIES, KEYS), (VALUES, BETAS, DECAYS))]
    (units,) = run_kernel(key_kernel(spec), [units], [*read, *held[0]])
    (mixed,) = run_kernel(value_kernel(spec), [mixed], [*read, *tables, *held[1]])
    return units, mixed


def gate_heads(
    spec: GpuRecurrentSpec, out: Tensor, layer: RecurrentLayer, step: Step, parts: Many[Tensor], o: Tensor
) -> Tensor:
    """The outputs `o`, normed and gated, written to `out`."""
    read = [step.inputs, o, layer.norm, *[parts[i] for i in spec.parts(GATES)]]
    return run_kernel(gate_kernel(spec), [out], read)[0]


class Projections:
    """The parts of the projections that hold some sections, inside a kernel."""

    def __init__(self, spec: GpuRecurrentSpec, operands: Many[UOp], *sections: int) -> None:
        self.spec = spec
        self.parts = dict(zip(spec.parts(*sections), operands, strict=True))

    def load(self, section: int, row: UOp | int, col: UOp | int, count: int = 1) -> list[UOp]:
        """Columns [col, col + count) of a section, float32."""
        index, start = self.spec.place(section)
        part, cols, tokens = self.parts[index], self.spec.cols[index], self.spec.layout.num_tokens
        values = []
        for i in range(count):
            places = [(row + s * tokens) * cols + (start + col + i) for s in range(self.spec.partials[index])]
            values.append(balanced(part[place].load().cast(F32) for place in places))
        return values


class Inputs:
    """Where a row's convolution finds its inputs: among the step's own rows, and before them in the pool."""

    def __init__(
        self, projections: Projections, convs: UOp, conv: UOp, sequence: Sequence, position: UOp | None = None
    ) -> None:
        """`position`: of the row; None: of the sequence's first."""
        self.position = sequence.position if position is None else position
        self.spec, self.projections = projections.spec, projections
        self.convs, self.conv, self.sequence = convs, conv, sequence

    def place(self, slot: UOp, position: UOp, channel: UOp | int) -> UOp:
        """The index of an input in the pool."""
        kind = self.spec.kind
        return slot * kind.conv_elements + position % kind.conv_width * kind.conv_size + channel

    def mixed(self, section: int, row: UOp | int, col: UOp | int, count: int = 1) -> list[UOp]:
        """SiLU(conv) of columns [col, col + count) of queries, keys or values."""
        taps = [self._taps(section, row, col + i) for i in range(count)]
        return [silu(balanced(values), self.spec.lanes) for values in taps]

    def _taps(self, section: int, row: UOp | int, col: UOp | int) -> list[UOp]:
        """The weighted inputs of a row's channel, its own first."""
        spec, sequence = self.spec, self.sequence
        kind, channel = spec.kind, spec.section_start(section) + col
        values = self.projections.load(section, row, col)
        for tap in range(1, kind.conv_width):
            if spec.is_decode:
                values += self._kept(self.position - tap, channel)
                continue
            offset = sequence.first_row * -1 + row
            (old,) = self._kept(self.position - tap, channel, offset < tap)
            (own,) = self.projections.load(section, (row - UOp.const(tap, dtypes.weakint)).maximum(0), col)
            values.append((offset >= tap).where(own, old))
        last = kind.conv_width - 1
        return [v * self.conv[(last - tap) * kind.conv_size + channel].load() for tap, v in enumerate(values)]

    def _kept(self, position: UOp, channel: UOp | int, *conditions: UOp) -> list[UOp]:
        """A channel's input at a position before the step; 0 before the sequence, or if a condition does not hold."""
        wanted = functools.reduce(operator.and_, conditions, position >= 0)
        at = self.place(self.sequence.read_slot, position.maximum(0), channel)
        return [self.convs[at.valid(wanted)].load()]

    def keep(self, section: int, col: UOp, is_wanted: UOp) -> list[UOp]:
        """Stores of the last inputs of a channel, where the sequence's state goes."""
        spec, sequence, stores = self.spec, self.sequence, []
        channel = spec.section_start(section) + col
        for age in range(spec.kind.conv_width - 1):
            offset = sequence.count - 1 - age
            position = sequence.position + offset
            is_own, known = offset >= 0, position.maximum(0)
            row = clamp(sequence.first_row + offset, 0, spec.layout.num_tokens - 1)
            (value,) = self.projections.load(section, row, col)
            if age:
                old = self.place(sequence.read_slot, known, channel)
                value = is_own.where(value, self.convs[old.valid(sequence.is_moved)].load())
            is_stored = (sequence.count > 0) & (position >= 0) & is_wanted & (is_own | sequence.is_moved)
            stores.append(self.convs[self.place(sequence.write_slot, known, channel).valid(is_stored)].store(value))
        return stores

    def keep_head(self, head: UOp | int, is_first: UOp, thread: UOp, threads: int) -> list[UOp]:
        """Stores of the last inputs of a value head's channels, by the first of its threadgroups; those of queries and
        keys, by the first head that reads them."""
        spec, kind = self.spec, self.spec.kind
        leads = is_first & (thread * 0 + head % spec.group).eq(0)
        key = head // spec.group * kind.key_dim
        ranges = [(QUERIES, key, kind.key_dim, leads), (KEYS, key, kind.key_dim, leads)]
        ranges.append((VALUES, head * kind.value_dim, kind.value_dim, is_first))
        return [
            store
            for section, first, size, wanted in ranges
            for col, inside in columns(first, size, thread, threads)
            for store in self.keep(section, col, wanted & inside)
        ]


def silu(x: UOp, lanes: Lanes | None) -> UOp:
    """x * sigmoid(x), by the device's fast division if its lanes are known."""
    bottom = (x * -LOG2E).exp2() + 1.0
    return x / bottom if lanes is None else quick_division(x, bottom, lanes.kind)


def sigmoid(x: UOp) -> UOp:
    return ((x * -LOG2E).exp2() + 1.0).reciprocal()


def columns(first: UOp | int, size: int, thread: UOp, threads: int, run: int = 1) -> list[tuple[UOp, UOp]]:
    """(first column, whether it exists) of each run of columns, of `size` columns from `first` on, that a thread
    handles."""
    found, count = [], size // run
    for start in range(0, count, threads):
        index, inside = start + thread, start + thread < count
        if start + threads > count:
            index = inside.where(index, 0)
        found.append((index * run + first, inside))
    return found


def add_threads(body: Body, values: list[UOp], thread: UOp, threads: int, lanes: Lanes | None) -> list[UOp]:
    """The sum of each value over a threadgroup's threads, in all of them."""
    if lanes is not None and threads == LANES:
        return [lanes.sum(value) for value in values]
    shared = body.shared(threads * len(values))
    shared = shared.after(UOp.group(*[shared[i * threads + thread].store(value) for i, value in enumerate(values)]))
    return [balanced(shared[i * threads + t].load() for t in range(threads)) for i in range(len(values))]


class _Rows:
    """A warp's work: some neighboring rows and one head."""

    def __init__(self, spec: GpuRecurrentSpec, num_heads: int) -> None:
        self.spec, self.body = spec, Body()
        count, tokens = spec.rows_at_once, spec.layout.num_tokens
        num_warps = spec.row_warps(tokens // count * num_heads)
        group = grid(self.body, tokens // count * num_heads // num_warps)
        self.lane, warp = self.body.threads(LANES), warps(self.body, num_warps)
        self.axes = axes_of(group, self.lane, warp)
        item = group * num_warps + warp
        self.head = item % num_heads
        self.rows = [item // num_heads * count + i for i in range(count)]

    def sources(self, projections: Projections, inputs: UOp, convs: UOp, conv: UOp) -> list[Inputs]:
        """Where each row's convolution finds its inputs."""
        found = []
        for row in self.rows:
            position = inputs[self.spec.layout.offset("positions") + row].load().maximum(0)
            found.append(Inputs(projections, convs, conv, sequence_of(self.spec, inputs, row)[0], position))
        return found

    def finish(self, stores: list[UOp], name: str, *, ops: int, nbytes: int) -> UOp:
        return finish(UOp.group(*stores).end(*reversed(self.axes)), name, ops=ops, nbytes=nbytes)


@cached_kernel
def key_kernel(spec: GpuRecurrentSpec) -> KernelFn:
    """fn(units (T, 2 * Hk * Dk), inputs, convs, conv, *parts): each row's queries and then its keys, convolved and of
    length 1, queries times Dk ** -0.5 besides."""

    def kernel(units: UOp, inputs: UOp, convs: UOp, conv: UOp, *parts: UOp) -> UOp:
        kind, rows = spec.kind, _Rows(spec, spec.kind.num_key_heads)
        run, tokens = gcd(kind.key_dim, VECTOR), spec.layout.num_tokens
        places = columns(rows.head * kind.key_dim, kind.key_dim, rows.lane, LANES, run)
        sources = rows.sources(Projections(spec, parts, QUERIES, KEYS), inputs, convs, conv)
        which = [(section, *each) for section in (QUERIES, KEYS) for each in zip(rows.rows, sources, strict=True)]
        drawn = [[source.mixed(section, row, col, run) for col, _ in places] for section, row, source in which]
        squares = [
            balanced(inside.where(dot(values, values), 0.0) for values, (_, inside) in zip(runs, places, strict=True))
            for runs in drawn
        ]
        totals, stores = add_threads(rows.body, squares, rows.lane, LANES, spec.lanes), []
        for (section, row, _), runs, total in zip(which, drawn, totals, strict=True):
            scale = (total + UNIT_EPS).sqrt().reciprocal() * (kind.key_dim**-0.5 if section == QUERIES else 1.0)
            for values, (col, inside) in zip(runs, places, strict=True):
                start = row * spec.unit_cols + (section * kind.key_size + col)
                scaled = [value * scale for value in values]
                stores += [units[(start + i).valid(inside)].store(v.cast(units.dtype)) for i, v in enumerate(scaled)]
        size = tokens * spec.unit_cols
        name = f"mix_keys_{tokens}x{spec.unit_cols}"
        return rows.finish(stores, name, ops=2 * kind.conv_width * size, nbytes=(4 + units.dtype.itemsize) * size)

    return kernel


@cached_kernel
def value_kernel(spec: GpuRecurrentSpec) -> KernelFn:
    """fn(mixed (T, mixed_cols), inputs, convs, conv, log_decay, decay_bias, *parts): each row's convolved values, the
    exponents of its decays, and its betas."""

    def kernel(mixed: UOp, inputs: UOp, convs: UOp, conv: UOp, *rest: UOp) -> UOp:
        kind, rows, (log_decay, bias, *parts) = spec.kind, _Rows(spec, spec.kind.num_heads), rest
        run, tokens = gcd(kind.value_dim, VECTOR), spec.layout.num_tokens
        projections, stores = Projections(spec, parts, VALUES, BETAS, DECAYS), []
        sources = rows.sources(projections, inputs, convs, conv)
        for col, inside in columns(rows.head * kind.value_dim, kind.value_dim, rows.lane, LANES, run):
            for row, source in zip(rows.rows, sources, strict=True):
                values, start = source.mixed(VALUES, row, col, run), row * spec.mixed_cols + col
                stores += [mixed[(start + i).valid(inside)].store(value) for i, value in enumerate(values)]
        for item, inside in columns(0, len(rows.rows), rows.lane, LANES):
            row = rows.rows[0] + item
            (a,), (b,) = (projections.load(section, row, rows.head) for section in (DECAYS, BETAS))
            exponent = decay_exponent(a, log_decay[rows.head].load(), bias[rows.head].load())
            for start, value in zip(spec.gate_starts, (exponent, sigmoid(b)), strict=True):
                stores.append(mixed[(row * spec.mixed_cols + start + rows.head).valid(inside)].store(value))
        size = tokens * kind.value_size
        name = f"mix_values_{tokens}x{kind.value_size}"
        return rows.finish(stores, name, ops=2 * kind.conv_width * size, nbytes=8 * size)

    return kernel


@cached_kernel
def gate_kernel(spec: GpuRecurrentSpec) -> KernelFn:
    """fn(out (T, Hv * Dv), inputs, o (T, Hv * Dv), norm, z's part): RMSNorm(o) * norm * SiLU(z) of each head; zeros in
    rows of padding."""

    def kernel(out: UOp, inputs: UOp, o: UOp, norm: UOp, part: UOp) -> UOp:
        kind, rows, stores = spec.kind, _Rows(spec, spec.kind.num_heads), []
        z, run = Projections(spec, [part], GATES), gcd(spec.kind.value_dim, VECTOR)
        places = columns(0, kind.value_dim, rows.lane, LANES, run)
        bases = [row * kind.value_size + rows.head * kind.value_dim for row in rows.rows]
        values = [[[o[base + col + i].load() for i in range(run)] for col, _ in places] for base in bases]
        squares = [
            balanced(inside.where(dot(v, v), 0.0) for v, (_, inside) in zip(own, places, strict=True)) for own in values
        ]
        totals = add_threads(rows.body, squares, rows.lane, LANES, spec.lanes)
        for row, base, runs, total in zip(rows.rows, bases, values, totals, strict=True):
            is_real = sequence_of(spec, inputs, row)[1]
            scale = (total * (1.0 / kind.value_dim) + kind.norm_eps).sqrt().reciprocal()
            for (col, inside), own in zip(places, runs, strict=True):
                gates = z.load(GATES, row, rows.head * kind.value_dim + col, run)
                for i, (value, gate) in enumerate(zip(own, gates, strict=True)):
                    gated = is_real.where(value * scale * norm[col + i].load() * silu(gate, spec.lanes), 0.0)
                    stores.append(out[(base + col + i).valid(inside)].store(gated.cast(out.dtype)))
        tokens, size = spec.layout.num_tokens, spec.layout.num_tokens * kind.value_size
        name = f"gate_heads_{tokens}x{kind.num_heads}x{kind.value_dim}"
        return rows.finish(stores, name, ops=6 * size, nbytes=(8 + out.dtype.itemsize) * size)

    return kernel
