"""A conversion as a list of pieces: tensors of a source, and the arrays that each becomes in the output.

The pieces say all sizes before a value is read, so that space can be checked and files can be laid out first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from tinyvllm.arrays import HostMatrix, take_rows, to_float32

CHUNK_WEIGHTS = 1 << 17  # encoded at a time: their float32 values and a few copies fit a core's cache

Encode = Callable[[np.ndarray], Sequence[np.ndarray]]  # rows, (N, K) float32, to the rows of each array of a piece


@dataclass(frozen=True)
class Plane:
    """An array of the output. `dtype` is the container's name for its type: "Q4_K", "U32", "BF16"."""

    name: str
    dtype: str
    shape: tuple[int, ...]  # rows first
    num_bytes: int


@dataclass(frozen=True)
class Piece:
    """A tensor and what becomes of it. `encode` is called from several threads, for successive rows."""

    name: str  # the source's, for messages
    shape: tuple[int, ...]
    read: Callable[[], HostMatrix]
    planes: tuple[Plane, ...]
    encode: Encode
    order: np.ndarray | None = None  # for each row of the output, its row in the source; None: the same
    row_unit: int = 1  # chunks begin at multiples of this

    @property
    def num_bytes(self) -> int:
        return sum(plane.num_bytes for plane in self.planes)

    @property
    def rows(self) -> int:
        return self.shape[0] if len(self.shape) > 1 else 1

    @property
    def columns(self) -> int:
        """Values of a row; a vector is one row, and of more axes only the first is kept."""
        return int(np.prod(self.shape[1:], dtype=np.int64)) if len(self.shape) > 1 else self.shape[0]

    def chunks(self) -> Iterator[slice]:
        """The rows, in chunks of about CHUNK_WEIGHTS values."""
        step = max(1, CHUNK_WEIGHTS // max(1, self.columns) // self.row_unit) * self.row_unit
        for start in range(0, self.rows, step):
            yield slice(start, min(start + step, self.rows))

    def values(self, matrix: HostMatrix, rows: slice) -> np.ndarray:
        """Rows of the output, (n, K) float32, from the tensor's own."""
        if len(self.shape) == 1:
            vector = to_float32(matrix)
            return (vector if self.order is None else vector[self.order])[None]
        if len(self.shape) > 2:
            assert isinstance(matrix, np.ndarray), "only matrices are quantized"
            return to_float32(matrix[rows]).reshape(rows.stop - rows.start, self.columns)
        return to_float32(take_rows(matrix, rows if self.order is None else self.order[rows]))
