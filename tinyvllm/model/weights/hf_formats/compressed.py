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
    num_cols = int(parts.read(".weight_shape").reshape(-1)[-1])
    *rows, words = parts[".weight_packed"].shape
    bits = words * 32 // num_cols
    if bits * num_cols != words * 32 or bits not in CODE_BITS:
        known = ", ".join(map(str, CODE_BITS))
        raise parts.unsupported(
            f"packs {num_cols} columns in {words} words of 32 bits: known are codes of {known} bits"
        )
    per_row = parts[".weight_scale"].shape[-1]
    if num_cols % per_row:
        raise parts.mismatch(".weight_scale", f"there are {num_cols} columns")
    groups = groups_of(parts, num_cols, num_cols // per_row)
    if ".weight_g_idx" in parts:
        require_order(parts, ".weight_g_idx", groups)
    name = f"w{bits}a16-{groups.label}"
    return parts.stored((*rows, num_cols), name, partial(_integers, name, bits, groups))


def _integers(name: str, bits: int, groups: Groups, parts: Parts) -> HostMatrix:
    codes, zeros = stream_codes(parts.read(".weight_packed"), bits, groups.num_cols), _zeros(bits, parts)
    scale = groups.spread(parts.read(".weight_scale"))
    return unsigned_integers(name, bits, groups.group, codes, scale, None if zeros is None else groups.spread(zeros))


def _zeros(bits: int, parts: Parts) -> np.ndarray | None:
    """(N, groups) uint8, packed along the rows. Early versions stored them as int8, less half of the range."""
    if ".weight_zero_point" not in parts:
        return None
    stored, num_rows = parts.read(".weight_zero_point"), math.prod(parts[".weight_scale"].shape[:-1])
    if stored.dtype == np.int8:
        return (stored.astype(np.int16) + (1 << (bits - 1))).astype(np.uint8)
    return np.ascontiguousarray(unpack_bits(stored.T, bits, num_rows).T)


def _build_fp4(parts: Parts) -> StoredTensor:
    *rows, num_bytes = parts[".weight_packed"].shape
    per_row, num_cols = parts[".weight_scale"].shape[-1], num_bytes * 2
    is_nvidia = ".weight_global_scale" in parts
    group = 16 if is_nvidia else 32
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
