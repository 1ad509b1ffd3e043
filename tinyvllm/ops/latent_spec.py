"""What multi-head latent attention computes, once for all of its kernels.

A token is stored as one vector that all heads share: its latent c, normed, and then a rotated key (DeepSeek-V2, 2024,
sec. 2.1). Head h's key is [W_uk,h c, rotated key], its value W_uv,h c. Both products are absorbed: (W_uk,h c) . q =
c . (W_uk,h^T q), so that a query takes part as a vector of the stored one's size, and W_uv,h is applied to the sum of
weighted latents. Keys and values of heads are never computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

from tinygrad import Tensor, UOp

from tinyvllm.config import LatentKind, LayerKind
from tinyvllm.ops.formats.matrix import Matrix
from tinyvllm.ops.kernel.body import LOG2E
from tinyvllm.ops.step_inputs import StepLayout


@dataclass(frozen=True)
class LatentLayer:
    """One layer's latent attention. Both matrices are block-diagonal: a head's rows multiply the head's columns."""

    index: int  # its number, and its place in the pool
    kind: LayerKind  # with a latent
    key_up: Matrix  # (H * rank, nope): of head h, W_uk,h^T
    value_up: Matrix  # (H * value, rank): of head h, W_uv,h
    norm: Tensor  # (rank,) float32: the weight of the latents' norm
    rope: Tensor  # (positions, rope_dim) float32: cosines, then sines
    pool_group: int = 0  # the group of `pool_groups` whose block tables and slots it uses

    @property
    def latent(self) -> LatentKind:
        assert self.kind.latent is not None
        return self.kind.latent


@dataclass(frozen=True)
class LatentSpec:
    """One layer's latent attention of T rows. Hashable: kernels are cached by it."""

    layout: StepLayout
    num_heads: int  # H
    rank: int
    rope_dim: int
    nope_dim: int
    num_blocks: int
    score_scale: float
    norm_eps: float
    is_interleaved: bool
    table_group: int = 0  # LatentLayer.pool_group

    @classmethod
    def of(cls, layer: LatentLayer, layout: StepLayout, num_blocks: int, **more: Any) -> Self:
        """The spec of a layer. `more`: fields to override, and those of a subclass."""
        kind, latent = layer.kind, layer.latent
        assert kind.rope is not None
        fields: dict[str, Any] = dict(
            layout=layout,
            num_heads=kind.num_heads,
            rank=latent.rank,
            rope_dim=latent.rope_dim,
            nope_dim=latent.nope_dim,
            num_blocks=num_blocks,
            score_scale=kind.scale,
            norm_eps=latent.norm_eps,
            is_interleaved=kind.rope.is_interleaved,
            table_group=layer.pool_group,
        )
        return cls(**fields | more)

    @property
    def stored_dim(self) -> int:
        """Elements that the pool holds of a token."""
        return self.rank + self.rope_dim

    @property
    def query_dim(self) -> int:
        """Columns of a head's query before absorption: those that do not rotate, then those that do."""
        return self.nope_dim + self.rope_dim

    @property
    def num_slots(self) -> int:
        return self.num_blocks * self.layout.block_size

    @property
    def query_scale(self) -> float:
        """The factor that queries are multiplied by. It includes log2(e), so that scores are exponents of 2."""
        return LOG2E * self.score_scale

    @property
    def slots_start(self) -> int:
        """Where the slots of this attention's group begin in a step's inputs."""
        return self.layout.slots_offset(self.table_group)

    @property
    def tables_start(self) -> int:
        """Where the block tables of this attention's group begin in a step's inputs."""
        return self.layout.table_offset(self.table_group)

    def partner(self, dim: UOp) -> tuple[UOp, UOp, UOp]:
        """Of a rotated dimension: (the other of its pair, the pair's number, whether it is the pair's first)."""
        if self.is_interleaved:
            return dim + 1 - dim % 2 * 2, dim // 2, (dim % 2).eq(0)
        half = self.rope_dim // 2
        return (dim + half) % self.rope_dim, dim % half, dim < half
