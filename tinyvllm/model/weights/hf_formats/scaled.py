"""8-bit weights as they are, with scales beside them: FP8 of DeepSeek, Qwen, fbgemm, compressed-tensors and ModelOpt,
and int8 of compressed-tensors.

A scale covers the whole tensor, a row, a group of a row, or a block of rows and columns (128 x 128), and its shape says
which. DeepSeek calls scales of blocks `weight_scale_inv`; they are multiplied too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import numpy as np
from ml_dtypes import float8_e8m0fnu

from tinyvllm.arrays import HostMatrix
from tinyvllm.model.weights.hf_formats.matrices import (
    FLOATS,
    Groups,
    HFFormat,
    Parts,
    groups_of,
    scaled_fp8,
    scaled_integers,
    weight_groups,
)
from tinyvllm.model.weights.stored import StoredTensor

DEFAULT_BLOCK = (128, 128)
NAMES = {"F8_E4M3": "fp8", "F8_E5M2": "fp8-e5m2", "I8": "w8a16"}


@dataclass(frozen=True)
class Cover:
    """The weights that one scale covers: some rows, and groups of columns."""

    rows: int
    groups: Groups
    label: str  # "tensor", "channel", "g128", "block128"


def build(key: str, suffix: str, parts: Parts) -> StoredTensor:
    """`key`, `suffix`: the ends of the names of the weight and of its scale. Raises UnsupportedModelError,
    WeightMismatchError."""
    weight = parts[key]
    if weight.format_name not in NAMES:
        raise parts.unsupported(f"has weights of type {weight.format_name} with scales: known are {', '.join(NAMES)}")
    *experts, _, _ = parts.require(key, (None, None), tuple(NAMES))
    _check_scale(parts, suffix, experts, (*FLOATS, "U8", "F8_E8M0"))
    if ".weight_zero_point" in parts:
        _check_scale(parts, ".weight_zero_point", experts, ("I8",))
        if parts[".weight_zero_point"].shape != parts[suffix].shape:
            raise parts.mismatch(".weight_zero_point", f"the scales have {parts[suffix].shape}")
    cover = _cover(key, suffix, parts)
    name = f"{NAMES[weight.format_name]}-{cover.label}"
    if name == "fp8-g32" and parts[suffix].format_name in ("U8", "F8_E8M0"):
        name = "mxfp8"
    if weight.format_name == "F8_E5M2":  # Format's float8 codes are e4m3
        return parts.converted(weight.shape, name, partial(_wide, key, suffix, cover))
    return parts.stored(weight.shape, name, partial(_read, name, key, suffix, cover))


def _check_scale(parts: Parts, suffix: str, experts: list[int], types: tuple[str, ...]) -> None:
    """A scale for all, one for each row, or some in rows and columns, of each expert."""
    shape = parts[suffix].shape
    parts.require(suffix, (None,) * min(len(shape), 1), types)
    if math.prod(shape) > 1 and list(shape[:-2]) != experts:
        raise parts.mismatch(suffix, f"there are experts of {tuple(experts)}" if experts else "there are no experts")


def _cover(key: str, suffix: str, parts: Parts) -> Cover:
    rows, cols = parts[key].shape[-2:]
    shape = parts[suffix].shape
    if math.prod(shape) == 1:
        return Cover(math.prod(parts[key].shape[:-1]), groups_of(parts, cols, cols), "tensor")
    per_col, per_row = (shape[0], 1) if len(shape) == 1 else shape[-2:]
    if per_col == rows and cols % per_row == 0:
        groups = groups_of(parts, cols, cols // per_row)
        return Cover(1, groups, groups.label)
    block_rows, block_cols = _block(parts)
    if (per_col, per_row) != (-(-rows // block_rows), -(-cols // block_cols)):
        raise parts.mismatch(suffix, f"a weight of {parts[key].shape} has other blocks of {block_rows} x {block_cols}")
    if rows % block_rows and len(parts[key].shape) > 2:
        raise parts.unsupported(f"has experts of {rows} rows in blocks of {block_rows}: supported are whole blocks")
    label = f"block{block_rows}" if block_rows == block_cols else f"block{block_rows}x{block_cols}"
    return Cover(block_rows, groups_of(parts, cols, block_cols), label)


def _block(parts: Parts) -> tuple[int, int]:
    """Rows and columns of a block, by DeepSeek's setting or compressed-tensors' (of the first group that has any)."""
    places = [(parts.settings, "weight_block_size")]
    for group in weight_groups(parts.settings):
        if (weights := group.inner("weights")) is not None:
            places.append((weights, "block_structure"))
    for values, key in places:
        if values.get(key) is not None:
            rows, cols = values.integers(key, 2)
            return rows, cols
    return DEFAULT_BLOCK


def _scale(key: str, suffix: str, cover: Cover, parts: Parts) -> np.ndarray:
    """(N, groups that the file has in a row)."""
    scale = parts.read(suffix)
    num_rows = math.prod(parts[key].shape[:-1])
    scale = scale.reshape(-1, 1) if scale.ndim < 2 else scale
    if scale.dtype == np.uint8:
        scale = scale.view(float8_e8m0fnu)
    return np.repeat(scale, cover.rows, axis=0)[:num_rows]


def _read(name: str, key: str, suffix: str, cover: Cover, parts: Parts) -> HostMatrix:
    weight, groups = parts.read(key), cover.groups
    scale = groups.spread(_scale(key, suffix, cover, parts))
    if weight.dtype != np.int8:
        return scaled_fp8(name, groups.group, weight, scale)
    zeros = None
    if ".weight_zero_point" in parts:
        zeros = groups.spread(_scale(key, ".weight_zero_point", cover, parts).astype(np.int8))
    return scaled_integers(name, 8, groups.group, weight, 0, scale, zeros)


def _wide(key: str, suffix: str, cover: Cover, parts: Parts) -> np.ndarray:
    scale = cover.groups.spread(_scale(key, suffix, cover, parts).astype(np.float32))
    return parts.read(key).astype(np.float32) * np.repeat(scale, cover.groups.group, axis=1)


INVERSE = HFFormat(".weight_scale_inv", (".weight",), partial(build, ".weight", ".weight_scale_inv"))
SCALED = HFFormat(".weight_scale", (".weight", ".weight_zero_point"), partial(build, ".weight", ".weight_scale"))
# of all experts in one tensor, as transformers 5 names them
EXPERTS = HFFormat("_proj_scale_inv", ("_proj",), partial(build, "_proj", "_proj_scale_inv"), result="_proj")
