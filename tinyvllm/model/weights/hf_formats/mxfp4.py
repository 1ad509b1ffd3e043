"""MXFP4 as gpt-oss has it: `NAME_blocks` [..., out, in / 32, 16] and `NAME_scales` [..., out, in / 32], both uint8.

Codes are E2M1, two in a byte, the first in the low half; scales are powers of two, E8M0 (OCP Microscaling Formats 1.0).
"""

from __future__ import annotations

import numpy as np
from ml_dtypes import float8_e8m0fnu

from tinyvllm.arrays import QuantizedMatrix
from tinyvllm.model.weights.hf_formats.matrices import HFFormat, Parts, scaled_fp4
from tinyvllm.model.weights.stored import StoredTensor

GROUP = 32


def build(parts: Parts) -> StoredTensor:
    """Raises WeightMismatchError, UnsupportedModelError."""
    blocks, scales = parts["_blocks"], parts["_scales"]
    if (blocks.format_name, scales.format_name) != ("U8", "U8"):
        raise parts.unsupported(
            f"has blocks of type {blocks.format_name} and scales of {scales.format_name}: MXFP4 has U8 in both"
        )
    *rows, num_bytes = blocks.shape or (0,)
    if len(rows) < 2 or num_bytes * 2 != GROUP or 0 in rows:
        raise parts.mismatch("_blocks", f"{GROUP} codes take {GROUP // 2} bytes")
    if scales.shape != tuple(rows):
        raise parts.mismatch("_scales", f"the blocks have {blocks.shape}")
    return parts.stored((*rows[:-1], rows[-1] * GROUP), "mxfp4", _read)


def _read(parts: Parts) -> QuantizedMatrix:
    scale = parts.read("_scales").view(float8_e8m0fnu)
    packed = parts["_blocks"].read()
    assert isinstance(packed, np.ndarray)
    return scaled_fp4("mxfp4", GROUP, packed.reshape(len(scale), -1), scale)


FORMAT = HFFormat("_blocks", ("_scales",), build, result="")
