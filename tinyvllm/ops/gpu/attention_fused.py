"""What the attention kernels on matrix units have in common: decoding (attention_decode.py) and prompts
(attention_prefill.py)."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar

from tinyvllm.ops.attention_spec import AttentionSpec
from tinyvllm.ops.kernel.lanes import Lanes, Mma

COVERED = ("a window", "a softcap", "biases", "no rope")  # among the features of AttentionSpec


@dataclass(frozen=True, kw_only=True)
class FusedAttentionSpec(AttentionSpec):
    """Attention over a float16 pool on a matrix unit, from qkv as partial sums that are not added up yet."""

    max_group: ClassVar[int]  # the most query heads that may share a KV head

    lanes: Lanes
    mma: Mma
    qkv_partials: tuple[int, ...]  # S for each part of qkv, whose shape is (S, T, columns)

    def uncovered_shape(self) -> str:
        """Why the kernels do not cover this layer, in words; "" if they do."""
        if rest := self.uncovered(COVERED):
            return rest
        if self.head_dim not in (64, 128) or self.group > self.max_group:
            return f"{self.num_heads} over {self.num_kv_heads} heads of {self.head_dim}"
        return "" if self.holds_whole_sections() else "queries, keys and values that share a matrix in parts"

    def section(self, index: int) -> tuple[int, int]:
        """(part of qkv, its column) where the queries (0), keys (1) or values (2) begin."""
        start = self.section_start(index)
        ends = list(accumulate(self.qkv_cols))
        part = next(i for i, end in enumerate(ends) if end > start)
        return part, start - (ends[part] - self.qkv_cols[part])
