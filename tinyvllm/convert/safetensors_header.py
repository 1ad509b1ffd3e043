"""Lay out safetensors files: several if they would be large, as transformers and mlx-lm write them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from tinyvllm.convert.pieces import Plane
from tinyvllm.convert.stream import Place

FILE_BYTES = 5 << 30  # of values in a file, as in mlx-lm
ITEM_BYTES = {"F32": 4, "U32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1}
INDEX_NAME = "model.safetensors.index.json"


def write_headers(
    directory: Path, planes: Sequence[Plane], producer: str, file_bytes: int = FILE_BYTES
) -> dict[str, Place]:
    """Create the files, as long as they will be, and their index; returns where each array begins. `producer` is the
    metadata's `format`, by which transformers knows "pt" and mlx-lm "mlx"."""
    groups = _split(planes, file_bytes)
    places: dict[str, Place] = {}
    weight_map: dict[str, str] = {}
    for number, group in enumerate(groups, 1):
        name = "model.safetensors" if len(groups) == 1 else f"model-{number:05}-of-{len(groups):05}.safetensors"
        places |= _write_header(directory / name, group, producer)
        weight_map |= {plane.name: name for plane in group}
    if len(groups) > 1:
        metadata = {"total_size": sum(plane.num_bytes for plane in planes)}
        index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
        (directory / INDEX_NAME).write_text(json.dumps(index, indent=2), encoding="utf-8")
    return places


def _split(planes: Sequence[Plane], file_bytes: int) -> list[list[Plane]]:
    groups: list[list[Plane]] = [[]]
    size = 0
    for plane in planes:
        if groups[-1] and size + plane.num_bytes > file_bytes:
            groups.append([])
            size = 0
        groups[-1].append(plane)
        size += plane.num_bytes
    return groups


def _write_header(path: Path, planes: Sequence[Plane], producer: str) -> dict[str, Place]:
    # widest items first, which keeps every array aligned, as the library's own writer does
    ordered = sorted(planes, key=lambda plane: (-ITEM_BYTES[plane.dtype], plane.name))
    entries: dict[str, object] = {"__metadata__": {"format": producer}}
    offsets, offset = {}, 0
    for plane in ordered:
        offsets[plane.name] = offset
        entries[plane.name] = {
            "dtype": plane.dtype,
            "shape": list(plane.shape),
            "data_offsets": [offset, offset + plane.num_bytes],
        }
        offset += plane.num_bytes
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        start = file.tell()
        file.truncate(start + offset)
    return {name: Place(path, start + begin) for name, begin in offsets.items()}
