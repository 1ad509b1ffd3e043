"""Model directories in Hugging Face's format as values to mutate: JSON trees, headers of safetensors, bytes."""

from __future__ import annotations

import json
import math
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
    """A safetensors file. `size`: what it says of its header's length, if that is a lie. `is_whole`: the header has not
    been mutated."""

    header: Any
    data: bytes
    size: int | None = None
    is_whole: bool = True

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
    return _laid_out(
        {name: (kind, list(values.shape), values.tobytes(order="C")) for name, (kind, values) in arrays.items()}
    )


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
    if choice < 0.25:
        return replace(file, header=mutate_json(rng, file.header, rng.choice((1, 1, 2))), is_whole=False)
    if choice < 0.7 and file.is_whole:
        return _retyped(rng, file)
    if choice < 0.8:
        return replace(file, size=rng.choice((0, 1, 7, 2**31, 2**32, 2**63, 2**64 - 1, rng.randrange(5000))))
    if choice < 0.9:
        return replace(file, data=mutate_bytes(rng, file.data))
    data = file.to_bytes()
    return mutate_bytes(rng, data, within=min(len(data), 3000))


# Bytes of a value by the format's names of types
ITEM_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U8": 1, "I8": 1}
ITEM_BYTES |= {"BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1}


def _retyped(rng: Random, file: Tensors) -> Tensors:
    """A file whose header keeps the format's rules, with tensors of other types, shapes, names and sizes."""
    arrays = {
        name: (entry["dtype"], entry["shape"], file.data[slice(*entry["data_offsets"])])
        for name, entry in file.header.items()
        if name != "__metadata__"
    }
    for name in rng.sample(sorted(arrays), min(len(arrays), rng.choice((1, 1, 2, 5)))):
        kind, shape, raw = arrays.pop(name)
        if rng.random() < 0.3:
            kind = rng.choice(sorted(ITEM_BYTES))
        size = len(raw) // ITEM_BYTES[kind]
        place = rng.randrange(len(shape)) if shape else 0
        changed = [*shape[:place], rng.choice((0, 1, 2, 3, 7, 32, 100)), *shape[place + 1 :]] if shape else [1]
        flat: tuple[list[int], ...] = ([size], [size, 1], [1, size], [1, 1, size], [2 * size], [])
        near = (shape[::-1], [*shape, 1], [1, *shape], shape[1:], shape[:-1], [2, *shape])
        shape = rng.choice((*flat, *near, *[shape] * 2, *[changed] * 3))
        num_bytes = ITEM_BYTES[kind] * math.prod(shape)
        raw = raw[:num_bytes] + rng.choice((b"\0", b"\xff", b"\x01")) * (num_bytes - len(raw))
        other = rng.choice((name, name, name, name + "_", rng.choice(sorted([*arrays, name])), name.rpartition(".")[0]))
        if rng.random() < 0.95:  # otherwise it is missing
            arrays[other] = kind, shape, raw
    if rng.random() < 0.05:
        wrapper = rng.choice(("module.", "_orig_mod.", "model.", "language_model."))
        arrays = {wrapper + name: array for name, array in arrays.items()}
    return _laid_out(arrays)


def _laid_out(arrays: Mapping[str, tuple[str, list[int], bytes]]) -> Tensors:
    header, at = {}, 0
    for name, (kind, shape, raw) in arrays.items():
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [at, at + len(raw)]}
        at += len(raw)
    return Tensors(header, b"".join(raw for _, _, raw in arrays.values()))
