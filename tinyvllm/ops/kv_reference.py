"""Quantized keys and values in NumPy: it documents the formats, and tests of kernels compare against it."""

from __future__ import annotations

import numpy as np
from ml_dtypes import float8_e4m3fn

from tinyvllm.config import KVFormat

E4M3_MAX = 448.0


def quantize(x: np.ndarray, form: KVFormat) -> tuple[np.ndarray, np.ndarray | None]:
    """The codes (..., D * bits / 8) uint8 of heads x (..., D), and their scales (..., D / group) float16.
    ops/kernel/kv_format.py defines both."""
    x = x.astype(np.float32)
    if form.name == "fp8_e4m3":
        return np.clip(x, -E4M3_MAX, E4M3_MAX).astype(float8_e4m3fn).view(np.uint8), None
    groups = x.reshape(*x.shape[:-1], -1, form.group)
    if form.name == "q8_0":
        extremes, last = np.abs(groups).max(-1), np.float32(127)
        codes = np.clip(np.rint(groups * _inverse(extremes, last)), -127, 127).astype(np.int8).view(np.uint8)
    else:
        assert form.name == "q4_0", form
        high, low = groups.max(-1), groups.min(-1)
        extremes, last = np.where(high < -low, low, high), np.float32(-8)
        four = np.clip(np.rint(groups * _inverse(extremes, last)), -8, 7).astype(np.int8) + 8
        half = form.group // 2
        codes = (four[..., :half] | four[..., half:] << 4).astype(np.uint8)
    scales = (extremes * (np.float32(1) / last)).astype(np.float16)
    return codes.reshape(*x.shape[:-1], form.code_bytes(x.shape[-1])), scales


def dequantize(codes: np.ndarray, scales: np.ndarray | None, form: KVFormat) -> np.ndarray:
    """Heads (..., D) float32 of what `quantize` returns."""
    if scales is None:
        return codes.view(float8_e4m3fn).astype(np.float32)
    groups = codes.reshape(*scales.shape, -1)
    if form.name == "q8_0":
        whole = groups.view(np.int8).astype(np.float32)
    else:
        whole = np.concatenate([groups & 15, groups >> 4], axis=-1).astype(np.float32) - np.float32(8)
    return (whole * scales[..., None].astype(np.float32)).reshape(*scales.shape[:-1], -1)


def _inverse(extremes: np.ndarray, last: np.float32) -> np.ndarray:
    """last / extreme, 0 for 0, with an axis more."""
    wide = extremes[..., None]
    return np.divide(last, wide, out=np.zeros_like(wide), where=wide != 0)
