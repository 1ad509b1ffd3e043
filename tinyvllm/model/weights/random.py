"""Seeded random weights of any shape, made without a file: a real model's cost without its download."""

from __future__ import annotations

import math
import zlib
from dataclasses import replace
from typing import Any

import numpy as np
from ml_dtypes import bfloat16, float8_e4m3fn

from tinyvllm.arrays import (
    E2M1,
    SCALE_DTYPES,
    Format,
    HostMatrix,
    QuantizedMatrix,
    ScaleFormat,
    Scales,
    copy_all,
    to_float32,
)
from tinyvllm.errors import UnsupportedModelError
from tinyvllm.model.weights.quant import QUANTIZED_KINDS, decompose
from tinyvllm.storage.gguf_types import BLOCK_SIZES

DENSE_KINDS = ("float32", "float16", "bfloat16")
# Rows that are drawn for a matrix and then repeated: billions of numbers would take minutes. A prime, so that the
# repeats do not line up with blocks of rows.
DRAWN_ROWS = 61

# llama.cpp's choice for matrices whose rows are not whole blocks of 256 (llama-quant.cpp, tensor_type_fallback)
NARROW_KINDS = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}


def _mlx(bits: int, group: int) -> Format:
    scale = ScaleFormat(group, dtype="bfloat16")
    return Format(f"mlx-{bits}bit-g{group}", bits, group, -128 if bits == 8 else 0, scale, scale)


# formats of safetensors, as their readers (hf_formats) make them of the usual files
FILE_FORMATS = {
    fmt.name: fmt
    for fmt in (
        *[_mlx(bits, group) for bits in (2, 3, 4, 5, 6, 8) for group in (32, 64, 128)],
        Format("awq-4bit-g128", 4, 128, scale=ScaleFormat(128), minimum=ScaleFormat(128, has_steps=True)),
        Format("gptq-4bit-g128", 4, 128, offset=8, scale=ScaleFormat(128)),
        Format("w4a16-g128", 4, 128, offset=8, scale=ScaleFormat(128, dtype="bfloat16")),
        Format("w8a16-channel", 8, 128, scale=ScaleFormat(128, dtype="bfloat16")),
        Format("fp8-block128", 8, 128, scale=ScaleFormat(128, dtype="float32"), is_float8=True),
        Format("fp8-channel", 8, 128, scale=ScaleFormat(128, dtype="bfloat16"), is_float8=True),
        Format("mxfp4", 4, 32, scale=ScaleFormat(32, dtype="e8m0"), codebook=E2M1),
        Format("nvfp4", 4, 16, scale=ScaleFormat(16, dtype="e4m3", has_multiplier=True), codebook=E2M1),
    )
}
RANDOM_KINDS = (*DENSE_KINDS, *QUANTIZED_KINDS, *FILE_FORMATS)


class RandomWeights:
    """Makes up any tensor: matrices of one kind, whose products keep their input's spread, and vectors (norms) near 1.
    The same seed and name give the same values."""

    def __init__(self, kind: str, seed: int) -> None:
        """`kind`: of all matrices, or, as gpt-oss has them, `KIND+KIND`: of experts the second one. Raises
        UnsupportedModelError for an unknown kind."""
        kinds = kind.split("+")
        if len(kinds) > 2 or any(one not in RANDOM_KINDS for one in kinds):
            raise UnsupportedModelError(
                f"weights of kind {kind!r} are not known; known: {', '.join(RANDOM_KINDS)}, and two of them with a +: "
                "the second is that of experts"
            )
        self._kind, self._expert_kind = kinds[0], kinds[-1]
        self._seed = seed
        self._experts: dict[tuple[str, tuple[int, ...]], HostMatrix] = {}

    @property
    def is_quantized(self) -> bool:
        """Whether all matrices are."""
        return self._kind not in DENSE_KINDS and self._expert_kind not in DENSE_KINDS

    def take(self, name: str, shape: tuple[int, ...]) -> HostMatrix:
        """A vector, a matrix, or the taps of a depthwise convolution (channels, 1, taps). All layers have the same
        experts, which are most of a model. Raises ModelError if a quantized matrix's rows are not whole blocks."""
        if ".experts." not in name:
            return self._draw(name, shape)
        key = name.partition(".experts.")[2], shape
        if key not in self._experts:
            self._experts[key] = self._draw(".experts." + key[0], shape)
        return self._experts[key]

    def _draw(self, name: str, shape: tuple[int, ...]) -> HostMatrix:
        rng = np.random.default_rng([self._seed, zlib.crc32(name.encode())])
        if len(shape) == 1:
            return (1 + 0.1 * rng.standard_normal(shape)).astype(np.float32)
        if len(shape) == 3:  # the taps of a convolution
            return (rng.standard_normal(shape) / math.sqrt(shape[2])).astype(np.float32)
        rows, cols = shape
        # equal rows of a router would choose equal experts together
        num_drawn = rows if ".mlp.gate." in name else DRAWN_ROWS
        kind = self._expert_kind if ".experts." in name else self._kind
        if kind not in DENSE_KINDS:
            drawn = draw_quantized(kind, num_drawn, cols, rng)
            # repeated when they are packed, some rows at a time
            return replace(drawn, codes=drawn.lazy_codes).rows(np.arange(rows) % num_drawn)
        values = (rng.standard_normal((num_drawn, cols)) / math.sqrt(cols)).astype(np.float32)
        if kind == "bfloat16":
            return _repeated((values.view(np.uint32) >> 16).astype(np.uint16).view(bfloat16), rows)
        return _repeated(values.astype(kind), rows)

    def finish(self) -> None:
        """Nothing can be left over: tensors are made when they are taken."""


class AlikeWeights(RandomWeights):
    """For tracing, which reads no values: dense weights are zeros, and of others each shape is drawn once."""

    def __init__(self, kind: str, seed: int) -> None:
        super().__init__(kind, seed)
        self._known: dict[tuple[bool, tuple[int, ...]], HostMatrix] = {}

    def _draw(self, name: str, shape: tuple[int, ...]) -> HostMatrix:
        key = ".experts." in name, shape
        if key not in self._known:
            kind = self._expert_kind if key[0] else self._kind
            is_dense = len(shape) == 2 and kind in DENSE_KINDS
            self._known[key] = np.zeros(shape, _dtype_of(kind)) if is_dense else super()._draw(name, shape)
        return self._known[key]


def _repeated(drawn: np.ndarray, num_rows: int) -> np.ndarray:
    """So many rows: those that were drawn, again and again."""
    rows = np.empty((num_rows, *drawn.shape[1:]), drawn.dtype)
    parts = [rows[start : start + len(drawn)] for start in range(0, num_rows, len(drawn))]
    copy_all(parts, [drawn[: len(part)] for part in parts])
    return rows


def _dtype_of(kind: str) -> np.dtype[Any]:
    return np.dtype(bfloat16 if kind == "bfloat16" else kind)


def draw_quantized(kind: str, rows: int, cols: int, rng: np.random.Generator) -> QuantizedMatrix:
    """A matrix of random codes whose values spread by about 1 / sqrt(cols) around zero."""
    if kind in FILE_FORMATS:
        return _spread(_draw_codes(FILE_FORMATS[kind], rows, cols, rng))
    block_size, block_bytes = BLOCK_SIZES[kind]
    if cols % block_size and kind in NARROW_KINDS:
        return draw_quantized(NARROW_KINDS[kind], rows, cols, rng)
    raw = rng.integers(0, 256, (rows, cols // block_size, block_bytes), np.uint8)
    return _spread(decompose(kind, raw, (rows, cols)))


def _draw_codes(fmt: Format, rows: int, cols: int, rng: np.random.Generator) -> QuantizedMatrix:
    """Random codes, with scales of 1."""
    codes = rng.integers(0, 1 << fmt.bits, (rows, cols), np.uint8)
    if fmt.bits == 8:
        codes = rng.standard_normal((rows, cols)).astype(float8_e4m3fn) if fmt.is_float8 else codes.view(np.int8)

    def ones(form: ScaleFormat) -> Scales:
        steps = np.ones((rows, cols // fmt.group), np.int8) if form.has_steps else None
        multiplier = np.ones(rows, np.float32) if form.has_multiplier else None
        return Scales(np.ones((rows, cols // form.span), SCALE_DTYPES[form.dtype]), steps, multiplier)

    assert fmt.scale is not None
    return QuantizedMatrix(fmt, codes, ones(fmt.scale), None if fmt.minimum is None else ones(fmt.minimum))


def _spread(drawn: QuantizedMatrix) -> QuantizedMatrix:
    """The same codes, with scales that spread the values by about 1 / sqrt(cols) around zero."""
    cols = drawn.shape[1]
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
