"""A format that holds matrices of different formats, so that one kernel can read all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from tinyvllm.arrays import Format, HostMatrix, LazyCodes, QuantizedMatrix, ScaleFormat, Scales


def in_common_format(matrices: Sequence[HostMatrix]) -> list[QuantizedMatrix] | None:
    """The matrices (of the same width) in one format, with the values that they have, or None if they are not all of
    integer codes. It has the longest codes and the shortest groups."""
    quantized = [matrix for matrix in matrices if isinstance(matrix, QuantizedMatrix)]
    if len(quantized) < len(matrices) or not all(_has_integers(matrix.format) for matrix in quantized):
        return None
    common = _common_format(list(dict.fromkeys(matrix.format for matrix in quantized)))
    return [_recast(matrix, common) for matrix in quantized]


def _common_format(formats: Sequence[Format]) -> Format:
    bits, group = max(fmt.bits for fmt in formats), min(fmt.group for fmt in formats)
    scale = ScaleFormat(group, dtype=_scale_dtype(*formats))
    name = "+".join(dict.fromkeys(fmt.name for fmt in formats))
    if all(fmt.minimum is None and fmt.offset >= 0 for fmt in formats):
        offset = 0 if bits == 8 else max(fmt.offset for fmt in formats)
        return Format(name, bits, group, offset=offset, scale=scale)
    return Format(name, bits, group, scale=scale, minimum=ScaleFormat(group, dtype="float32"))


def _has_integers(fmt: Format) -> bool:
    return fmt.codebook is None and fmt.grid is None and not fmt.is_float8


def _scale_dtype(*formats: Format) -> str:
    """That of both if their scales are plain: products of factors need float32."""
    scales = [fmt.scale for fmt in formats if fmt.scale is not None]
    dtypes = {scale.dtype for scale in scales}
    is_plain = len(dtypes) == 1 and not any(s.has_steps or s.has_multiplier or s.unit != 1 for s in scales)
    return dtypes.pop() if is_plain else "float32"


def _recast(matrix: QuantizedMatrix, common: Format) -> QuantizedMatrix:
    """The matrix in a common format: with its own offset in the minimum, if there is one, else in its codes."""
    fmt, num_groups = matrix.format, matrix.shape[1] // matrix.format.group
    assert common.scale is not None
    scale = matrix.scale.expand(num_groups)
    shift = common.offset - fmt.offset if common.minimum is None else 0
    minimum = None
    if common.minimum is not None:
        minimum = -np.float32(fmt.offset) * scale
        if matrix.minimum is not None:
            minimum = minimum + matrix.minimum.expand(num_groups)

    def spread(values: np.ndarray) -> np.ndarray:
        return np.repeat(values, fmt.group // common.group, axis=1)

    # the scales' own dtype holds them again: they were read from it
    base = spread(scale).astype(matrix.scale.base.dtype if common.scale.dtype != "float32" else np.float32)
    codes = LazyCodes(_recast_codes(matrix, shift, common.bits), (matrix.shape[0], matrix.shape[1]))
    return replace(
        matrix,
        format=common,
        codes=codes,
        scale=Scales(base),
        minimum=None if minimum is None else Scales(spread(minimum)),
    )


def _recast_codes(matrix: QuantizedMatrix, shift: int, bits: int) -> Callable[[np.ndarray], np.ndarray]:
    def read(rows: np.ndarray) -> np.ndarray:
        codes = matrix.rows(rows).read_codes().astype(np.int16) + shift
        return codes.astype(np.int8 if bits == 8 else np.uint8)

    return read
