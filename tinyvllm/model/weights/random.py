"""Seeded random weights of any shape, made without a file: a real model's cost without its download."""

from __future__ import annotations

import math
import zlib

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from ml_dtypes import bfloat16

from tinyvllm.arrays import HostMatrix, QuantizedMatrix
from tinyvllm.errors import UnsupportedModelError
from tinyvllm.model.weights.quant import QUANTIZED_KINDS, decompose

DENSE_KINDS = ("float32", "float16", "bfloat16")
RANDOM_KINDS = (*DENSE_KINDS, *QUANTIZED_KINDS)
DRAWN_ROWS = 61  # drawn for a matrix, then repeated: billions of numbers would take minutes. Prime: no block's divisor

# llama.cpp's choice for matrices whose rows are not whole blocks of 256 (llama-quant.cpp, tensor_type_fallback)
NARROW_KINDS = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
CODE_SPREAD = {"Q4": 4.6, "Q5": 9.2, "Q6": 18.5, "Q8": 74.0}  # standard deviation of codes that are equally likely
MIDDLE_CODE = {"Q4": 7.5, "Q5": 15.5}  # of the kinds with a minimum, which takes this many scales off
K_STEP = 56  # what the 6-bit steps of Q4_K and Q5_K, one a scale and one a minimum, multiply that spread by
Q6_STEP = 74  # the spread of Q6_K's int8 steps
Q6_SCALE_AT = 208  # the byte of a Q6_K block where its scale is; the other kinds begin with theirs


class RandomWeights:
    """Invents whatever tensor is asked for: matrices of one kind, whose products keep their input's spread, and
    vectors (norms) near 1. The same seed and name give the same values."""

    def __init__(self, kind: str, seed: int) -> None:
        """Raises UnsupportedModelError for an unknown kind."""
        if kind not in RANDOM_KINDS:
            raise UnsupportedModelError(f"weights of kind {kind!r} are not known; known: {', '.join(RANDOM_KINDS)}")
        self._kind = kind
        self._seed = seed

    def take(self, name: str, shape: tuple[int, ...]) -> HostMatrix:
        """A vector or a matrix. Raises ModelError where the rows of a quantised matrix are not whole blocks."""
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
        """Nothing can be left over: there is only what was asked for."""


def draw_quantized(kind: str, rows: int, cols: int, rng: np.random.Generator) -> QuantizedMatrix:
    """A matrix of random blocks whose values spread by about 1 / sqrt(cols) around zero."""
    block_size, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    if cols % block_size and kind in NARROW_KINDS:
        return draw_quantized(NARROW_KINDS[kind], rows, cols, rng)
    raw = rng.integers(0, 256, (rows, cols // block_size, block_bytes), np.uint8)
    bits = kind[:2]
    scale = 1 / (math.sqrt(cols) * CODE_SPREAD[bits])
    if kind == "Q6_K":
        _set_half(raw, Q6_SCALE_AT, scale / Q6_STEP)
    elif kind.endswith("_K"):
        _set_half(raw, 0, scale / K_STEP)
        _set_half(raw, 2, scale / K_STEP * MIDDLE_CODE[bits])
    else:
        _set_half(raw, 0, scale)
        if kind.endswith("_1"):
            _set_half(raw, 2, -scale * MIDDLE_CODE[bits])
    return decompose(kind, raw, (rows, cols))


def _set_half(raw: np.ndarray, begin: int, value: float) -> None:
    """Write one half-precision number at byte `begin` of every block."""
    raw[..., begin : begin + 2] = np.array([value], np.float16).view(np.uint8)
