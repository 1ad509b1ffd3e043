"""Recurrent layers on the CPU device: convolution and gates, the walk along each sequence's rows, the norms of outputs.

Each core owns whole heads of queries and keys, the value heads that read them, and their states in the pool. A block of
a state's columns stays on the stack while the walk passes all rows of its sequence: columns are independent.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Many
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import gcd

from tinygrad import Tensor, UOp

from tinyvllm.config import StateKind
from tinyvllm.ops.cpu.product import CPU_ARITHMETIC
from tinyvllm.ops.kernel.body import (
    I32,
    LOG2E,
    Body,
    KernelFn,
    balanced,
    cached_kernel,
    clamp,
    empty,
    fill,
    finish,
    run_kernel,
)
from tinyvllm.ops.recurrent_spec import (
    BETAS,
    CONVOLVED,
    DECAYS,
    GATES,
    UNIT_EPS,
    RecurrentLayer,
    RecurrentSpec,
    Sequence,
    decay_exponent,
    section_sizes,
    sequence_at,
    sequence_of,
)

BLOCK_COLS = 32  # columns of a state that a walk handles at once: 16 KiB of a state with 128 rows
LANES = 16  # sums that run side by side
MIXED = (*CONVOLVED, BETAS, DECAYS)  # what each kernel reads of the projections, besides CONVOLVED
GATED = (GATES,)


@dataclass(frozen=True, kw_only=True)
class CpuRecurrentSpec(RecurrentSpec):
    """A core's part of a recurrent layer. `kind`: of its own heads; `layer_kind`: of all; `cols`: of every shard of
    every part of the projections."""

    layer_kind: StateKind
    first: int  # the core's first head of queries and keys

    @property
    def mixed_cols(self) -> int:
        """Columns of what the first kernel leaves to the second: q, k, v, decays, betas, and q . k of each head."""
        return self.kind.conv_size + 2 * self.kind.num_heads + self.kind.num_key_heads

    @property
    def block_cols(self) -> int:
        return gcd(self.kind.value_dim, BLOCK_COLS)

    def own_start(self, section: int) -> int:
        """The first of the core's columns of a section, in the projections."""
        kind = self.kind
        sizes = (kind.key_dim, kind.key_dim, self.group * kind.value_dim, self.group * kind.value_dim)
        return self.section_start(section) + self.first * (*sizes, self.group, self.group)[section]

    def own_channel(self, section: int) -> int:
        """The first of the core's channels of a section of q, k and v."""
        return sum(section_sizes(self.kind)[:section])

    def shards(self, *sections: int) -> tuple[int, ...]:
        """The shards that hold the core's columns of some sections."""
        return tuple(sorted({run.shard for section in sections for run in runs(self, section)}))

    def section_start(self, section: int) -> int:
        return sum(section_sizes(self.layer_kind)[:section])


@dataclass(frozen=True)
class Run:
    """`count` units of `size` columns: of a shard of the projections, from column `at` on, and of the core's section,
    from column `start` on."""

    shard: int
    at: int
    start: int
    count: int
    size: int


def runs(spec: CpuRecurrentSpec, section: int, unit: int = 1) -> Iterator[Run]:
    """The core's columns of a section, shard by shard, in whole units. A unit that ends in another shard than it begins
    in is divided, into runs of one unit that is smaller."""
    first, size = spec.own_start(section), section_sizes(spec.kind)[section]
    for shard, (cols, end) in enumerate(zip(spec.cols, accumulate(spec.cols), strict=True)):
        start, stop = (min(max(at - first, 0), size) for at in (end - cols, end))
        whole = (-(-start // unit) * unit, stop // unit * unit)
        cuts = sorted({start, stop, *(at for at in whole if start < at < stop)})
        for a, b in pairwise(cuts):
            count = (b - a) // unit if a % unit == 0 and b % unit == 0 else 1
            yield Run(shard, first + a - (end - cols), a, count, (b - a) // count)


def recur_on_core(
    spec: CpuRecurrentSpec,
    out: Tensor,
    pool: tuple[Tensor, Tensor],
    layer: RecurrentLayer,
    inputs: Tensor,
    shards: Many[Tensor],
) -> Tensor:
    """The outputs of a core's heads, written to `out`, and their states, to its matrices and convolution inputs."""
    matrices, convs = pool
    mixed, o = (
        empty(spec.layout.num_tokens * size, device=str(out.device)) for size in (spec.mixed_cols, spec.kind.value_size)
    )
    mixing, keeping, gating = ([shards[at] for at in spec.shards(*held)] for held in (MIXED, CONVOLVED, GATED))
    read = [inputs, convs, layer.conv, layer.log_decay, layer.decay_bias, *mixing]
    (mixed,) = run_kernel(mix_kernel(spec), [mixed], read)
    o, *_ = run_kernel(walk_kernel(spec), [o, matrices, convs], [inputs, mixed, *keeping])
    return run_kernel(gate_kernel(spec), [out], [inputs, o, layer.norm, *gating])[0]


class Inputs:
    """Where a row's convolution finds its inputs: among the step's own rows, and before them in the pool."""

    def __init__(
        self, spec: CpuRecurrentSpec, sections: Many[int], shards: Many[UOp], convs: UOp, sequence: Sequence
    ) -> None:
        """`shards`: those that hold the sections."""
        self.spec, self.convs, self.sequence = spec, convs, sequence
        self.shards = dict(zip(spec.shards(*sections), shards, strict=True))

    def load(self, run: Run, row: UOp | int, col: UOp) -> UOp:
        """Column `col` of a run."""
        return self.shards[run.shard][row * self.spec.cols[run.shard] + (col + run.at)].load()

    def place(self, slot: UOp, position: UOp, channel: UOp) -> UOp:
        """The index of an input in the core's part of the pool."""
        kind = self.spec.kind
        return slot * kind.conv_elements + position % kind.conv_width * kind.conv_size + channel

    def tap(self, run: Run, row: UOp, col: UOp, channel: UOp, tap: int) -> UOp:
        """The input of a row's channel `tap` rows before it; 0 before the sequence."""
        spec, sequence = self.spec, self.sequence
        if tap == 0:
            return self.load(run, row, col)
        offset = row - sequence.first_row
        position = sequence.position + (offset - tap)
        old = self.convs[self.place(sequence.read_slot, position.maximum(0), channel)].load()
        old = (position >= 0).where(old, 0.0)
        if spec.is_decode:
            return old
        own = self.load(run, clamp(sequence.first_row + (offset - tap), 0, spec.layout.num_tokens - 1), col)
        return (offset >= tap).where(own, old)


@cached_kernel
def mix_kernel(spec: CpuRecurrentSpec) -> KernelFn:
    """fn(mixed (T, mixed_cols), inputs, convs, conv, log_decay, decay_bias, *shards)."""

    def kernel(mixed: UOp, inputs: UOp, convs: UOp, conv: UOp, *rest: UOp) -> UOp:
        body, tokens, kind = Body(), spec.layout.num_tokens, spec.kind
        row = body.grid(tokens) if tokens > 1 else body.loop(1)
        source = Inputs(spec, MIXED, rest[2:], convs, sequence_of(spec, inputs, row)[0])
        base, done = row * spec.mixed_cols, []
        for section in CONVOLVED:
            own = spec.own_channel(section)
            for run in runs(spec, section):
                i = body.loop(run.count)
                channel = i + (own + run.start)
                table = spec.own_start(section) + run.start + i
                taps = [source.tap(run, row, i, channel, tap) for tap in range(kind.conv_width)]
                last, size = kind.conv_width - 1, spec.layer_kind.conv_size
                value = balanced(v * conv[(last - tap) * size + table].load() for tap, v in enumerate(taps))
                done.append(mixed[base + channel].store(CPU_ARITHMETIC.swish(value, 1.0)).end(i))
        done = [_unit_heads(spec, body, mixed.after(*done), row), *_gates(spec, body, mixed, row, source, rest[:2])]
        size = tokens * kind.conv_size
        name = f"mix_{tokens}x{kind.conv_size}"
        return finish(UOp.group(*done).end(row), name, ops=2 * kind.conv_width * size, nbytes=8 * size)

    return kernel


def _unit_heads(spec: CpuRecurrentSpec, body: Body, mixed: UOp, row: UOp) -> UOp:
    """Stores of queries and keys of length 1, queries times Dk ** -0.5 besides, and of q . k of each head."""
    kind, lanes = spec.kind, gcd(spec.kind.key_dim, LANES)
    head = body.loop(kind.num_key_heads)
    starts = [row * spec.mixed_cols + i * kind.key_size + head * kind.key_dim for i in range(2)]
    sums = fill(body, body.registers(3 * lanes), 0.0, mixed, row, head)
    chunk, lane = body.fold(kind.key_dim // lanes), body.loop(lanes)
    q, k = (mixed[start + chunk * lanes + lane].load() for start in starts)
    inner = sums.after(chunk)
    new = [
        inner[i * lanes + lane].store(inner[i * lanes + lane].load() + v) for i, v in enumerate((q * q, k * k, q * k))
    ]
    sums = sums.after(UOp.group(*new).end(lane, chunk))
    qq, kk, qk = (balanced(sums[i * lanes + lane].load() for lane in range(lanes)) for i in range(3))
    scales = body.registers(2)
    found = [(qq + UNIT_EPS).sqrt().reciprocal() * kind.key_dim**-0.5, (kk + UNIT_EPS).sqrt().reciprocal()]
    scales = scales.after(UOp.group(*[scales.after(sums)[i].store(value) for i, value in enumerate(found)]))
    at = row * spec.mixed_cols + kind.conv_size + 2 * kind.num_heads + head
    product = mixed[at].store(qk * scales[0].load() * scales[1].load())
    d = body.loop(kind.key_dim)
    scaled = [
        mixed.after(scales)[s + d].store(mixed.after(scales)[s + d].load() * scales[i].load())
        for i, s in enumerate(starts)
    ]
    return UOp.group(product, UOp.group(*scaled).end(d)).end(head)


def _gates(
    spec: CpuRecurrentSpec, body: Body, mixed: UOp, row: UOp, source: Inputs, tables: Many[UOp]
) -> Iterator[UOp]:
    """Stores of the row's decays and betas."""
    kind, (log_decay, bias), exp2 = spec.kind, tables, CPU_ARITHMETIC.exp2
    start = row * spec.mixed_cols + kind.conv_size
    for run in runs(spec, DECAYS):
        i = body.loop(run.count)
        head = i + (spec.first * spec.group + run.start)
        exponent = decay_exponent(source.load(run, row, i), log_decay[head].load(), bias[head].load())
        yield mixed[start + run.start + i].store(exp2(exponent)).end(i)
    for run in runs(spec, BETAS):
        i = body.loop(run.count)
        beta = (exp2(source.load(run, row, i) * -LOG2E) + 1.0).reciprocal()
        yield mixed[start + kind.num_heads + run.start + i].store(beta).end(i)


@cached_kernel
def walk_kernel(spec: CpuRecurrentSpec) -> KernelFn:
    """fn(o (T, Hv * Dv), matrices, convs, inputs, mixed, *shards that hold q, k, v): each sequence's rows one after
    another, of the core's heads. Moves the states to the slots where they go."""

    def kernel(o: UOp, matrices: UOp, convs: UOp, inputs: UOp, mixed: UOp, *shards: UOp) -> UOp:
        kind, layout, body = spec.kind, spec.layout, Body()
        seq = body.grid(layout.num_seqs) if layout.num_seqs > 1 else body.loop(1)
        sequence = sequence_at(spec, inputs, seq)
        walk = _Walk(spec, body, sequence, seq, mixed)
        kept = _keep(spec, body, Inputs(spec, CONVOLVED, shards, convs, sequence), seq)
        done = UOp.group(walk.run(o, matrices), *kept).end(seq)
        tokens, seqs = layout.num_tokens, min(layout.num_seqs, layout.num_tokens)
        name = f"walk_{tokens}x{kind.num_heads}x{kind.key_dim}x{kind.value_dim}"
        nbytes = 2 * seqs * kind.num_bytes + 4 * tokens * (spec.mixed_cols + kind.value_size)
        return finish(done, name, ops=7 * tokens * kind.matrix_elements, nbytes=nbytes)

    return kernel


class _Walk:
    """The walk along one sequence's rows, for one head and block of columns at a time."""

    def __init__(self, spec: CpuRecurrentSpec, body: Body, sequence: Sequence, seq: UOp, mixed: UOp) -> None:
        self.spec, self.body, self.sequence, self.mixed = spec, body, sequence, mixed
        kind, self.cols = spec.kind, spec.block_cols
        self.head, self.block = body.loop(kind.num_heads), body.loop(kind.value_dim // self.cols)
        self.outer = (seq, self.head, self.block)
        self.is_used = sequence.count > 0

    def run(self, o: UOp, matrices: UOp) -> UOp:
        """Stores of the outputs and of the new state."""
        state, sequence = self._load(matrices), self.sequence
        if self.spec.max_rows == 1:
            done = self._step(o, sequence.first_row, state, self.outer)
        else:
            loop = self.body.fold_while(sequence.count)
            row = clamp(sequence.first_row + loop, 0, self.spec.layout.num_tokens - 1)
            done = self._step(o, row, state, (loop,)).end(loop)
        return self._store(matrices, state.after(done)).end(self.block, self.head)

    def _place(self, slot: UOp, d: UOp, c: UOp) -> UOp:
        kind = self.spec.kind
        return ((slot * kind.num_heads + self.head) * kind.key_dim + d) * kind.value_dim + self.block * self.cols + c

    def _load(self, matrices: UOp) -> UOp:
        """The block of the old state, on the stack."""
        state = self.body.registers(self.spec.kind.key_dim * self.cols)
        d, c = self._rows(), self.body.loop(self.cols)
        value = matrices[self._place(self.sequence.read_slot, d, c)].load()
        value = self.sequence.is_new.where(0.0, value)
        return state.after(state.after(*self.outer)[d * self.cols + c].store(value).end(c, d))

    def _rows(self) -> UOp:
        """A loop over the block's rows; over none if the sequence is not in the step."""
        return self.body.fold_while(self.is_used.where(UOp.const(self.spec.kind.key_dim, I32), 0))

    def _store(self, matrices: UOp, state: UOp) -> UOp:
        d, c = self._rows(), self.body.loop(self.cols)
        value = state[d * self.cols + c].load()
        return matrices[self._place(self.sequence.write_slot, d, c)].store(value).end(c, d)

    def _step(self, o: UOp, row: UOp, state: UOp, outer: tuple[UOp, ...]) -> UOp:
        """Stores of a row's outputs and of the state after it, inside the loops of `outer`."""
        spec, body, kind, cols = self.spec, self.body, self.spec.kind, self.cols
        base = row * spec.mixed_cols
        key_head = self.head // spec.group
        q, k = (base + i * kind.key_size + key_head * kind.key_dim for i in range(2))
        gates = base + kind.conv_size
        decay, beta = (self.mixed[gates + i * kind.num_heads + self.head].load() for i in range(2))
        product = self.mixed[gates + 2 * kind.num_heads + key_head].load()
        # o = S^T q with the new S, in terms of the old one, which is read once for both sums
        sums = fill(body, body.registers(2 * cols), 0.0, *outer, state)
        d, c = self._rows(), body.loop(cols)
        inner, value = sums.after(d), state.after(*outer)[d * cols + c].load()
        factors = [self.mixed[start + d].load() for start in (k, q)]
        new = [inner[i * cols + c].store(inner[i * cols + c].load() + value * f) for i, f in enumerate(factors)]
        sums = sums.after(UOp.group(*new).end(c, d))
        delta, c = body.registers(cols), body.loop(cols)
        column = self.head * kind.value_dim + self.block * cols + c
        v = self.mixed[base + 2 * kind.key_size + column].load()
        change = beta * (v - decay * sums[c].load())
        value = decay * sums[cols + c].load() + product * change
        stored = UOp.group(delta.after(*outer)[c].store(change), o[row * kind.value_size + column].store(value)).end(c)
        d, c = self._rows(), body.loop(cols)
        target, key = state.after(*outer, stored)[d * cols + c], self.mixed[k + d].load()
        return target.store(target.load() * decay + key * delta.after(stored)[c].load()).end(c, d)


def _keep(spec: CpuRecurrentSpec, body: Body, source: Inputs, seq: UOp) -> Iterator[UOp]:
    """Stores of the last inputs of the convolution, the oldest first."""
    kind, sequence = spec.kind, source.sequence
    for section in CONVOLVED:
        own = spec.own_channel(section)
        for run in runs(spec, section):
            for age in reversed(range(kind.conv_width - 1)):
                offset = sequence.count - 1 - age
                position = sequence.position + offset
                wanted = (sequence.count > 0) & (position >= 0) & ((offset >= 0) | sequence.is_moved)
                i = body.fold_while(wanted.where(UOp.const(run.count, I32), 0))
                channel = i + (own + run.start)
                row = clamp(sequence.first_row + offset, 0, spec.layout.num_tokens - 1)
                old = source.place(sequence.read_slot, position.maximum(0), channel)
                value = (offset >= 0).where(source.load(run, row, i), source.convs[old].load())
                at = source.place(sequence.write_slot, position.maximum(0), channel)
                yield source.convs[at].store(value).end(i)


@cached_kernel
def gate_kernel(spec: CpuRecurrentSpec) -> KernelFn:
    """fn(out (T, Hv * Dv), inputs, o, norm, *shards that hold z): RMSNorm(o) * norm * SiLU(z) of each head; zeros in
    rows of padding."""

    def kernel(out: UOp, inputs: UOp, o: UOp, norm: UOp, *shards: UOp) -> UOp:
        kind, body, tokens = spec.kind, Body(), spec.layout.num_tokens
        row, lanes = body.loop(tokens), gcd(kind.value_dim, LANES)
        sequence, is_real = sequence_of(spec, inputs, row)
        source = Inputs(spec, GATED, shards, o, sequence)
        head = body.loop(kind.num_heads)
        sums = fill(body, body.registers(lanes), 0.0, row, head)
        chunk, lane = body.fold(kind.value_dim // lanes), body.loop(lanes)
        value, inner = o[row * kind.value_size + head * kind.value_dim + chunk * lanes + lane].load(), sums.after(chunk)
        sums = sums.after(inner[lane].store(inner[lane].load() + value * value).end(lane, chunk))
        mean = balanced(sums[i].load() for i in range(lanes)) * (1.0 / kind.value_dim)
        scales = body.registers(kind.num_heads)
        found = scales.after(row)[head].store((mean + kind.norm_eps).sqrt().reciprocal())
        scales, done = scales.after(found.end(head)), []
        for run in runs(spec, GATES, kind.value_dim):
            unit, i = body.loop(run.count), body.loop(run.size)
            col = unit * run.size + i
            at = row * kind.value_size + run.start + col
            value = (
                o[at].load()
                * scales[unit + run.start // kind.value_dim].load()
                * norm[(i + run.start) % kind.value_dim].load()
            )
            value = value * CPU_ARITHMETIC.swish(source.load(run, row, col), 1.0)
            done.append(out[at].store(is_real.where(value, 0.0)).end(i, unit))
        size = tokens * kind.value_size
        name = f"gate_heads_{tokens}x{kind.num_heads}x{kind.value_dim}"
        return finish(UOp.group(*done).end(row), name, ops=6 * size, nbytes=12 * size)

    return kernel
