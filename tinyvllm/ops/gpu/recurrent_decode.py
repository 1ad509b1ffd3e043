"""Decoding recurrent layers on CUDA and METAL: convolution, gates, the delta rule and the gated norm in one kernel.

A threadgroup serves one row and value head. Its threads hold the head's state in registers, so the state is read once
and written once. Lanes of a warp share columns: each holds some rows of four. All sums over rows (k^T S, S^T q, and
those that norm q and k) are over the same lanes, at the same time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tinygrad import Tensor, UOp

from tinyvllm.ops.backend import Step
from tinyvllm.ops.coverage import in_words
from tinyvllm.ops.gpu.recurrent_rows import VECTOR, GpuRecurrentSpec, Inputs, Projections, columns, sigmoid, silu
from tinyvllm.ops.gpu.row_sum import add_warps
from tinyvllm.ops.kernel.body import Body, KernelFn, balanced, cached_kernel, finish, run_kernel
from tinyvllm.ops.kernel.lanes import LANES, Lanes, await_previous, axes_of, dot, grid, warps
from tinyvllm.ops.recurrent_spec import (
    BETAS,
    DECAYS,
    GATES,
    KEYS,
    QUERIES,
    UNIT_EPS,
    VALUES,
    RecurrentLayer,
    decay_exponent,
    sequence_at,
)

RUN = VECTOR  # columns of a thread
SECTIONS = (QUERIES, KEYS, VALUES, GATES, BETAS, DECAYS)


@dataclass(frozen=True, kw_only=True)
class DecodeStateSpec(GpuRecurrentSpec):
    """A recurrent layer in steps of one row a sequence. `lanes` are those of the device."""

    lanes: Lanes

    @property
    def down(self) -> int:
        """Lanes that share columns. On an H200, 64 rows of 48 heads take 110 us with 4, 170 us with 8 and 188 us with
        16 of them; 4 need 128 registers for the state, which METAL has too few of."""
        fewest = 4 if self.lanes.kind == "CUDA" and self.kind.value_dim % (LANES // 4 * RUN) == 0 else 8
        return self.knob("down", fewest)

    def knobs(self) -> Mapping[str, tuple[int, ...]]:
        return {"down": (4, 8, 16)}

    def is_possible(self) -> bool:
        return not self.uncovered_shape()

    @property
    def across(self) -> int:
        """Columns of a warp."""
        return LANES // self.down * RUN

    @property
    def num_warps(self) -> int:
        return self.kind.value_dim // self.across

    def uncovered_shape(self) -> str:
        """What of the layer's shape the kernel does not cover, in words; "" if it covers it."""
        kind = self.kind
        return in_words(
            [f"keys of {kind.key_dim}"] * (kind.key_dim % self.down > 0)
            + [f"values of {kind.value_dim}"] * (kind.value_dim % self.across > 0 or self.num_warps * LANES > 1024)
        )


def recur_rows(spec: DecodeStateSpec, out: Tensor, layer: RecurrentLayer, step: Step, parts: list[Tensor]) -> Tensor:
    """A recurrent layer's outputs, written to `out`; its states, to the pool."""
    matrices, convs = step.pool.matrices[layer.index], step.pool.convs[layer.index]
    assert isinstance(matrices, Tensor) and isinstance(convs, Tensor)
    read = [step.inputs, layer.conv, layer.log_decay, layer.decay_bias, layer.norm, *parts]
    return run_kernel(decode_state_kernel(spec), [out, matrices, convs], read)[0]


@cached_kernel
def decode_state_kernel(spec: DecodeStateSpec) -> KernelFn:
    """fn(out (T, Hv * Dv), matrices, convs, inputs, conv, log_decay, decay_bias, norm, *parts). Rows of padding write
    to slot 0."""

    def kernel(out: UOp, matrices: UOp, convs: UOp, inputs: UOp, *rest: UOp) -> UOp:
        head = _Head(spec, inputs, matrices)
        old = head.load(matrices)
        parts = await_previous(spec.lanes, *rest[4:], ahead=[value for row in old for value in row])
        source = Inputs(Projections(spec, parts, *SECTIONS), convs, rest[0], head.sequence)
        new, outputs = head.step(old, head.mix(source), head.gates(source, *rest[1:3]))
        stores = [*head.store(matrices, new), *head.keep(source), *head.finish(out, outputs, source, rest[3])]
        kind, tokens = spec.kind, spec.layout.num_tokens
        name = f"decode_state_{tokens}x{kind.num_heads}x{kind.key_dim}x{kind.value_dim}"
        nbytes = 2 * tokens * kind.num_bytes + 4 * tokens * sum(spec.cols) + 2 * tokens * kind.value_size
        done = UOp.group(*stores).end(*reversed(head.axes))
        return finish(done, name, ops=7 * tokens * kind.matrix_elements, nbytes=nbytes)

    return kernel


@dataclass(frozen=True)
class _Gates:
    """A head's decay and beta in a row."""

    decay: UOp
    beta: UOp


class _Head:
    """A thread's part of one row's value head: some rows of RUN columns of its state."""

    def __init__(self, spec: DecodeStateSpec, inputs: UOp, matrices: UOp) -> None:
        self.spec, self.body = spec, Body()
        body, kind = self.body, spec.kind
        self.row, self.head = grid(body, spec.layout.num_tokens), grid(body, kind.num_heads)
        self.lane, self.warp = body.threads(LANES), warps(body, spec.num_warps)
        self.axes = axes_of(self.row, self.head, self.lane, self.warp)
        self.thread, self.threads = self.warp * LANES + self.lane, spec.num_warps * LANES
        self.sequence = sequence_at(spec, inputs, self.row)
        self.rows = [spec.row(self.lane, i) for i in range(spec.rows)]
        self.column = self.warp * spec.across + self.lane // spec.down * RUN
        self.masks = [1 << i for i in range(spec.down.bit_length() - 1)]

    def _place(self, slot: UOp, row: UOp) -> UOp:
        """Where the thread's columns of a row begin in the pool."""
        kind = self.spec.kind
        return ((slot * kind.num_heads + self.head) * kind.key_dim + row) * kind.value_dim + self.column

    def load(self, matrices: UOp) -> list[list[UOp]]:
        """The thread's elements of the old state, by row."""
        starts = [self._place(self.sequence.read_slot, row) for row in self.rows]
        return [[matrices[start + c].load() for c in range(RUN)] for start in starts]

    def store(self, matrices: UOp, new: list[list[UOp]]) -> list[UOp]:
        starts = [self._place(self.sequence.write_slot, row) for row in self.rows]
        return [
            matrices[start + c].store(value)
            for start, row in zip(starts, new, strict=True)
            for c, value in enumerate(row)
        ]

    @property
    def _ranges(self) -> list[tuple[int, UOp | int, int]]:
        """(section, first column, columns) of what the head reads of q, k and v."""
        kind, key = self.spec.kind, self.head // self.spec.group * self.spec.kind.key_dim
        value = self.head * kind.value_dim
        return [(QUERIES, key, kind.key_dim), (KEYS, key, kind.key_dim), (VALUES, value, kind.value_dim)]

    def mix(self, source: Inputs) -> UOp:
        """The row's convolved q, k and v, one after another in threadgroup memory."""
        kind, start, stores = self.spec.kind, 0, []
        shared = self.body.shared(2 * kind.key_dim + kind.value_dim)
        for section, first, size in self._ranges:
            for col, inside in columns(0, size, self.thread, self.threads):
                (value,) = source.mixed(section, self.row, first + col)
                stores.append(shared[(start + col).valid(inside)].store(value))
            start += size
        return shared.after(UOp.group(*stores))

    def keep(self, source: Inputs) -> list[UOp]:
        """Stores of the convolution's last inputs; those of queries and keys by the first head that reads them."""
        is_first = (self.thread * 0 + self.head % self.spec.group).eq(0)
        return [
            store
            for section, first, size in self._ranges
            for col, inside in columns(0, size, self.thread, self.threads)
            for store in source.keep(section, first + col, inside if section == VALUES else inside & is_first)
        ]

    def gates(self, source: Inputs, log_decay: UOp, bias: UOp) -> _Gates:
        (a,), (b,) = (source.projections.load(section, self.row, self.head) for section in (DECAYS, BETAS))
        exponent = decay_exponent(a, log_decay[self.head].load(), bias[self.head].load())
        return _Gates(exponent.exp2(), sigmoid(b))

    def step(self, old: list[list[UOp]], mixed: UOp, gates: _Gates) -> tuple[list[list[UOp]], list[UOp]]:
        """(the thread's elements of the new state, the outputs of its columns)."""
        kind, is_new = self.spec.kind, self.sequence.is_new
        old = [[is_new.where(0.0, value) for value in row] for row in old]
        q, k = ([mixed[start + row].load() for row in self.rows] for start in (0, kind.key_dim))
        v = [mixed[2 * kind.key_dim + self.column + c].load() for c in range(RUN)]
        by_column = [[row[c] for row in old] for c in range(RUN)]
        sums = [dot(q, q), dot(k, k), dot(q, k), *[dot(x, s) for x in (k, q) for s in by_column]]
        qq, kk, qk, *sums = [self.spec.lanes.sum(value, self.masks) for value in sums]
        q_scale = (qq + UNIT_EPS).sqrt().reciprocal() * kind.key_dim**-0.5
        k_scale = (kk + UNIT_EPS).sqrt().reciprocal()
        # what is added to the state is k times this, by column; o = S^T q in terms of the old state, so that no sum
        # waits for another
        added = [
            (value - gates.decay * k_scale * known) * (gates.beta * k_scale)
            for value, known in zip(v, sums[:RUN], strict=True)
        ]
        outputs = [q_scale * (gates.decay * s + qk * x) for s, x in zip(sums[RUN:], added, strict=True)]
        new = [
            [gates.decay * s + key * x for s, x in zip(row, added, strict=True)]
            for row, key in zip(old, k, strict=True)
        ]
        return new, outputs

    def finish(self, out: UOp, outputs: list[UOp], source: Inputs, norm: UOp) -> list[UOp]:
        """Stores of the head's outputs, normed and gated. Of the lanes that share columns, the first write one each."""
        spec, kind = self.spec, self.spec.kind
        squares = spec.lanes.sum(balanced(o * o for o in outputs), [mask for mask in _masks() if mask >= spec.down])
        total = [squares]
        if spec.num_warps > 1:
            zero = self.lane * 0
            total = add_warps(self.body, total, self.warp, zero, spec.num_warps, 1, self.lane)
        scale = (total[0] * (1.0 / kind.value_dim) + kind.norm_eps).sqrt().reciprocal()
        which = self.lane % spec.down
        own = outputs[RUN - 1]
        for c in reversed(range(RUN - 1)):
            own = which.eq(c).where(outputs[c], own)
        column = self.column + (which.minimum(RUN - 1) if spec.down > RUN else which)
        (z,) = source.projections.load(GATES, self.row, self.head * kind.value_dim + column)
        value = own * scale * norm[column].load() * silu(z, spec.lanes)
        value = (self.sequence.count > 0).where(value, 0.0)
        at = self.row * kind.value_size + self.head * kind.value_dim + column
        return [out[at.valid(which < RUN)].store(value.cast(out.dtype))]


def _masks() -> list[int]:
    return [1 << i for i in range(LANES.bit_length() - 1)]
