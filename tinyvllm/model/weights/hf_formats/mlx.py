"""MLX's own formats: `weight` (uint32 words of codes), `scales` and, in affine mode, `biases` (not `bias`).

`quantization` in config.json gives bits and group, for all modules and, under a module's path, for one. Modes:
https://ml-explore.github.io/mlx/build/html/python/_autosummary/mlx.core.quantize.html
"""

from __future__ import annotations

from functools import partial

import numpy as np
from ml_dtypes import float8_e4m3fn, float8_e8m0fnu

from tinyvllm.arrays import CODE_BITS, Format, QuantizedMatrix, Scales
from tinyvllm.model.weights.hf_formats.matrices import (
    FLOATS,
    HFFormat,
    Parts,
    scale_format,
    scaled_fp4,
    scaled_fp8,
    stream_codes,
)
from tinyvllm.model.weights.stored import StoredTensor
from tinyvllm.storage.values import Values

DEFAULTS = {"affine": (64, 4), "mxfp4": (32, 4), "mxfp8": (32, 8), "nvfp4": (16, 4)}  # group and bits of each mode
GROUPS = (32, 64, 128)


def build(parts: Parts) -> StoredTensor:
    """One matrix, or one for each of several experts. Raises UnsupportedModelError, WeightMismatchError."""
    mode, group, bits = _settings(parts)
    *rows, words = parts.require(".weight", (None, None), ("U32",))
    num_cols = words * 32 // bits
    if not num_cols // group or parts[".scales"].shape != (*rows, num_cols // group):
        raise parts.mismatch(".scales", f"{bits} bits in groups of {group} make it {(*rows, num_cols // group)}")
    parts.require(".scales", (None, None), FLOATS if mode == "affine" else ("U8",))
    if mode == "affine":
        parts.require(".biases", (None, None), FLOATS)
        if parts[".biases"].shape != parts[".scales"].shape:
            raise parts.mismatch(".biases", f"the scales have {parts['.scales'].shape}")
        return parts.stored((*rows, num_cols), f"mlx-{bits}bit-g{group}", partial(_affine, bits, group))
    return parts.stored((*rows, num_cols), mode, partial(_float, mode))


def _settings(parts: Parts) -> tuple[str, int, int]:
    """Mode, group and bits of a module: its own if the files give them, else those of all."""
    general = parts.settings
    own = general.get(parts.name)
    values = Values(general.source, dict(general.values) | (own if isinstance(own, dict) else {}))
    mode = values.choice("mode", DEFAULTS, "affine")
    group, bits = values.integer("group_size", DEFAULTS[mode][0]), values.integer("bits", DEFAULTS[mode][1])
    if mode != "affine" and (group, bits) != (known := DEFAULTS[mode]):
        raise parts.unsupported(
            f"has {bits} bits in groups of {group}: {mode} has {known[1]} bits in groups of {known[0]}"
        )
    if group not in GROUPS and mode == "affine":
        values.unsupported("group_size", ", ".join(map(str, GROUPS)))
    if bits not in CODE_BITS:
        values.unsupported("bits", ", ".join(map(str, CODE_BITS)))
    return mode, group, bits


def _affine(bits: int, group: int, parts: Parts) -> QuantizedMatrix:
    scale, minimum = parts.read(".scales"), parts.read(".biases")
    codes = stream_codes(parts.read(".weight"), bits, scale.shape[1] * group)
    forms = scale_format(scale, group), scale_format(minimum, group)
    fmt = Format(f"mlx-{bits}bit-g{group}", bits, group, -128 if bits == 8 else 0, *forms)
    return QuantizedMatrix(fmt, codes, Scales(scale), Scales(minimum))


def _float(mode: str, parts: Parts) -> QuantizedMatrix:
    """Codes that are small floats, with a scale of 8 bits for each group."""
    scale = parts.read(".scales").view(float8_e4m3fn if mode == "nvfp4" else float8_e8m0fnu)
    make = scaled_fp8 if mode == "mxfp8" else scaled_fp4
    return make(mode, DEFAULTS[mode][0], parts.read(".weight").view(np.uint8), scale)


FORMAT = HFFormat(".scales", (".weight", ".biases"), build)
