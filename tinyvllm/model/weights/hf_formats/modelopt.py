"""NVIDIA's ModelOpt: NVFP4 as `weight` (two codes a byte), `weight_scale` (e4m3 a 16) and `weight_scale_2`, a float32
that multiplies them. Its FP8 is in scaled.py."""

from __future__ import annotations

import numpy as np

from tinyvllm.arrays import QuantizedMatrix
from tinyvllm.model.weights.hf_formats.matrices import FLOATS, HFFormat, Parts, scaled_fp4
from tinyvllm.model.weights.stored import StoredTensor

GROUP = 16


def build(parts: Parts) -> StoredTensor:
    """Raises UnsupportedModelError, WeightMismatchError."""
    if parts[".weight"].format_name != "U8" or parts[".weight_scale"].format_name != "F8_E4M3":
        raise parts.unsupported(
            f"has weights of type {parts['.weight'].format_name} and scales of {parts['.weight_scale'].format_name}: "
            "NVFP4 has U8 and F8_E4M3"
        )
    *rows, num_bytes = parts.require(".weight", (None, None), ("U8",))
    num_cols = num_bytes * 2
    if parts[".weight_scale_2"].format_name not in FLOATS or 0 in parts[".weight_scale_2"].shape:
        raise parts.mismatch(".weight_scale_2", "must be a float")
    if parts[".weight_scale"].shape != (*rows, num_cols // GROUP):
        raise parts.mismatch(".weight_scale", f"{num_cols} columns have {num_cols // GROUP} groups of {GROUP}")
    return parts.stored((*rows, num_cols), "nvfp4", _read)


def _read(parts: Parts) -> QuantizedMatrix:
    multiplier = parts.read(".weight_scale_2").reshape(-1).astype(np.float32)[0]
    return scaled_fp4("nvfp4", GROUP, parts.read(".weight"), parts.read(".weight_scale"), multiplier)


NVFP4 = HFFormat(".weight_scale_2", (".weight", ".weight_scale"), build)
