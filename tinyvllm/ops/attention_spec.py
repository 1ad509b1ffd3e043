"""What attention computes, once for all of its kernels: scale, softcap, masks, sinks, rope, heads' norms, biases.

A model passes an `AttentionLayer`. `AttentionSpec` is the hashable part of it, which selects and shapes the kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any, Self

from tinygrad import Tensor, UOp

from tinyvllm.config import FLOAT16_KV, KVFormats, LayerKind
from tinyvllm.ops.activation import Exp2, tanh
from tinyvllm.ops.coverage import in_words
from tinyvllm.ops.formats.matrix import Matrix
from tinyvllm.ops.kernel.body import LOG2E, bits_of_bfloat
from tinyvllm.ops.step_inputs import StepLayout

QUERIES, KEYS, VALUES = 0, 1, 2  # sections of qkv


@dataclass(frozen=True)
class AttentionLayer:
    """One layer's attention. `qkv_cols`: columns of each part of qkv, heads of q, then k, then v, and perhaps columns
    of zeros; a layer that reads another's keys and values has only q."""

    index: int  # its number, and its place in the pool
    kind: LayerKind
    qkv_cols: tuple[int, ...]
    pool_group: int = 0  # the group of `pool_groups` whose block tables and slots it uses
    # (positions, R) float32 of R rotated dimensions: R / 2 cosines, then their sines; with query_scaling a column more
    rope: Tensor | None = None
    # (2 * D,) float32: the weight of each head of queries, then that of keys; ((H + K) * D,) if the norm is whole
    head_norm: Tensor | None = None
    bias: Tensor | None = None  # (columns of qkv,) float32
    sinks: Tensor | None = None  # (H,) float32
    reader: Matrix | None = None  # of the product that reads the result, if nothing else does; without its values

    @property
    def pool_layer(self) -> int:
        """The layer whose keys and values are read."""
        return self.index if self.kind.kv_layer is None else self.kind.kv_layer

    @property
    def key_tables(self) -> list[Tensor]:
        """The tables that apply to keys and queries, in the order of `AttentionSpec.take_tables`."""
        return [table for table in (self.rope, self.head_norm, self.bias) if table is not None]

    def without_whole_norm(self) -> AttentionLayer:
        """The rest of it for qkv in one part, to which its biases and its norm of whole queries and keys have been
        applied."""
        kind = replace(self.kind, head_norm_eps=None, head_norm_is_whole=False, has_bias=False)
        return replace(self, kind=kind, qkv_cols=(kind.q_size + 2 * kind.kv_size,), head_norm=None, bias=None)

    @property
    def tables(self) -> list[Tensor]:
        """`key_tables`, and the sinks that the softmax reads."""
        return self.key_tables + ([] if self.sinks is None else [self.sinks])


@dataclass(frozen=True)
class Tables:
    """A layer's tables inside a kernel; None for those that it does not have."""

    rope: UOp | None
    head_norm: UOp | None
    bias: UOp | None
    sinks: UOp | None


@dataclass(frozen=True)
class PoolPlanes:
    """A layer's part of the pool inside a kernel: keys and values, or their codes; None for scales that the format does
    not have."""

    keys: UOp
    values: UOp
    key_scales: UOp | None = None
    value_scales: UOp | None = None

    @property
    def all(self) -> list[UOp]:
        """In the order in which a kernel takes them."""
        return [plane for plane in (self.keys, self.values, self.key_scales, self.value_scales) if plane is not None]

    def after(self, *stores: UOp) -> PoolPlanes:
        """The same planes, to be read after `stores`."""
        scales = (plane if plane is None else plane.after(*stores) for plane in (self.key_scales, self.value_scales))
        return PoolPlanes(self.keys.after(*stores), self.values.after(*stores), *scales)


@dataclass(frozen=True)
class AttentionSpec:
    """One layer's attention of T rows over paged KV. Hashable: kernels are cached by it."""

    layout: StepLayout
    num_heads: int  # H
    num_kv_heads: int  # K
    head_dim: int  # D
    num_blocks: int
    qkv_cols: tuple[int, ...]  # as in AttentionLayer
    head_eps: float | None = None  # epsilon of the RMSNorm of each head of queries and keys; None: no norm
    value_eps: float | None = None  # of each head of values, whose norm has no weight
    score_scale: float | None = None  # None: D ** -0.5
    rotary_dims: int | None = None  # rotated dimensions of a head; None: all, 0: none
    is_interleaved: bool = False
    scales_queries: bool = False  # the rope's table has a column more: the factor of a query at this position
    window: int | None = None  # tokens that a row attends to, its own included; None: all before it
    softcap: float | None = None
    has_sinks: bool = False
    has_bias: bool = False
    writes_kv: bool = True  # False: an earlier layer's keys and values are read
    table_group: int = 0  # AttentionLayer.pool_group
    kv: KVFormats = FLOAT16_KV  # the pool's; of dtypes, a kernel takes those of its tensors
    # if these heads are one core's shard: its first KV head, and the numbers of heads and KV heads of the layer
    shard: tuple[int, int, int] | None = None
    has_bfloat_results: bool = field(default=False, repr=False)  # bfloat16's bits, in a float16 buffer

    @classmethod
    def of(cls, layer: AttentionLayer, layout: StepLayout, num_blocks: int, **more: Any) -> Self:
        """The spec of a layer. `more`: fields to override, and those of a subclass."""
        kind = layer.kind
        rope = kind.rope
        fields: dict[str, Any] = dict(
            layout=layout,
            num_heads=kind.num_heads,
            num_kv_heads=kind.num_kv_heads,
            head_dim=kind.head_dim,
            num_blocks=num_blocks,
            qkv_cols=layer.qkv_cols,
            head_eps=kind.head_norm_eps,
            value_eps=kind.value_norm_eps,
            score_scale=kind.score_scale,
            rotary_dims=0 if rope is None else rope.num_dims,
            is_interleaved=rope is not None and rope.is_interleaved,
            scales_queries=kind.query_scaling is not None,
            window=_binding(kind.window, layout),
            softcap=kind.softcap,
            has_sinks=kind.has_sinks,
            has_bias=kind.has_bias,
            writes_kv=kind.kv_layer is None,
            table_group=layer.pool_group,
        )
        return cls(**fields | more)

    def result(self, value: UOp, out: UOp) -> UOp:
        """A result as it is stored in `out`."""
        return bits_of_bfloat(value) if self.has_bfloat_results else value.cast(out.dtype)

    @property
    def group(self) -> int:
        """Query heads that share a KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def slot_elements(self) -> int:
        """Elements of one token's keys (or values)."""
        return self.num_kv_heads * self.head_dim

    @property
    def slots_start(self) -> int:
        """Where the slots of this attention's group begin in a step's inputs."""
        return self.layout.slots_offset(self.table_group)

    @property
    def tables_start(self) -> int:
        """Where the block tables of this attention's group begin in a step's inputs. A block before the window of every
        row may be 0 in its table: kernels do not read it."""
        return self.layout.table_offset(self.table_group)

    @property
    def num_slots(self) -> int:
        return self.num_blocks * self.layout.block_size

    @property
    def rotary(self) -> int:
        """Rotated dimensions of a head."""
        return self.head_dim if self.rotary_dims is None else self.rotary_dims

    @property
    def rope_cols(self) -> int:
        """Columns of the rope's table."""
        return self.rotary + self.scales_queries

    # -- scores ----------------------------------------------------------------------------------------------------

    @property
    def query_scale(self) -> float:
        """The factor that queries are multiplied by. It includes log2(e), so that scores are exponents of 2; with a
        softcap, scores are instead the argument of its tanh."""
        if self.softcap is not None:
            scale = self.head_dim**-0.5 if self.score_scale is None else self.score_scale
            return scale / self.softcap
        return LOG2E / self.head_dim**0.5 if self.score_scale is None else LOG2E * self.score_scale

    def score(self, product: UOp, exp2: Exp2) -> UOp:
        """The score, an exponent of 2, of a scaled query's product with a key."""
        return product if self.softcap is None else tanh(product, exp2) * (self.softcap * LOG2E)

    def is_seen(self, key: UOp, position: UOp) -> UOp:
        """Whether the token at `position` attends to the one at `key`: causal, and within the window."""
        seen = key <= position
        return seen if self.window is None else seen & (position - key < self.window)

    def first_key(self, position: UOp) -> UOp | int:
        """The first token that the one at `position` attends to."""
        return 0 if self.window is None else (position - (self.window - 1)).maximum(0)

    # -- operands --------------------------------------------------------------------------------------------------

    def take_planes(self, operands: list[UOp]) -> PoolPlanes:
        """A kernel's part of the pool (`KVPool.planes_of`), removed from the front of its operands."""
        keys, values = operands.pop(0), operands.pop(0)
        key_scales = operands.pop(0) if self.kv.keys.group else None
        return PoolPlanes(keys, values, key_scales, operands.pop(0) if self.kv.values.group else None)

    @property
    def num_planes(self) -> int:
        """How many operands `take_planes` takes."""
        return 2 + bool(self.kv.keys.group) + bool(self.kv.values.group)

    def take_tables(self, operands: list[UOp], *, with_sinks: bool) -> Tables:
        """A kernel's tables, removed from the front of its operands."""
        rope = operands.pop(0) if self.rotary else None
        head_norm = operands.pop(0) if self.head_eps is not None else None
        bias = operands.pop(0) if self.has_bias else None
        return Tables(rope, head_norm, bias, operands.pop(0) if with_sinks and self.has_sinks else None)

    def bias_start(self, section: int) -> int:
        """Where the biases of this shard's queries, keys or values begin among the layer's."""
        if self.shard is None:
            return self.section_start(section)
        first, heads, kv_heads = self.shard
        return (first * (heads // kv_heads), heads + first, heads + kv_heads + first)[section] * self.head_dim

    @property
    def first_head(self) -> int:
        """The number, in the layer, of this shard's first query head."""
        return 0 if self.shard is None else self.shard[0] * (self.shard[1] // self.shard[2])

    def section_start(self, section: int) -> int:
        """The first column of queries, keys or values in qkv."""
        return (0, self.num_heads, self.num_heads + self.num_kv_heads)[section] * self.head_dim

    def holds_whole_sections(self) -> bool:
        """Whether no part of qkv begins or ends inside the queries, the keys or the values."""
        ends = list(accumulate(self.qkv_cols))
        starts = {self.section_start(section) for section in (KEYS, VALUES)}
        last = self.section_start(VALUES) + self.slot_elements if self.writes_kv else self.section_start(KEYS)
        return set(ends) <= starts | {last} and ends[-1] == last

    def parts_between(self, first_col: int, end_col: int) -> slice:
        """The parts of qkv that hold columns [first_col, end_col)."""
        ends = list(accumulate(self.qkv_cols))
        starts = [0, *ends[:-1]]
        first = next(i for i, end in enumerate(ends) if end > first_col)
        last = next(i for i in reversed(range(len(ends))) if starts[i] < end_col)
        return slice(first, last + 1)

    @property
    def query_parts(self) -> slice:
        """The parts of qkv that hold queries. A kernel must read every buffer that it is given, else the arguments of
        its calls on CUDA and OpenCL do not match."""
        return self.parts_between(0, self.section_start(KEYS))

    @property
    def kv_parts(self) -> slice:
        """The parts of qkv that hold keys and values."""
        return self.parts_between(self.section_start(KEYS), self.section_start(VALUES) + self.slot_elements)

    # -- what fused kernels cover ----------------------------------------------------------------------------------

    def features(self) -> dict[str, bool]:
        """The features beyond those of Llama, by their names in messages, and whether this attention has each."""
        return {
            "a window": self.window is not None,
            "sinks": self.has_sinks,
            "a softcap": self.softcap is not None,
            "biases": self.has_bias,
            "normed values": self.value_eps is not None,
            "no rope": self.rotary == 0,
            "partial rope": 0 < self.rotary < self.head_dim,
            "interleaved rope": self.is_interleaved and self.rotary > 0,
            "another layer's keys": not self.writes_kv,
            "scaled queries": self.scales_queries,
        }

    def uncovered(self, covered: Sequence[str]) -> str:
        """The features of this attention that are not in `covered`, in words; "" if there are none."""
        return in_words([name for name, has in self.features().items() if has and name not in covered])


def _binding(window: int | None, layout: StepLayout) -> int | None:
    """The window; None if no sequence of the layout can be longer."""
    return None if window is None or window >= layout.max_blocks * layout.block_size else window
