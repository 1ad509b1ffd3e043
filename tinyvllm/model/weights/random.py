"""Seeded random weights of any shape, made without a file: a real model's cost without its download."""

from __future__ import annotations

import math
import zlib
from dataclasses import replace

import numpy as np
from ml_dtypes import bfloat16

from tinyvllm.arrays import HostMatrix, QuantizedMatrix, Scales, to_float32
from tinyvllm.errors import UnsupportedModelError
from tinyvllm.model.weights.quant import QUANTIZED_KINDS, decompose
from tinyvllm.storage.gguf_file import BLOCK_SIZES

DENSE_KINDS = ("float32", "float16", "bfloat16")
RANDOM_KINDS = (*DENSE_KINDS, *QUANTIZED_KINDS)
# Rows that are drawn for a matrix and then repeated: billions of numbers would take minutes. A prime, so that the
# repeats do not line up with blocks of rows.
DRAWN_ROWS = 61

# llama.cpp's choice for matrices whose rows are not whole blocks of 256 (llama-quant.cpp, tensor_type_fallback)
NARROW_KINDS = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}


class RandomWeights:
    """Makes up any tensor: matrices of one kind, whose products keep their input's spread, and vectors (norms) near 1.
    The same seed and name give the same values."""

    def __init__(self, kind: str, seed: int) -> None:
        """Raises UnsupportedModelError for an unknown kind."""
        if kind not in RANDOM_KINDS:
            raise UnsupportedModelError(f"weights of kind {kind!r} are not known; known: {', '.join(RANDOM_KINDS)}")
        self._kind = kind
        self._seed = seed

    def take(self, name: str, shape: tuple[int, ...]) -> HostMatrix:
        """A vector or a matrix. Raises ModelError if a quantized matrix's rows are not whole blocks."""
        rng = np.random.default_rng([self._seed, zlib.crc32(name.encode())])
        if len(shape) == 1:
            return (1 + 0.1 * rng.standard_normal(shape)).astype(np.float32)
        rows, cols = shape
        order = np.arange(rows) % DRAWN_ROWS
        if self._kind not in DENSE_KINDS:
            return draw_quantized(self._kind, DRAWN_ROWS, cols, rng).rows(order)
        values = (rng.standard_normal((DRAWN_ROWS, cols)) / math.sqrt(cols)).astype(np.float32)
        if self._kind == "bfloat16":
            return (values.view(np.uint32) >> 16).astype(np.uint16).view(bfloat16)[order]
        drawn: np.ndarray = values.astype(self._kind)[order]
        return drawn

    def finish(self) -> None:
        """Nothing can be left over: tensors are made when they are taken."""


def draw_quantized(kind: str, rows: int, cols: int, rng: np.random.Generator) -> QuantizedMatrix:
    """A matrix of random blocks whose values spread by about 1 / sqrt(cols) around zero."""
    block_size, block_bytes = BLOCK_SIZES[kind]
    if cols % block_size and kind in NARROW_KINDS:
        return draw_quantized(NARROW_KINDS[kind], rows, cols, rng)
    raw = rng.integers(0, 256, (rows, cols // block_size, block_bytes), np.uint8)
    drawn = decompose(kind, raw, (rows, cols))
    # codes and steps as drawn; bases of 1, and of the mean code below zero for minimums, tell the spread of these
    unit = to_float32(_with_bases(drawn, 1.0))
    return _with_bases(drawn, 1 / (math.sqrt(cols) * float(unit.std())), alternate=abs(unit.mean()) > 0.2 * unit.std())


def _with_bases(matrix: QuantizedMatrix, scale: float, *, alternate: bool = False) -> QuantizedMatrix:
    """The same codes and steps, with `scale` as the factor of all groups. Minimums take the codes' mean off; without
    minimums, scales of alternate signs do."""

    def filled(scales: Scales, value: float) -> Scales:
        if scales.multiplier is not None:  # bases of 8 bits have too small a range
            return replace(scales, base=np.ones_like(scales.base), multiplier=np.full_like(scales.multiplier, value))
        base = np.full_like(scales.base, value)
        if alternate:
            base[::2] *= base.dtype.type(-1)
        return replace(scales, base=base)

    minimum = matrix.minimum
    if minimum is not None:
        minimum = filled(minimum, -scale * float(matrix.code_values.mean()))
    return replace(matrix, scale=filled(matrix.scale, scale), minimum=minimum)
