"""Recurrent layers on devices with threadgroups, in a form that any step can take: three kernels.

The first convolves and computes the gates, for each row on its own. The second walks along each sequence's rows with
its state in registers; columns of the state are independent, so that they are divided between threads. The third norms
and gates the outputs.
"""

from __future__ import annotations

from collections.abc import Sequence as Many

from tinygrad import Tensor, UOp

from tinyvllm.ops.backend import Step
from tinyvllm.ops.gpu.recurrent_rows import GpuRecurrentSpec, Inputs, Projections, gate_heads, mix_rows
from tinyvllm.ops.kernel.body import F32, Body, KernelFn, cached_kernel, clamp, empty, finish, run_kernel
from tinyvllm.ops.kernel.lanes import axes_of, dot, grid
from tinyvllm.ops.recurrent_spec import CONVOLVED, RecurrentLayer, sequence_at


def recur_by_rows(
    spec: GpuRecurrentSpec, out: Tensor, layer: RecurrentLayer, step: Step, parts: Many[Tensor]
) -> Tensor:
    """A recurrent layer's outputs, written to `out`; its states, to the pool."""
    matrices, convs = step.pool.matrices[layer.index], step.pool.convs[layer.index]
    assert isinstance(matrices, Tensor) and isinstance(convs, Tensor)
    units, mixed = mix_rows(spec, layer, step, parts)
    o = empty(step.num_tokens * spec.kind.value_size, F32, str(out.device))
    read = [step.inputs, units, mixed, *[parts[i] for i in spec.parts(*CONVOLVED)]]
    o, *_ = run_kernel(walk_kernel(spec), [o, matrices, convs], read)
    return gate_heads(spec, out, layer, step, parts, o)


@cached_kernel
def walk_kernel(spec: GpuRecurrentSpec) -> KernelFn:
    """fn(o (T, Hv * Dv), matrices, convs, inputs, units, mixed, *parts): each sequence's rows one after another, in
    float32. Moves the states to the slots where they go."""

    def kernel(o: UOp, matrices: UOp, convs: UOp, inputs: UOp, units: UOp, mixed: UOp, *rest: UOp) -> UOp:
        walk = _Walk(spec, inputs, units, mixed, matrices)
        done, state = walk.run(o)
        stores = [done, *walk.store(matrices, state)]
        projections = Projections(spec, rest, *CONVOLVED)
        stores += walk.keep(Inputs(projections, convs, convs, walk.sequence))
        kind, layout = spec.kind, spec.layout
        tokens, seqs = layout.num_tokens, min(layout.num_seqs, layout.num_tokens)
        name = f"walk_{tokens}x{kind.num_heads}x{kind.key_dim}x{kind.value_dim}"
        ops = 7 * tokens * kind.matrix_elements
        nbytes = 2 * seqs * kind.num_bytes + 4 * tokens * (spec.unit_cols + spec.mixed_cols + kind.value_size)
        return finish(UOp.group(*stores).end(*reversed(walk.axes)), name, ops=ops, nbytes=nbytes)

    return kernel


class _Walk:
    """A thread's work: some rows of a column of one sequence's and head's state."""

    def __init__(self, spec: GpuRecurrentSpec, inputs: UOp, units: UOp, mixed: UOp, matrices: UOp) -> None:
        self.spec, self.units, self.mixed, self.matrices, self.body = spec, units, mixed, matrices, Body()
        kind, layout = spec.kind, spec.layout
        self.threads = spec.across * spec.down
        seq, self.head = grid(self.body, layout.num_seqs), grid(self.body, kind.num_heads)
        self.block = grid(self.body, kind.value_dim // spec.across)
        self.thread = self.body.threads(self.threads)
        self.axes = axes_of(seq, self.head, self.block, self.thread)
        self.sequence = sequence_at(spec, inputs, seq)
        self.column = self.block * spec.across + self.thread // spec.down

    def place(self, slot: UOp, i: int) -> UOp:
        """The index of the thread's i-th element in the pool."""
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
        base, rows = row * spec.mixed_cols, [spec.row(self.thread, i) for i in range(spec.rows)]
        key = row * spec.unit_cols + self.head // spec.group * kind.key_dim
        q, k = ([self.units[key + start + i].load() for i in rows] for start in (0, kind.key_size))
        v = self.mixed[base + self.head * kind.value_dim + self.column].load()
        decay, beta = (self.mixed[base + start + self.head].load() for start in spec.gate_starts)
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
