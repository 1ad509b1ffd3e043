"""bitsandbytes' 4 bits (NF4, FP4): `weight` of two codes a byte, the first in the high half, and beside it
`weight.absmax`, `weight.quant_map` and `weight.quant_state.bitsandbytes__nf4`, a JSON text.

Blocks of 64 follow one another through the whole tensor. With double quantization absmax are codes of 8 bits too, whose
values are in `nested_quant_map`, scaled by `nested_absmax`, plus `nested_offset`:
https://github.com/bitsandbytes-foundation/bitsandbytes/blob/main/bitsandbytes/functional.py
"""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import numpy as np

from tinyvllm.arrays import Format, LazyCodes, QuantizedMatrix, Scales
from tinyvllm.model.weights.hf_formats.matrices import (
    Groups,
    HFFormat,
    Parts,
    groups_of,
    scale_format,
    unpack_bits,
)
from tinyvllm.model.weights.stored import StoredTensor

STATES = {kind: f".weight.quant_state.bitsandbytes__{kind}" for kind in ("nf4", "fp4")}


def build(parts: Parts) -> StoredTensor:
    """Raises UnsupportedModelError, WeightMismatchError."""
    kind = next((kind for kind, suffix in STATES.items() if suffix in parts), "nf4")
    state = json.loads(parts.read(STATES[kind]).tobytes())
    num_rows, num_cols = state["shape"]
    if num_cols % int(state["blocksize"]):  # blocks go on in the next row
        return parts.converted((num_rows, num_cols), kind, partial(_wide, state))
    groups = groups_of(parts, num_cols, int(state["blocksize"]))
    return parts.stored((num_rows, num_cols), kind, partial(_read, kind, state, groups))


def refuse_int8(parts: Parts) -> StoredTensor:
    raise parts.unsupported(
        "is in the int8 of bitsandbytes, which multiplies outliers apart and is not supported: "
        "take the model's unquantized, FP8, GPTQ or GGUF file"
    )


def _absmax(state: dict[str, Any], parts: Parts) -> np.ndarray:
    """(blocks,) float32."""
    absmax = parts.read(".weight.absmax").reshape(-1)
    if ".weight.nested_absmax" not in parts:
        return absmax.astype(np.float32)
    values = parts.read(".weight.nested_quant_map").reshape(-1)[absmax]
    scale = np.repeat(parts.read(".weight.nested_absmax").reshape(-1), int(state["nested_blocksize"]))[: len(absmax)]
    return (values * scale + np.float32(state["nested_offset"])).astype(np.float32)


def _packed(parts: Parts) -> np.ndarray:
    """All bytes of the codes, which some models store as values of a wider type (bnb_4bit_quant_storage)."""
    return parts.read(".weight").reshape(-1).view(np.uint8)


def _codes(packed: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """(N, bytes) -> (rows, 2 * bytes) uint8."""
    chosen = packed[rows]
    return unpack_bits(chosen >> 4 | chosen << 4, 4, 2 * packed.shape[1])


def _read(kind: str, state: dict[str, Any], groups: Groups, parts: Parts) -> QuantizedMatrix:
    num_rows, num_cols = state["shape"]
    scale = groups.spread(_absmax(state, parts).reshape(num_rows, -1))
    codebook = tuple(map(float, parts.read(".weight.quant_map").reshape(-1)))
    fmt = Format(kind, 4, groups.group, scale=scale_format(scale, groups.group), codebook=codebook)
    codes = LazyCodes(partial(_codes, _packed(parts).reshape(num_rows, -1)), (num_rows, num_cols))
    return QuantizedMatrix(fmt, codes, Scales(scale))


def _wide(state: dict[str, Any], parts: Parts) -> np.ndarray:
    codes = _codes(_packed(parts).reshape(1, -1), np.arange(1))[0]  # of the whole tensor
    values = parts.read(".weight.quant_map").reshape(-1)[codes]
    scale = np.repeat(_absmax(state, parts), int(state["blocksize"]))[: values.size]
    wide: np.ndarray = (values * scale).reshape(state["shape"])
    return wide


FORMAT = HFFormat(
    ".weight.absmax",
    (".weight", ".weight.quant_map", ".weight.nested_absmax", ".weight.nested_quant_map", *STATES.values()),
    build,
)
INT8 = HFFormat(".SCB", (".weight",), refuse_int8)
