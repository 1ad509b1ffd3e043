"""bitsandbytes' 4 bits (NF4, FP4): `weight` of two codes a byte, the first in the high half, and beside it
`weight.absmax`, `weight.quant_map` and `weight.quant_state.bitsandbytes__nf4`, a JSON text.

Blocks of 64 follow one another through the whole tensor. With double quantization absmax are codes of 8 bits too, whose
values are in `nested_quant_map`, scaled by `nested_absmax`, plus `nested_offset`:
https://github.com/bitsandbytes-foundation/bitsandbytes/blob/main/bitsandbytes/functional.py
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import numpy as np

from tinyvllm.arrays import Format, LazyCodes, QuantizedMatrix, Scales
from tinyvllm.model.weights.hf_formats.matrices import (
    FLOATS,
    Groups,
    HFFormat,
    Parts,
    groups_of,
    scale_format,
    unpack_bits,
)
from tinyvllm.model.weights.stored import StoredTensor
from tinyvllm.storage.strict_json import kind_of, parse_json
from tinyvllm.storage.values import Values

NESTED = ".weight.nested_absmax"
NUM_CODES = 16
STATES = {kind: f".weight.quant_state.bitsandbytes__{kind}" for kind in ("nf4", "fp4")}


def build(parts: Parts) -> StoredTensor:
    """Raises UnsupportedModelError, WeightMismatchError."""
    kind = next((kind for kind, suffix in STATES.items() if suffix in parts), "nf4")
    state = _read_state(kind, parts)
    shape = state.num_rows, state.num_cols
    _check_parts(state, parts)
    if state.num_cols % state.block_size:  # blocks go on in the next row
        return parts.converted(shape, kind, partial(_wide, state))
    groups = groups_of(parts, state.num_cols, state.block_size)
    return parts.stored(shape, kind, partial(_read, kind, state, groups))


@dataclass(frozen=True)
class State:
    """What the quantizer says of a matrix. `nested`: the block size and the offset of absmax where that is quantized
    too."""

    num_rows: int
    num_cols: int
    block_size: int
    nested: tuple[int, float] | None


def _read_state(kind: str, parts: Parts) -> State:
    parts.require(STATES[kind], (None,), ("U8",))
    source = parts.settings.source.parent / (parts.name + STATES[kind])
    stated = parse_json(parts.read(STATES[kind]).tobytes(), str(source))
    if not isinstance(stated, dict):
        raise parts.unsupported(f"has a state of bitsandbytes that is {kind_of(stated)}, not an object")
    values = Values(source, stated)
    if not isinstance(values.get("shape"), list):
        values.refuse("shape", "a list of 2 sizes")
    num_rows, num_cols = values.integers("shape", 2)
    nested = None
    if NESTED in parts:
        nested = values.integer("nested_blocksize"), values.signed("nested_offset")
    return State(num_rows, num_cols, values.integer("blocksize"), nested)


def _check_parts(state: State, parts: Parts) -> None:
    """Raise WeightMismatchError for tensors whose number of values differs from what the state says."""
    size = state.num_rows * state.num_cols
    num_blocks = -(-size // state.block_size)
    counts = {".weight": -(-size // 2), ".weight.absmax": num_blocks, ".weight.quant_map": NUM_CODES}
    types = {".weight": (*FLOATS, "U8"), ".weight.absmax": FLOATS, ".weight.quant_map": FLOATS}
    if state.nested is not None:
        counts |= {NESTED: -(-num_blocks // state.nested[0]), ".weight.nested_quant_map": 256}
        types |= {NESTED: FLOATS, ".weight.nested_quant_map": FLOATS, ".weight.absmax": ("U8",)}
    for suffix, count in counts.items():
        shape = parts.require(suffix, (), types[suffix])
        found = parts[suffix].num_bytes if suffix == ".weight" else math.prod(shape)
        if found != count:
            raise parts.mismatch(suffix, f"the state says {state.num_rows} x {state.num_cols}: {count} of its values")


def refuse_int8(parts: Parts) -> StoredTensor:
    raise parts.unsupported(
        "is in the int8 of bitsandbytes, which multiplies outliers apart and is not supported: "
        "take the model's unquantized, FP8, GPTQ or GGUF file"
    )


def _absmax(state: State, parts: Parts) -> np.ndarray:
    """(blocks,) float32."""
    absmax = parts.read(".weight.absmax").reshape(-1)
    if state.nested is None:
        return absmax.astype(np.float32)
    block_size, offset = state.nested
    values = parts.read(".weight.nested_quant_map").reshape(-1)[absmax]
    scale = parts.read(NESTED).reshape(-1)[np.arange(len(absmax)) // block_size]
    return (values * scale + np.float32(offset)).astype(np.float32)


def _packed(parts: Parts) -> np.ndarray:
    """All bytes of the codes, which some models store as values of a wider type (bnb_4bit_quant_storage)."""
    return parts.read(".weight").reshape(-1).view(np.uint8)


def _codes(packed: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """(N, bytes) -> (rows, 2 * bytes) uint8."""
    chosen = packed[rows]
    return unpack_bits(chosen >> 4 | chosen << 4, 4, 2 * packed.shape[1])


def _read(kind: str, state: State, groups: Groups, parts: Parts) -> QuantizedMatrix:
    num_rows, num_cols = state.num_rows, state.num_cols
    scale = groups.spread(_absmax(state, parts).reshape(num_rows, -1))
    codebook = tuple(map(float, parts.read(".weight.quant_map").reshape(-1)))
    fmt = Format(kind, 4, groups.group, scale=scale_format(scale, groups.group), codebook=codebook)
    codes = LazyCodes(partial(_codes, _packed(parts).reshape(num_rows, -1)), (num_rows, num_cols))
    return QuantizedMatrix(fmt, codes, Scales(scale))


def _wide(state: State, parts: Parts) -> np.ndarray:
    codes = _codes(_packed(parts).reshape(1, -1), np.arange(1))[0]  # of the whole tensor
    values = parts.read(".weight.quant_map").reshape(-1)[codes]
    scale = _absmax(state, parts)[np.arange(values.size) // state.block_size]
    wide: np.ndarray = (values * scale)[: state.num_rows * state.num_cols].reshape(state.num_rows, state.num_cols)
    return wide


FORMAT = HFFormat(
    ".weight.absmax",
    (".weight", ".weight.quant_map", ".weight.nested_absmax", ".weight.nested_quant_map", *STATES.values()),
    build,
)
INT8 = HFFormat(".SCB", (".weight",), refuse_int8)
