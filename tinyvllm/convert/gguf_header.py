"""Write a GGUF file's header: metadata, names and shapes. The values are filled in later.

Format: https://github.com/ggml-org/ggml/blob/9d325133eed396b7bf005a53a83d9747cbd8bde1/docs/gguf.md
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType, GGUFValueType

from tinyvllm.convert.pieces import Plane
from tinyvllm.convert.stream import Place

VERSION = 3


def write_header(path: Path, metadata: Mapping[str, bytes], planes: Sequence[Plane]) -> dict[str, Place]:
    """Create the file, as long as it will be, and return where each tensor begins. `metadata`: as `pack_value` gives
    it. Tensors are in the given order, each at a multiple of 32 bytes."""
    parts = [b"GGUF", struct.pack("<IQQ", VERSION, len(planes), len(metadata))]
    for key, value in metadata.items():
        parts += [pack_string(key), value]
    offset, offsets = 0, {}
    for plane in planes:
        offsets[plane.name] = offset
        parts += [pack_string(plane.name), _pack_info(plane, offset)]
        offset += _aligned(plane.num_bytes)
    header = b"".join(parts)
    start = _aligned(len(header))
    with path.open("wb") as file:
        file.write(header)
        file.truncate(start + offset)
    return {name: Place(path, start + offset) for name, offset in offsets.items()}


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // GGUF_DEFAULT_ALIGNMENT) * GGUF_DEFAULT_ALIGNMENT


def _pack_info(plane: Plane, offset: int) -> bytes:
    columns_first = plane.shape[::-1]
    type_number = int(GGMLQuantizationType[plane.dtype])
    return struct.pack(f"<I{len(columns_first)}QIQ", len(columns_first), *columns_first, type_number, offset)


def pack_string(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def pack_value(value: Any) -> bytes:
    """A metadata value with its type, as llama.cpp's converter chooses it: whole numbers are uint32, fractions float32;
    lists hold strings, booleans, float32 or int32."""
    if isinstance(value, str):
        return _number(GGUFValueType.STRING) + pack_string(value)
    if isinstance(value, bool):
        return _number(GGUFValueType.BOOL) + struct.pack("<?", value)
    if isinstance(value, int):
        return _number(GGUFValueType.UINT32) + struct.pack("<I", value)
    if isinstance(value, float):
        return _number(GGUFValueType.FLOAT32) + struct.pack("<f", value)
    assert isinstance(value, list) and value, f"{value!r} has no type in GGUF"
    return _number(GGUFValueType.ARRAY) + _pack_list(value)


def _pack_list(values: list[Any]) -> bytes:
    first = values[0]
    if isinstance(first, str):
        return _list_head(GGUFValueType.STRING, values) + b"".join(map(pack_string, values))
    if isinstance(first, bool):
        return _list_head(GGUFValueType.BOOL, values) + np.array(values, np.bool_).tobytes()
    if isinstance(first, float):
        return _list_head(GGUFValueType.FLOAT32, values) + np.array(values, "<f4").tobytes()
    return _list_head(GGUFValueType.INT32, values) + np.array(values, "<i4").tobytes()


def _list_head(element: GGUFValueType, values: list[Any]) -> bytes:
    return struct.pack("<IQ", element, len(values))


def _number(value_type: GGUFValueType) -> bytes:
    return struct.pack("<I", value_type)
