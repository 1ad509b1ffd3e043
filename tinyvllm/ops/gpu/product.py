"""What the specs of products with a matrix share, whichever kernel computes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from tinygrad.dtype import DType

from tinyvllm.arrays import Format
from tinyvllm.ops.formats.matrix import Matrix
from tinyvllm.ops.kernel.lanes import Lanes, Mma
from tinyvllm.ops.kernel.tuning import Tunable


class GatedRows:
    """The rows of a product whose matrix may be gate over up: then out = activation(gate) * up has half as many."""

    num_rows: int  # N
    activation: str | None

    @property
    def is_gated(self) -> bool:
        return self.activation is not None

    @property
    def out_rows(self) -> int:
        return self.num_rows // 2 if self.is_gated else self.num_rows


@dataclass(frozen=True, kw_only=True)
class PackedProductSpec(GatedRows, Tunable):
    """A product of rows with a quantized matrix whose planes are copied to threadgroup memory."""

    name: str
    lanes: Lanes
    mma: Mma
    format: Format
    num_tokens: int  # T
    num_rows: int  # N
    num_cols: int  # K
    activation: str | None = None
    planes: tuple[tuple[DType, float], ...]  # the dtype of each, and its bytes for each value of the matrix

    @classmethod
    def of(
        cls, name: str, lanes: Lanes, mma: Mma, matrix: Matrix, num_tokens: int, activation: str | None = None
    ) -> Self:
        return cls(
            name=name,
            lanes=lanes,
            mma=mma,
            format=matrix.format,
            num_tokens=num_tokens,
            num_rows=matrix.num_rows,
            num_cols=matrix.num_cols,
            activation=activation,
            planes=plane_sizes(matrix),
        )


def plane_sizes(matrix: Matrix) -> tuple[tuple[DType, float], ...]:
    """The dtype of each plane, and its bytes for each value of the matrix."""
    size = matrix.num_rows * matrix.num_cols
    return tuple((plane.dtype, plane.nbytes() / size) for plane in matrix.planes)
