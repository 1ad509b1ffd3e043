"""Recurrent layers on devices with threadgroups, in a form that any step can take: three kernels.

The first convolves and computes the gates, for each row on its own. The second walks along each sequence's rows with
its state in registers; columns of the state are independent, so that they are divided between threads. The third norms
and gates the outputs.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence as Many
from dataclasses import dataclass
from itertools import accumulate
from math import gcd

from tinygrad import Tensor, UOp

from tinyvllm.ops.activation import DEVICE_ARITHMETIC, LOG2E
from tinyvllm.ops.backend import Step
from tinyvllm.ops.kernel.body import F32, Body, KernelFn, balanced, cached_kernel, clamp, empty, finish, run_kernel
from tinyvllm.ops.kernel.lanes import LANES, Lanes, axes_of, dot, grid
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
    sequence_at,
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


def recur_by_rows(
    spec: GpuRecurrentSpec, out: Tensor, layer: RecurrentLayer, step: Step, parts: Many[Tensor]
) -> Tensor:
    """A recurrent layer's outputs, written to `out`; its states, to the pool."""
    matrices, convs = step.pool.matrices[layer.index], step.pool.convs[layer.index]
    assert isinstance(matrices, Tensor) and isinstance(convs, Tensor)
    (mixed,) = mix_rows(spec, layer, step, parts)
    o = empty(step.num_tokens * spec.kind.value_size, F32, str(out.device))
    read = [step.inputs, mixed, *[parts[i] for i in spec.parts(*CONVOLVED)]]
    o, *_ = run_kernel(walk_kernel(spec), [o, matrices, convs], read)
    return gate_heads(spec, out, layer, step, parts, o)


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
        return [silu(balanced(values)) for values in taps]

    def _taps(self, section: int, row: UOp | int, col: UOp | int) -> list[UOp]:
        """The weighted inputs of a row's channel, its own first."""
        spec, sequence = self.spec, self.sequence
        kind, channel, limit = spec.kind, spec.section_start(section) + col, spec.layout.num_tokens - 1
        values = self.projections.load(section, row, col)
        for tap in range(1, kind.conv_width):
            if spec.is_decode:
                values += self._kept(sequence.position - tap, channel)
                continue
            offset = sequence.first_row * -1 + row
            (old,) = self._kept(sequence.position + offset - tap, channel, offset < tap)
            (own,) = self.projections.load(section, clamp(offset - tap + sequence.first_row, 0, limit), col)
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


def silu(x: UOp) -> UOp:
    return DEVICE_ARITHMETIC.swish(x, 1.0)


def sigmoid(x: UOp) -> UOp:
    return ((x * -LOG2E).exp2() + 1.0).reciprocal()


def columns(first: UOp | int, size: int, thread: UOp, threads: int) -> list[tuple[UOp, UOp]]:
    """(column, whether it exists) for each of `size` columns from `first` on that a thread handles."""
    found = []
    for start in range(0, size, threads):
        inside = start + thread < size
        found.append((first + (inside.where(start + thread, 0) if start + threads > size else start + thread), inside))
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
        units, mixed = operands[0], operands[int(with_units)]
        inputs, convs, conv, *rest = operands[1 + with_units :]
        (log_decay, bias), kind, body = rest[:2], spec.kind, Body()
        tokens, cols, starts = spec.layout.num_tokens, spec.mixed_cols, spec.mixed_sections
        unit_cols = 2 * kind.key_size if with_units else cols
        row, head, thread = grid(body, tokens), grid(body, kind.num_key_heads), body.threads(LANES)
        projections = Projections(spec, rest[2:], *MIXED)
        source = Inputs(projections, convs, conv, sequence_of(spec, inputs, row)[0])
        stores, drawn, squares = [], [], []
        for section in (QUERIES, KEYS):
            places = columns(head * kind.key_dim, kind.key_dim, thread, LANES)
            values = [inside.where(source.mixed(section, row, col)[0], 0.0) for col, inside in places]
            drawn.append((places, values))
            squares.append(dot(values, values))
        totals = add_threads(body, squares, thread, LANES, spec.lanes)
        for section, (places, values), total in zip((QUERIES, KEYS), drawn, totals, strict=True):
            scale = (total + UNIT_EPS).sqrt().reciprocal() * (kind.key_dim**-0.5 if section == QUERIES else 1.0)
            for (col, inside), value in zip(places, values, strict=True):
                at = row * unit_cols + (section * kind.key_size + col)
                stores.append(units[at.valid(inside)].store((value * scale).cast(units.dtype)))
        width = spec.group * kind.value_dim
        for col, inside in columns(head * width, width, thread, LANES):
            at = row * cols + (starts[2] + col)
            stores.append(mixed[at.valid(inside)].store(source.mixed(VALUES, row, col)[0]))
        for h, inside in columns(head * spec.group, spec.group, thread, LANES):
            (a,), (b,) = projections.load(DECAYS, row, h), projections.load(BETAS, row, h)
            at = row * cols + (starts[3] + h)
            exponent, beta = decay_exponent(a, log_decay[h].load(), bias[h].load()), sigmoid(b)
            stores += [mixed[at.valid(inside)].store(exponent), mixed[(at + kind.num_heads).valid(inside)].store(beta)]
        size = tokens * kind.conv_size
        done = UOp.group(*stores).end(*reversed(axes_of(row, head, thread)))
        return finish(done, f"mix_{tokens}x{kind.conv_size}", ops=2 * kind.conv_width * size, nbytes=8 * size)

    return kernel


@cached_kernel
def walk_kernel(spec: GpuRecurrentSpec) -> KernelFn:
    """fn(o (T, Hv * Dv), matrices, convs, inputs, mixed, *parts): each sequence's rows one after another, in float32.
    Moves the states to the slots where they go."""

    def kernel(o: UOp, matrices: UOp, convs: UOp, inputs: UOp, mixed: UOp, *rest: UOp) -> UOp:
        walk = _Walk(spec, inputs, mixed, matrices)
        done, state = walk.run(o)
        stores = [done, *walk.store(matrices, state)]
        projections = Projections(spec, rest, *CONVOLVED)
        stores += walk.keep(Inputs(projections, convs, convs, walk.sequence))
        kind, layout = spec.kind, spec.layout
        tokens, seqs = layout.num_tokens, min(layout.num_seqs, layout.num_tokens)
        name = f"walk_{tokens}x{kind.num_heads}x{kind.key_dim}x{kind.value_dim}"
        ops = 7 * tokens * kind.matrix_elements
        nbytes = 2 * seqs * kind.num_bytes + 4 * tokens * (spec.mixed_cols + kind.value_size)
        return finish(UOp.group(*stores).end(*reversed(walk.axes)), name, ops=ops, nbytes=nbytes)

    return kernel


class _Walk:
    """A thread's work: some rows of a column of one sequence's and head's state."""

    def __init__(self, spec: GpuRecurrentSpec, inputs: UOp, mixed: UOp, matrices: UOp) -> None:
        self.spec, self.mixed, self.matrices, self.body = spec, mixed, matrices, Body()
        kind, layout = spec.kind, spec.layout
        self.threads = spec.across * spec.down
        seq, self.head = grid(self.body, layout.num_seqs), grid(self.body, kind.num_heads)
        self.block = grid(self.body, kind.value_dim // spec.across)
        self.thread = self.body.threads(self.threads)
        self.axes = axes_of(seq, self.head, self.block, self.thread)
        self.sequence = sequence_at(spec, inputs, seq)
        self.column = self.block * spec.across + self.thread // spec.down

    def place(self, slot: UOp, i: int) -> UOp:
        """Of the thread's i-th element in the pool."""
        kind = self.spec.kind
        row = (slot * kind.num_heads + self.head) * kind.key_dim + self.spec.row(self.thread, i)
        return row * kind.value_dim + self.column

    def run(self, o: UOp) -> tuple[UOp, list[UOp]]:
        """(stores of the outputs, the thread's elements of the state after them)."""
        spec, sequence, body = self.spec, self.sequence, self.body
        is_old = (sequence.count > 0) & sequence.position.ne(0)
        old = [self.matrices[self.place(sequence.read_slot, i).valid(is_old)].load() for i in range(spec.rows)]
        if spec.max_rows == 1:
            after, value = self._step(sequence.first_row, old)
            at = sequence.first_row * spec.kind.value_size + self.head * spec.kind.value_dim + self.column
            leads = (self.thread % spec.down).eq(0) if spec.down > 1 else sequence.count >= 0
            return o[at.valid(leads & (sequence.count > 0))].store(value), after
        state = body.registers(spec.rows)
        state = state.after(UOp.group(*[state.after(*self.axes)[i].store(value) for i, value in enumerate(old)]))
        loop = body.fold_while(sequence.count)
        row = clamp(sequence.first_row + loop, 0, spec.layout.num_tokens - 1)
        before = [state.after(loop)[i].load() for i in range(spec.rows)]
        after, value = self._step(row, before)
        at = row * spec.kind.value_size + self.head * spec.kind.value_dim + self.column
        if spec.down > 1:
            at = at.valid((self.thread % spec.down).eq(0))
        stores = [state.after(loop)[i].store(new) for i, new in enumerate(after)]
        done = UOp.group(*stores, o[at].store(value)).end(loop)
        return done, [state.after(done)[i].load() for i in range(spec.rows)]

    def _step(self, row: UOp, state: list[UOp]) -> tuple[list[UOp], UOp]:
        """(the thread's elements of the state after a row, the output of its column)."""
        spec, kind = self.spec, self.spec.kind
        base = row * spec.mixed_cols
        key, rows = base + self.head // spec.group * kind.key_dim, [spec.row(self.thread, i) for i in range(spec.rows)]
        q, k = ([self.mixed[key + start + row].load() for row in rows] for start in (0, kind.key_size))
        v = self.mixed[base + spec.mixed_sections[2] + self.head * kind.value_dim + self.column].load()
        decay, beta = (self.mixed[base + start + self.head].load() for start in spec.mixed_sections[3:5])
        # o = S^T q with the new S, in terms of the old one: so that no sum waits for another
        sums = [dot(k, state), dot(q, state), dot(q, k)]
        if spec.lanes is not None and spec.down > 1:
            masks = [1 << i for i in range(spec.down.bit_length() - 1)]
            sums = [spec.lanes.sum(value, masks) for value in sums]
        decay = decay.exp2()
        delta = beta * (v - decay * sums[0])
        return [s * decay + x * delta for s, x in zip(state, k, strict=True)], decay * sums[1] + sums[2] * delta

    def store(self, matrices: UOp, state: list[UOp]) -> list[UOp]:
        """Stores of the thread's elements of the new state."""
        wanted, slot = self.sequence.count > 0, self.sequence.write_slot
        return [matrices[self.place(slot, i).valid(wanted)].store(value) for i, value in enumerate(state)]

    def keep(self, source: Inputs) -> list[UOp]:
        """Stores of the head's last inputs of the convolution, by the first threadgroup of each head."""
        return source.keep_head(self.head, (self.thread * 0 + self.block).eq(0), self.thread, self.threads)


@cached_kernel
def gate_kernel(spec: GpuRecurrentSpec) -> KernelFn:
    """fn(out (T, Hv * Dv), inputs, o (T, Hv * Dv), norm, z's part): RMSNorm(o) * norm * SiLU(z) of each head; zeros in
    rows of padding."""

    def kernel(out: UOp, inputs: UOp, o: UOp, norm: UOp, part: UOp) -> UOp:
        kind, body, tokens = spec.kind, Body(), spec.layout.num_tokens
        row, head, thread = grid(body, tokens), grid(body, kind.num_heads), body.threads(LANES)
        z, (_, is_real) = Projections(spec, [part], GATES), sequence_of(spec, inputs, row)
        places = columns(head * kind.value_dim, kind.value_dim, thread, LANES)
        values = [inside.where(o[row * kind.value_size + col].load(), 0.0) for col, inside in places]
        (total,) = add_threads(body, [dot(values, values)], thread, LANES, spec.lanes)
        scale, stores = (total * (1.0 / kind.value_dim) + kind.norm_eps).sqrt().reciprocal(), []
        for (col, inside), value in zip(places, values, strict=True):
            weight = norm[col - head * kind.value_dim].load()
            gated = value * scale * weight * silu(z.load(GATES, row, col)[0])
            at = (row * kind.value_size + col).valid(inside)
            stores.append(out[at].store(is_real.where(gated, 0.0).cast(out.dtype)))
        size = tokens * kind.value_size
        done = UOp.group(*stores).end(*reversed(axes_of(row, head, thread)))
        return finish(done, f"gate_heads_{tokens}x{kind.num_heads}x{kind.value_dim}", ops=6 * size, nbytes=10 * size)

    return kernel
