"""What the attention kernels on matrix units have in common: decoding (attention_decode.py) and prompts
(attention_prefill.py)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar

from tinygrad import UOp

from tinyvllm.ops.attention_spec import AttentionSpec
from tinyvllm.ops.kernel.body import F32
from tinyvllm.ops.kernel.lanes import Lanes, Mma, load_floats

RUN = 8  # consecutive dimensions that a lane loads at once
QUANTIZED_DIMS = (64, 128, 256)  # of heads whose keys or values are quantized
COVERED = (  # among the features of AttentionSpec
    "a window",
    "sinks",
    "a softcap",
    "biases",
    "normed values",
    "no rope",
    "partial rope",
    "interleaved rope",
    "another layer's keys",
    "scaled queries",
)


@dataclass(frozen=True, kw_only=True)
class FusedAttentionSpec(AttentionSpec):
    """Attention over a pool in float16 or quantized, on a matrix unit, from qkv as partial sums that are not added up
    yet."""

    max_group: ClassVar[int] = 32  # the most query heads that may share a KV head

    lanes: Lanes
    mma: Mma
    qkv_partials: tuple[int, ...]  # S for each part of qkv, whose shape is (S, T, columns)

    def uncovered_shape(self) -> str:
        """Why the kernels do not cover this layer, in words; "" if they do."""
        if rest := self.uncovered(COVERED):
            return rest
        if self.kv.is_quantized and self.head_dim not in QUANTIZED_DIMS:
            return f"heads of {self.head_dim} in {self.kv.name}"
        if self.head_dim not in self.head_dims or self.group > self.max_group:
            return f"{self.num_heads} over {self.num_kv_heads} heads of {self.head_dim}"
        # a run and its partners must not be in part rotated
        if self.rotary % (RUN if self.is_interleaved else 2 * RUN):
            return f"rope of {self.rotary} dimensions"
        return "" if self.holds_whole_sections() else "queries, keys and values that share a matrix in parts"

    @property
    def head_dims(self) -> tuple[int, ...]:
        """The sizes of heads that the kernel covers."""
        raise NotImplementedError

    def section(self, index: int) -> tuple[int, int]:
        """(part of qkv, its column) where the queries (0), keys (1) or values (2) begin."""
        start = self.section_start(index)
        ends = list(accumulate(self.qkv_cols))
        part = next(i for i, end in enumerate(ends) if end > start)
        return part, start - (ends[part] - self.qkv_cols[part])

    def query_scale_at(self, rope: UOp | None, position: UOp) -> UOp | float:
        """What rotated queries at a position are multiplied by."""
        if not self.scales_queries or rope is None:
            return self.query_scale
        return rope[position * self.rope_cols + self.rotary].load() * self.query_scale

    # -- rope (Su et al. 2021) by runs of eight dimensions -------------------------------------------------------------

    def rope_factors(self, rope: UOp, position: UOp, dim: UOp) -> tuple[list[UOp], list[UOp]]:
        """Cosines and sines of dimensions [dim, dim + 8) at a position, a sine with the sign of its partner. Those of
        some other dimensions, if these are not rotated."""
        half = self.rotary // 2
        inside = dim if self.rotary == self.head_dim else (dim < self.rotary).where(dim, 0)
        start = position * self.rope_cols
        if self.is_interleaved:
            at = start + inside // 2
            cos, sin = load_floats(rope, at, RUN // 2), load_floats(rope, at + half, RUN // 2)
            return [c for c in cos for _ in range(2)], [value for s in sin for value in (s * -1.0, s)]
        at = start + inside % half
        sign = (inside < half).where(UOp.const(-1.0, F32), UOp.const(1.0, F32))
        return load_floats(rope, at, RUN), [s * sign for s in load_floats(rope, at + half, RUN)]

    def partner_dim(self, dim: UOp) -> UOp | None:
        """Where the partners of dimensions [dim, dim + 8) begin; None if these are each other's."""
        half = self.rotary // 2
        if self.is_interleaved:
            return None
        if self.rotary == self.head_dim:
            return (dim + half) % self.rotary
        return (dim < half).where(dim + half, (dim < self.rotary).where(dim - half, dim))

    def rotated_run(self, rope: UOp, position: UOp, dim: UOp, load: Callable[[UOp], list[UOp]]) -> list[UOp]:
        """Dimensions [dim, dim + 8) of a head, rotated. `load`: eight dimensions of it from one on."""
        here, other = load(dim), self.partner_dim(dim)
        partner = [here[i ^ 1] for i in range(RUN)] if other is None else load(other)
        cos, sin = self.rope_factors(rope, position, dim)
        rotated = [a * c + b * s for a, b, c, s in zip(here, partner, cos, sin, strict=True)]
        if self.rotary == self.head_dim:
            return rotated
        return [(dim < self.rotary).where(new, old) for new, old in zip(rotated, here, strict=True)]
