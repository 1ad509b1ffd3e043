"""What a recurrent layer computes, once for all of its kernels: what turns its projections and a sequence's state into
its output.

A model passes a `RecurrentLayer`. `RecurrentSpec` is the hashable part of it, which selects and shapes the kernels.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, Self

from tinygrad import Tensor, UOp

from tinyvllm.config import StateKind
from tinyvllm.ops.kernel.body import LN2, LOG2E, clamp, exp2, log2
from tinyvllm.ops.kernel.tuning import Tunable
from tinyvllm.ops.step_inputs import StepLayout

QUERIES, KEYS, VALUES, GATES, BETAS, DECAYS = range(6)  # sections of the projections: q, k, v, z, b, a
CONVOLVED = (QUERIES, KEYS, VALUES)
UNIT_EPS = 1e-6  # added to the sum of squares of a query or key before it is normed to length 1


@dataclass(frozen=True)
class RecurrentLayer:
    """One Gated DeltaNet layer's tables. `cols`: columns of each part of its projections, which hold q, k, v, z, b and
    a one after another, and perhaps columns of zeros.

    For each token, with q, k, v = SiLU(conv(projections)): q and k of each head are normed to length 1, and q is
    multiplied by Dk ** -0.5. Then for each value head (Yang et al. 2024, eq. 10), with decay = exp(-exp(log_decay) *
    softplus(a + decay_bias)) and beta = sigmoid(b):

        S = decay * S;  S = S + k (beta * (v - k^T S))^T;  o = S^T q;  out = RMSNorm(o) * norm * SiLU(z)
    """

    index: int  # the layer's number, and its place in the pool
    kind: StateKind
    cols: tuple[int, ...]
    conv: Tensor  # (conv_width, conv_size) float32, flat: the oldest tap first
    log_decay: Tensor  # (Hv,) float32: A_log
    decay_bias: Tensor  # (Hv,) float32: dt_bias
    norm: Tensor  # (Dv,) float32


def section_sizes(kind: StateKind) -> tuple[int, ...]:
    """Columns of each section of the projections."""
    return (kind.key_size, kind.key_size, kind.value_size, kind.value_size, kind.num_heads, kind.num_heads)


@dataclass(frozen=True, kw_only=True)
class RecurrentSpec(Tunable):
    """A recurrent layer in steps of one layout. Hashable: kernels are cached by it."""

    layout: StepLayout
    kind: StateKind
    cols: tuple[int, ...]  # as in RecurrentLayer
    num_slots: int
    is_decode: bool  # sequence s has row s alone

    @classmethod
    def of(cls, layer: RecurrentLayer, layout: StepLayout, num_slots: int, is_decode: bool, **more: Any) -> Self:
        """The spec of a layer. `more`: fields to override, and those of a subclass."""
        fields: dict[str, Any] = dict(
            layout=layout, kind=layer.kind, cols=layer.cols, num_slots=num_slots, is_decode=is_decode
        )
        return cls(**fields | more)

    @property
    def group(self) -> int:
        """Value heads that share a head of queries and keys."""
        return self.kind.num_heads // self.kind.num_key_heads

    @property
    def max_rows(self) -> int:
        """Rows that a sequence may have in a step."""
        return 1 if self.is_decode else self.layout.num_tokens

    def section_start(self, section: int) -> int:
        """The first column of a section in the projections."""
        return sum(section_sizes(self.kind)[:section])

    @property
    def is_whole(self) -> bool:
        """Whether every section is in one part of the projections."""
        ends, starts = list(accumulate(self.cols)), list(accumulate(section_sizes(self.kind), initial=0))
        return all(
            any(end - cols <= a and b <= end for end, cols in zip(ends, self.cols, strict=True))
            for a, b in pairwise(starts)
        )

    def place(self, section: int) -> tuple[int, int]:
        """(the part that holds a section, where the section begins there)."""
        start, part = self.section_start(section), 0
        while start >= self.cols[part]:
            start, part = start - self.cols[part], part + 1
        assert start + section_sizes(self.kind)[section] <= self.cols[part], f"section {section} is in several parts"
        return part, start

    def parts(self, *sections: int) -> tuple[int, ...]:
        """The parts that hold some sections. A kernel must read every buffer that it is given, else the arguments of
        its calls on CUDA and OpenCL do not match."""
        return tuple(sorted({self.place(section)[0] for section in sections}))


@dataclass(frozen=True)
class Sequence:
    """One sequence of a step inside a kernel."""

    first_row: UOp
    count: UOp  # rows; 0: there is nothing to compute
    position: UOp  # of its first row
    read_slot: UOp
    write_slot: UOp

    @property
    def is_new(self) -> UOp:
        """Whether it starts from zeros."""
        return self.position.eq(0)

    @property
    def is_moved(self) -> UOp:
        """Whether its state is written to another slot than it is read from."""
        return self.read_slot.ne(self.write_slot)


def sequence_at(spec: RecurrentSpec, inputs: UOp, index: UOp | int) -> Sequence:
    """The step's sequence number `index`."""
    layout, tokens = spec.layout, spec.layout.num_tokens
    reads, writes = (
        clamp(inputs[layout.offset(name) + index].load(), 0, spec.num_slots - 1)
        for name in ("state_reads", "state_writes")
    )
    if spec.is_decode:
        first, count = index + UOp.const(0, reads.dtype), UOp.const(1, reads.dtype)
    else:
        at = layout.offset("first_rows") + index
        first = clamp(inputs[at].load(), 0, tokens - 1)
        begin, end = (clamp(inputs[place].load(), 0, tokens) for place in (at, at + 1))
        count = (end - begin).maximum(0)
    count = (writes > 0).where(count, 0)
    position = inputs[layout.offset("positions") + first].load().maximum(0)
    return Sequence(first, count, position, reads, writes)


def sequence_of(spec: RecurrentSpec, inputs: UOp, row: UOp | int) -> tuple[Sequence, UOp]:
    """(the sequence that a row belongs to, whether the row is not padding)."""
    layout = spec.layout
    if spec.is_decode:
        sequence = sequence_at(spec, inputs, row)
        return sequence, sequence.count > 0
    number = clamp(inputs[layout.offset("seq_rows") + row].load(), 0, layout.num_seqs)
    sequence = sequence_at(spec, inputs, number.minimum(layout.num_seqs - 1))
    return sequence, (number < layout.num_seqs) & (sequence.count > 0)


def decay_exponent(a: UOp, log_decay: UOp, bias: UOp) -> UOp:
    """log2 of the decay: -exp(log_decay) * softplus(a + bias) / ln 2, in arithmetic that vectorizes."""
    x = a + bias
    softplus = x.maximum(0.0) + log2(exp2(x.maximum(x * -1.0) * -LOG2E) + 1.0) * LN2
    return exp2(log_decay * LOG2E) * softplus * -LOG2E
