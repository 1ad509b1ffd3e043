"""What all forms of recurrent layers on GPUs share: where they find their operands, and the kernels that handle rows on
their own, before the recurrence (convolution, norms of queries and keys, gates) and after it (norm, gate).
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence as Many
from dataclasses import dataclass
from itertools import accumulate
from math import gcd

from tinygrad import Tensor, UOp, dtypes

from tinyvllm.ops.activation import LOG2E
from tinyvllm.ops.backend import Step
from tinyvllm.ops.kernel.body import F32, Body, KernelFn, balanced, cached_kernel, clamp, empty, finish, run_kernel
from tinyvllm.ops.kernel.lanes import LANES, Lanes, axes_of, dot, grid
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
CONVOLVED = (QUERIES, KEYS, VALUES)  # what kernels read of the projections
MIXED = (*CONVOLVED, BETAS, DECAYS)
STATE_THREADS = 32  # of a threadgroup whose threads hold whole columns of the state


@dataclass(frozen=True, kw_only=True)
class GpuRecurrentSpec(RecurrentSpec):
    """`partials`: the number of partial products whose sum each part of the projections is. `lanes`: None on devices
    whose threads exchange values through threadgroup memory only."""

    partials: tuple[int, ...]
    lanes: Lanes | None = None

    @property
    def mixed_sections(self) -> tuple[int, ...]:
        """Where each section begins in a row of what the first kernel leaves to the second, in float32: queries, keys,
        values, the exponents of decays, betas, and the end."""
        kind = self.kind
        sizes = (kind.key_size, kind.key_size, kind.value_size, kind.num_heads, kind.num_heads)
        return tuple(accumulate(sizes, initial=0))

    @property
    def mixed_cols(self) -> int:
        return self.mixed_sections[-1]

    @property
    def rows_at_once(self) -> int:
        """Rows of a threadgroup of `mix_kernel`: neighbors read the same inputs of the convolution."""
        return 4 if self.layout.num_tokens >= 64 and self.layout.num_tokens % 4 == 0 else 1

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
    spec: GpuRecurrentSpec, layer: RecurrentLayer, step: Step, parts: Many[Tensor], *units: Tensor
) -> list[Tensor]:
    """[queries and keys, written to `units`, if that is given; what else `mix_kernel` computes]."""
    convs = step.pool.convs[layer.index]
    assert isinstance(convs, Tensor)
    mixed = empty(step.num_tokens * spec.mixed_cols, F32, str(step.inputs.device))
    tables = [layer.conv, layer.log_decay, layer.decay_bias]
    read = [step.inputs, convs, *tables, *[parts[i] for i in spec.parts(*MIXED)]]
    return run_kernel(mix_kernel(spec, bool(units)), [*units, mixed], read)


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

    def __init__(self, projections: Projections, convs: UOp, conv: UOp, sequence: Sequence) -> None:
        self.spec, self.projections = projections.spec, projections
        self.convs, self.conv, self.sequence = convs, conv, sequence

    def place(self, slot: UOp, position: UOp, channel: UOp | int) -> UOp:
        """Of an input in the pool."""
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
                values += self._kept(sequence.position - tap, channel)
                continue
            offset = sequence.first_row * -1 + row
            (old,) = self._kept(sequence.position + offset - tap, channel, offset < tap)
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


@cached_kernel
def mix_kernel(spec: GpuRecurrentSpec, with_units: bool) -> KernelFn:
    """fn([units (T, 2 * Hk * Dk), ]mixed (T, mixed_cols), inputs, convs, conv, log_decay, decay_bias, *parts): each
    row's queries and keys, of length 1 (and Dk ** -0.5), its values, the exponents of its decays, and its betas."""

    def kernel(*operands: UOp) -> UOp:
        outputs, (inputs, convs, conv, log_decay, bias, *parts) = operands[: 1 + with_units], operands[1 + with_units :]
        mix = _Mix(spec, outputs, inputs, convs, conv, parts)
        stores = [*mix.units(), *mix.values(), *mix.gates(log_decay, bias)]
        tokens, channels = spec.layout.num_tokens, spec.kind.conv_size
        done = UOp.group(*stores).end(*reversed(mix.axes))
        ops = 2 * spec.kind.conv_width * tokens * channels
        return finish(done, f"mix_{tokens}x{channels}", ops=ops, nbytes=8 * tokens * channels)

    return kernel


class _Mix:
    """A threadgroup's work: some neighboring rows, one head of queries and keys, and the value heads that read it."""

    def __init__(
        self, spec: GpuRecurrentSpec, outputs: Many[UOp], inputs: UOp, convs: UOp, conv: UOp, parts: Many[UOp]
    ) -> None:
        self.spec, self.body, self.outputs = spec, Body(), outputs
        count = spec.rows_at_once
        block, self.head = grid(self.body, spec.layout.num_tokens // count), grid(self.body, spec.kind.num_key_heads)
        self.thread = self.body.threads(LANES)
        self.axes = axes_of(block, self.head, self.thread)
        self.projections = Projections(spec, parts, *MIXED)
        self.rows = [block * count + i for i in range(count)]
        self.sources = [Inputs(self.projections, convs, conv, sequence_of(spec, inputs, row)[0]) for row in self.rows]

    def units(self) -> list[UOp]:
        """Stores of the queries and keys."""
        spec, kind, units = self.spec, self.spec.kind, self.outputs[0]
        run, cols = gcd(kind.key_dim, VECTOR), spec.mixed_cols if len(self.outputs) == 1 else 2 * kind.key_size
        places = columns(self.head * kind.key_dim, kind.key_dim, self.thread, LANES, run)
        which = [
            (section, row, source)
            for section in (QUERIES, KEYS)
            for row, source in zip(self.rows, self.sources, strict=True)
        ]
        drawn = [[source.mixed(section, row, col, run) for col, _ in places] for section, row, source in which]
        squares = [
            balanced(inside.where(dot(values, values), 0.0) for values, (_, inside) in zip(runs, places, strict=True))
            for runs in drawn
        ]
        totals, stores = add_threads(self.body, squares, self.thread, LANES, spec.lanes), []
        for (section, row, _), runs, total in zip(which, drawn, totals, strict=True):
            scale = (total + UNIT_EPS).sqrt().reciprocal() * (kind.key_dim**-0.5 if section == QUERIES else 1.0)
            for values, (col, inside) in zip(runs, places, strict=True):
                start = row * cols + (section * kind.key_size + col)
                scaled = [value * scale for value in values]
                stores += [units[(start + i).valid(inside)].store(v.cast(units.dtype)) for i, v in enumerate(scaled)]
        return stores

    def values(self) -> list[UOp]:
        spec, mixed = self.spec, self.outputs[-1]
        width, stores = spec.group * spec.kind.value_dim, []
        run = gcd(width, VECTOR)
        for col, inside in columns(self.head * width, width, self.thread, LANES, run):
            for row, source in zip(self.rows, self.sources, strict=True):
                start = row * spec.mixed_cols + (spec.mixed_sections[2] + col)
                values = source.mixed(VALUES, row, col, run)
                stores += [mixed[(start + i).valid(inside)].store(value) for i, value in enumerate(values)]
        return stores

    def gates(self, log_decay: UOp, bias: UOp) -> list[UOp]:
        """Stores of the exponents and betas."""
        spec, mixed, stores = self.spec, self.outputs[-1], []
        count = spec.group * len(self.rows)
        for item, inside in columns(0, count, self.thread, LANES):
            row, head = self.rows[0] + item // spec.group, self.head * spec.group + item % spec.group
            (a,), (b,) = (self.projections.load(section, row, head) for section in (DECAYS, BETAS))
            found = decay_exponent(a, log_decay[head].load(), bias[head].load()), sigmoid(b)
            at = row * spec.mixed_cols + head
            stores += [
                mixed[(at + start).valid(inside)].store(value)
                for start, value in zip(spec.mixed_sections[3:5], found, strict=True)
            ]
        return stores


@cached_kernel
def gate_kernel(spec: GpuRecurrentSpec) -> KernelFn:
    """fn(out (T, Hv * Dv), inputs, o (T, Hv * Dv), norm, z's part): RMSNorm(o) * norm * SiLU(z) of each head; zeros in
    rows of padding."""

    def kernel(out: UOp, inputs: UOp, o: UOp, norm: UOp, part: UOp) -> UOp:
        kind, body, tokens = spec.kind, Body(), spec.layout.num_tokens
        row, head, thread = grid(body, tokens), grid(body, kind.num_heads), body.threads(LANES)
        z, (_, is_real) = Projections(spec, [part], GATES), sequence_of(spec, inputs, row)
        run, base = gcd(kind.value_dim, VECTOR), row * kind.value_size + head * kind.value_dim
        places = columns(0, kind.value_dim, thread, LANES, run)
        values = [[o[base + col + i].load() for i in range(run)] for col, _ in places]
        squares = [inside.where(dot(v, v), 0.0) for v, (_, inside) in zip(values, places, strict=True)]
        (total,) = add_threads(body, [balanced(squares)], thread, LANES, spec.lanes)
        scale, stores = (total * (1.0 / kind.value_dim) + kind.norm_eps).sqrt().reciprocal(), []
        for (col, inside), own in zip(places, values, strict=True):
            gates = z.load(GATES, row, head * kind.value_dim + col, run)
            for i, (value, gate) in enumerate(zip(own, gates, strict=True)):
                gated = is_real.where(value * scale * norm[col + i].load() * silu(gate, spec.lanes), 0.0)
                stores.append(out[(base + col + i).valid(inside)].store(gated.cast(out.dtype)))
        size = tokens * kind.value_size
        done = UOp.group(*stores).end(*reversed(axes_of(row, head, thread)))
        return finish(done, f"gate_heads_{tokens}x{kind.num_heads}x{kind.value_dim}", ops=6 * size, nbytes=10 * size)

    return kernel
