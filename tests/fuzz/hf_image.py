"""Model directories in Hugging Face's format as values to mutate: JSON trees, headers of safetensors, bytes."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from tests.fuzz.mutate import dump_json, mutate_bytes, mutate_json


@dataclass(frozen=True)
class Tree:
    """A JSON file."""

    value: Any

    def to_bytes(self) -> bytes:
        return dump_json(self.value)


@dataclass(frozen=True)
class Tensors:
    """A safetensors file. `size`: what it says of its header's length, if that is a lie."""

    header: Any
    data: bytes
    size: int | None = None

    def to_bytes(self) -> bytes:
        header = dump_json(self.header)
        size = len(header) if self.size is None else self.size
        return (size % 2**64).to_bytes(8, "little") + header + self.data


@dataclass(frozen=True)
class Link:
    """A symbolic link; or a pipe or a directory, if there is no target."""

    target: str = ""
    is_pipe: bool = False


File = Tree | Tensors | Link | bytes
Image = dict[str, File]  # by the path in the directory


def read_image(directory: Path) -> Image:
    return {str(path.relative_to(directory)): _parse(path) for path in sorted(directory.rglob("*")) if path.is_file()}


def _parse(path: Path) -> File:
    data = path.read_bytes()
    if path.suffix == ".json":
        return Tree(json.loads(data))
    if path.suffix == ".safetensors":
        begin = 8 + int.from_bytes(data[:8], "little")
        return Tensors(json.loads(data[8:begin]), data[begin:])
    return data


def make_tensors(arrays: Mapping[str, tuple[str, np.ndarray]]) -> Tensors:
    """A safetensors file of (the format's name of the type, values) by name."""
    header, data = {}, b""
    for name, (dtype, values) in arrays.items():
        raw = np.ascontiguousarray(values).tobytes()
        shape = list(values.shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    return Tensors(header, data)


def write_image(directory: Path, image: Image) -> None:
    directory.mkdir(parents=True)
    for name, file in image.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(file, bytes):
            path.write_bytes(file)
        elif not isinstance(file, Link):
            path.write_bytes(file.to_bytes())
        elif file.target:
            path.symlink_to(file.target)
        elif file.is_pipe:
            os.mkfifo(path)
        else:
            path.mkdir()


def mutate_file(rng: Random, file: File) -> File:
    """A file with mutated values, lengths or bytes."""
    if isinstance(file, bytes):
        return mutate_bytes(rng, file)
    if isinstance(file, Tree):
        if rng.random() < 0.05:
            return mutate_bytes(rng, file.to_bytes())
        return Tree(mutate_json(rng, file.value, rng.choice((1, 1, 1, 2, 4))))
    assert isinstance(file, Tensors)
    choice = rng.random()
    if choice < 0.5:
        return replace(file, header=mutate_json(rng, file.header, rng.choice((1, 1, 2))))
    if choice < 0.7:
        return replace(file, header=_retyped(rng, file.header))
    if choice < 0.8:
        return replace(file, size=rng.choice((0, 1, 7, 2**31, 2**32, 2**63, 2**64 - 1, rng.randrange(5000))))
    if choice < 0.9:
        return replace(file, data=mutate_bytes(rng, file.data))
    data = file.to_bytes()
    return mutate_bytes(rng, data, within=min(len(data), 3000))


# Bytes of a value by the format's names of types
ITEM_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U8": 1, "I8": 1}
ITEM_BYTES |= {"BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1}


def _retyped(rng: Random, header: dict[str, Any]) -> dict[str, Any]:
    """The header with tensors of other types, shapes and names, whose bytes are right: the format's rules hold."""
    header = dict(header)
    for name in rng.sample(sorted(header), min(len(header), rng.choice((1, 1, 2, 5)))):
        entry = dict(header[name])
        if "data_offsets" not in entry:
            continue
        num_bytes = entry["data_offsets"][1] - entry["data_offsets"][0]
        kind = rng.choice(sorted(ITEM_BYTES))
        if rng.random() < 0.5 and num_bytes % ITEM_BYTES[kind] == 0:
            entry |= {"dtype": kind, "shape": [num_bytes // ITEM_BYTES[kind]]}
        size, shape = num_bytes // ITEM_BYTES.get(entry["dtype"], 1), entry["shape"]
        entry["shape"] = rng.choice(
            ([size], [size, 1], [1, size], [1, 1, size], shape[::-1], [*shape, 1], [1] * 5 + shape, shape)
        )
        other = rng.choice((name, name, name + "_", rng.choice(sorted(header)), name.rpartition(".")[0]))
        header.pop(name)
        header[other] = entry
    return header
