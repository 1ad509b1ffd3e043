"""Formats of every property, and seeded matrices of any format."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import strategies as st
from ml_dtypes import float8_e4m3fn

from tinyvllm.arrays import CODE_BITS, GROUPS, SCALE_DTYPES, Format, QuantizedMatrix, ScaleFormat, Scales
from tinyvllm.model.weights.quant import QUANTIZED_KINDS

# GGUF's kinds beside those of tests.ops.builders.QUANTIZED
GGUF_FORMATS = [
    QUANTIZED_KINDS[name].format
    for name in (
        *("Q2_K", "Q3_K", "IQ4_NL", "IQ4_XS", "MXFP4", "NVFP4", "Q1_0", "TQ1_0"),
        *("IQ2_XXS", "IQ2_S", "IQ3_S", "IQ1_M"),  # indices of 8, 10, 9 and 12 bits
    )
]
GRIDS = [fmt.grid for fmt in GGUF_FORMATS if fmt.grid is not None]
NF4 = Format(
    "nf4",
    4,
    64,
    scale=ScaleFormat(64, dtype="float32"),
    # QLoRA (Dettmers et al. 2023), appendix E
    codebook=(
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ),
)


def affine(bits: int, group: int, dtype: str = "float16") -> Format:
    """MLX's: unsigned codes (of 8 bits 128 less, and -128 their offset), with a scale and a bias a group."""
    scale = ScaleFormat(group, dtype=dtype)
    offset = -128 if bits == 8 else 0
    return Format(f"affine{bits}_g{group}", bits, group, offset=offset, scale=scale, minimum=scale)


FORMATS = [
    *[affine(bits, group) for bits, group in zip(CODE_BITS[1:], (64, 64, 64, 32, 64, 128), strict=True)],
    affine(4, 64, "bfloat16"),
    affine(4, 16, "float32"),
    Format("GPTQ", 4, 128, scale=ScaleFormat(128), minimum=ScaleFormat(128, has_steps=True)),
    Format("W4A16", 4, 64, offset=8, scale=ScaleFormat(64, dtype="bfloat16")),
    Format("FP8", 8, 128, scale=ScaleFormat(128, dtype="float32"), is_float8=True),
    NF4,
    *GGUF_FORMATS,
]
BY_NAME = {f"{fmt.name}-{fmt.scales[0].dtype}": fmt for fmt in FORMATS}


@st.composite
def any_format(draw: st.DrawFn, *, has_grids: bool = True) -> Format:
    """Whatever `Format` allows in a matrix of 256 columns."""
    group, bits = draw(st.sampled_from(GROUPS)), draw(st.sampled_from(CODE_BITS))
    grid = draw(st.sampled_from(GRIDS)) if has_grids and draw(st.booleans()) else None
    bits = bits if grid is None else grid.bits
    is_float8 = grid is None and bits == 8 and draw(st.booleans())
    codebook = None
    if bits <= 4 and draw(st.booleans()):
        codebook = tuple(draw(st.lists(st.integers(-64, 64).map(float), min_size=1 << bits, max_size=1 << bits)))
    offset = (
        0 if is_float8 or codebook is not None or grid is not None else draw(st.sampled_from((0, 1 << bits - 1, -7)))
    )

    def scale() -> ScaleFormat:
        span = draw(st.sampled_from([span for span in (16, 32, 64, 128, 256) if span >= group]))
        dtype = draw(st.sampled_from(sorted(SCALE_DTYPES)))
        return ScaleFormat(span, draw(st.booleans()), dtype, draw(st.booleans()), draw(st.sampled_from((1.0, 0.125))))

    minimum = scale() if draw(st.booleans()) else None
    return Format("random", bits, group, offset, scale(), minimum, codebook, is_float8, grid)


def draw_matrix(fmt: Format, rows: int, cols: int, seed: int = 0) -> QuantizedMatrix:
    """A matrix of any quantized format: codes and scales are drawn, and scales have both signs where they can. Values
    are of about 1 / sqrt(cols), or some times that."""
    rng = np.random.default_rng(seed)
    grid = fmt.grid
    codes = rng.integers(0, 1 << fmt.bits, (rows, cols // fmt.code_cols), np.uint8 if grid is None else np.uint16)
    signs = rng.integers(0, 256, (rows, cols // 8), np.uint8) if grid is not None and grid.has_signs else None
    if fmt.bits == 8 and grid is None:
        codes = rng.standard_normal((rows, cols)).astype(float8_e4m3fn) if fmt.is_float8 else codes.view(np.int8)

    of_codes = QuantizedMatrix(fmt, codes, Scales(np.empty(0)), None, signs).code_values
    size = max(1.0, float(np.sqrt(np.square(of_codes).mean())))

    def scales(form: ScaleFormat) -> Scales:
        shape = (rows, cols // form.span)
        drawn = rng.standard_normal(shape).astype(np.float32) / math.sqrt(cols)
        drawn /= form.unit * (size if form is fmt.scale else 1) * (16 if form.has_steps else 1)
        if form.dtype == "e8m0":
            drawn = np.exp2(rng.integers(-8, 2, shape)).astype(np.float32)
        steps = rng.integers(-32, 32, (rows, cols // fmt.group), np.int8) if form.has_steps else None
        multiplier = rng.uniform(0.5, 2, rows).astype(np.float32) if form.has_multiplier else None
        return Scales(drawn.astype(SCALE_DTYPES[form.dtype]), steps, multiplier)

    assert fmt.scale is not None
    minimum = None if fmt.minimum is None else scales(fmt.minimum)
    return QuantizedMatrix(fmt, codes, scales(fmt.scale), minimum, signs)
