"""compressed-tensors' `weight_packed`: integers in a stream of bits (pack-quantized), and NVFP4 and MXFP4.

https://github.com/vllm-project/compressed-tensors. Its other formats keep `weight` as it is: scaled.py.
"""

from __future__ import annotations

import math
from functools import partial

import numpy as np
from ml_dtypes import float8_e8m0fnu

from tinyvllm.arrays import CODE_BITS, HostMatrix, QuantizedMatrix
from tinyvllm.model.weights.hf_formats.matrices import (
    FLOATS,
    INTEGERS,
    WORDS,
    Groups,
    HFFormat,
    Parts,
    groups_of,
    scaled_fp4,
    stream_codes,
    unpack_bits,
    unsigned_integers,
)
from tinyvllm.model.weights.hf_formats.order import require_order
from tinyvllm.model.weights.stored import StoredTensor


def build(parts: Parts) -> StoredTensor:
    """Raises UnsupportedModelError, WeightMismatchError."""
    if parts[".weight_packed"].format_name == "U8":
        return _build_fp4(parts)
    parts.require(".weight_shape", (None,), INTEGERS)
    num_cols = int(parts.read(".weight_shape").reshape(-1)[-1])
    *rows, words = parts.require(".weight_packed", (None, None), WORDS)
    bits = words * 32 // num_cols if num_cols > 0 else 0
    if bits * num_cols != words * 32 or bits not in CODE_BITS:
        known = ", ".join(map(str, CODE_BITS))
        raise parts.unsupported(
            f"packs {num_cols} columns in {words} words of 32 bits: known are codes of {known} bits"
        )
    per_row = parts.require_exactly(".weight_scale", (*rows, None), FLOATS)[-1]
    if num_cols % per_row:
        raise parts.mismatch(".weight_scale", f"there are {num_cols} columns")
    groups = groups_of(parts, num_cols, num_cols // per_row)
    _check_zeros(parts, bits, rows, per_row)
    if ".weight_g_idx" in parts:
        parts.require(".weight_g_idx", (num_cols,), INTEGERS)
        require_order(parts, ".weight_g_idx", groups)
    name = f"w{bits}a16-{groups.label}"
    return parts.stored((*rows, num_cols), name, partial(_integers, name, bits, groups))


def _integers(name: str, bits: int, groups: Groups, parts: Parts) -> HostMatrix:
    codes, zeros = stream_codes(parts.read(".weight_packed"), bits, groups.num_cols), _zeros(bits, parts)
    scale = groups.spread(parts.read(".weight_scale"))
    return unsigned_integers(name, bits, groups.group, codes, scale, None if zeros is None else groups.spread(zeros))


def _check_zeros(parts: Parts, bits: int, rows: list[int], per_row: int) -> None:
    if ".weight_zero_point" not in parts:
        return
    if parts[".weight_zero_point"].format_name == "I8":
        parts.require_exactly(".weight_zero_point", (*rows, per_row), ("I8",))
        return
    *words, _ = parts.require(".weight_zero_point", (None, per_row), WORDS)
    if math.prod(words) * 32 < math.prod(rows) * bits:
        raise parts.mismatch(".weight_zero_point", f"there are {math.prod(rows)} rows of {bits} bits")


def _zeros(bits: int, parts: Parts) -> np.ndarray | None:
    """(N, groups) uint8, packed along the rows. Early versions stored them as int8, less half of the range."""
    if ".weight_zero_point" not in parts:
        return None
    stored, num_rows = parts.read(".weight_zero_point"), math.prod(parts[".weight_scale"].shape[:-1])
    if stored.dtype == np.int8:
        return (stored.astype(np.int16) + (1 << (bits - 1))).astype(np.uint8)
    return np.ascontiguousarray(unpack_bits(stored.T, bits, num_rows).T)


def _build_fp4(parts: Parts) -> StoredTensor:
    *rows, num_bytes = parts.require(".weight_packed", (None, None), ("U8",))
    is_nvidia = ".weight_global_scale" in parts
    if is_nvidia:
        parts.require(".weight_global_scale", (None,), FLOATS)
    group, types = (16, ("F8_E4M3",)) if is_nvidia else (32, ("U8", "F8_E8M0"))
    per_row, num_cols = parts.require_exactly(".weight_scale", (*rows, None), types)[-1], num_bytes * 2
    if per_row * group != num_cols:
        raise parts.mismatch(".weight_scale", f"{num_cols} columns have {num_cols // group} groups of {group}")
    return parts.stored((*rows, num_cols), "nvfp4" if is_nvidia else "mxfp4", _fp4)


def _fp4(parts: Parts) -> QuantizedMatrix:
    scale = parts.read(".weight_scale")
    packed = parts.read(".weight_packed")
    if ".weight_global_scale" not in parts:
        return scaled_fp4("mxfp4", 32, packed, scale.view(float8_e8m0fnu))
    # the scales were multiplied by it before they became e4m3
    multiplier = 1 / parts.read(".weight_global_scale").reshape(-1).astype(np.float32)[0]
    return scaled_fp4("nvfp4", 16, packed, scale, multiplier)


PACKED = HFFormat(
    ".weight_packed",
    (".weight_scale", ".weight_shape", ".weight_zero_point", ".weight_g_idx", ".weight_global_scale"),
    build,
)
