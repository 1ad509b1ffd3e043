"""Weights on the host, as NumPy arrays: what the readers of checkpoints hand to the kernels' packers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class BFloat16Array:
    """bfloat16 values, which NumPy lacks, as their bits."""

    bits: np.ndarray  # uint16, any shape

    @property
    def shape(self) -> tuple[int, ...]:
        return self.bits.shape

    def to_float32(self) -> np.ndarray:
        """The same values: a bfloat16 is the upper half of a float32."""
        return (self.bits.astype(np.uint32) << 16).view(np.float32)


@dataclass(frozen=True)
class Scales:
    """One factor a group: base[n, k // span], times steps[n, k // group] where steps is not None (K quants)."""

    base: np.ndarray  # (N, K // span) float16
    steps: np.ndarray | None  # (N, K // group) uint8, or int8 for Q6_K
    span: int  # columns that a base covers: 32 (legacy kinds) or 256 (K quants)

    def expand(self) -> np.ndarray:
        """(N, K // group) float32."""
        base = self.base.astype(np.float32)
        if self.steps is None:
            return base
        return np.repeat(base, self.steps.shape[1] // base.shape[1], axis=1) * self.steps.astype(np.float32)


@dataclass(frozen=True)
class QuantizedMatrix:
    """value[n, k] = (codes[n, k] - offset) * scale[n, k // group] + minimum[n, k // group], in float32 as in ggml."""

    kind: str  # ggml's name: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K, Q6_K
    codes: np.ndarray  # (N, K) uint8, unsigned codes of `bits` bits; int8 for Q8_0
    bits: int  # 4, 5, 6 or 8
    group: int  # columns that share a scale: 32, or 16 for Q6_K
    offset: int  # 8, 0, 16, 0, 0, 0, 0, 32 in the order of `kind`'s list
    scale: Scales
    minimum: Scales | None = None  # of Q4_1, Q5_1, Q4_K, Q5_K (K quants: the sign of -dmin * m lies in its base)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    def rows(self, index: np.ndarray | slice) -> QuantizedMatrix:
        """The rows that `index` selects, in its order."""

        def pick(scales: Scales | None) -> Scales | None:
            if scales is None:
                return None
            return Scales(scales.base[index], None if scales.steps is None else scales.steps[index], scales.span)

        scale = pick(self.scale)
        assert scale is not None
        return QuantizedMatrix(
            self.kind, self.codes[index], self.bits, self.group, self.offset, scale, pick(self.minimum)
        )


HostMatrix = np.ndarray | BFloat16Array | QuantizedMatrix


def to_float32(matrix: HostMatrix) -> np.ndarray:
    """Every value, as float32."""
    if isinstance(matrix, BFloat16Array):
        return matrix.to_float32()
    if isinstance(matrix, np.ndarray):
        return matrix.astype(np.float32)
    scale = np.repeat(matrix.scale.expand(), matrix.group, axis=1)
    values: np.ndarray = (matrix.codes.astype(np.float32) - matrix.offset) * scale
    if matrix.minimum is not None:
        values += np.repeat(matrix.minimum.expand(), matrix.group, axis=1)
    return values
