"""A GGUF file, or all parts of a split one: metadata as Python values, tensors as raw bytes of the memory map."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from tinyvllm.errors import ModelError, UnsupportedModelError
from tinyvllm.storage.gguf_header import Cursor, TensorInfo, cut_short, printable
from tinyvllm.storage.gguf_types import ALIGNMENT, BLOCK_SIZES, TYPE_NAMES
from tinyvllm.storage.regular_file import file_status, is_present, is_regular, open_regular
from tinyvllm.storage.resolve import SPLIT_FILE
from tinyvllm.storage.values import Values

# Layouts for one kind of CPU, which were files once; llama.cpp and its converters make them of Q4_0 and IQ4_NL today
REPACKED_TYPES = {31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8", 36: "IQ4_NL_4_4", 37: "IQ4_NL_4_8", 38: "IQ4_NL_8_8"}
MAX_PARTS = 0xFFFF  # split.count is a uint16
MAX_LISTED = 5  # names of missing parts in a message


@dataclass(frozen=True)
class GGUFTensor:
    """One tensor. `data` is its bytes, (num_bytes,) uint8, which are read from disk when they are used."""

    name: str
    shape: tuple[int, ...]  # NumPy's order: rows first
    ggml_type: str  # "F32", "Q4_K", ...
    data: np.ndarray


class GGUFFile:
    """A GGUF file's metadata and tensors. Given any part of a split model, the tensors of all parts and the metadata of
    the first.

    Raises ModelError for a file that is no regular one, or is cut short or damaged, UnsupportedModelError for a version
    of the format or a type of tensor that is not known. The header is read again only when the file has changed; all
    objects of a file share its metadata and tensors, which must not be modified.
    """

    def __init__(self, path: Path) -> None:
        if not is_present(path):
            raise ModelError(f"there is no file {path}")
        status = file_status(path)
        self.path = path
        self.metadata, self.tensors = _read_model(path.absolute(), status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=4)
def _read_model(path: Path, mtime_ns: int, num_bytes: int) -> tuple[dict[str, Any], dict[str, GGUFTensor]]:
    """Metadata and tensors of a file and, if it was split, of its other parts."""
    metadata, tensors = _read_part(path)
    first, *others = _parts(path, metadata)
    if first != path:
        metadata, tensors = _read_part(first)
    for number, part in enumerate(others, 1):
        its_metadata, found = _read_part(part)
        if (stated := _split_value(part, its_metadata, "split.no", number)) != number:
            raise ModelError(f"{part} is part {stated + 1} by its metadata, but {number + 1} by its name: rename it")
        if twice := sorted(found.keys() & tensors.keys()):
            raise ModelError(
                f"{part} has tensor {printable(twice[0])}, which another part has too: download all parts again"
            )
        tensors |= found
    return metadata, tensors


def _read_part(path: Path) -> tuple[dict[str, Any], dict[str, GGUFTensor]]:
    """Metadata and tensors of one file."""
    data = _map(path)
    cursor = Cursor(path, data)
    num_tensors, num_keys = cursor.preamble()
    metadata = cursor.metadata(num_keys)
    infos = cursor.tensor_infos(num_tensors)
    alignment = _alignment(Values(path, metadata))
    start = -(-cursor.offset // alignment) * alignment
    tensors = {info.name: _locate(info, path, data, start) for info in infos}
    _require_apart(path, infos, tensors, alignment)
    return metadata, tensors


def _map(path: Path) -> np.ndarray:
    """The file's bytes, which are read from disk when they are used."""
    with open_regular(path) as file:
        if file.seek(0, 2) == 0:
            raise ModelError(f"{path} is empty: download it again")
        return np.asarray(np.memmap(file, np.uint8, "r"))


def _alignment(values: Values) -> int:
    """The data section and each tensor in it begin at a multiple of this many bytes."""
    alignment = values.integer("general.alignment", ALIGNMENT)
    if alignment & (alignment - 1):
        values.refuse("general.alignment", "a power of two")
    return alignment


def _locate(info: TensorInfo, path: Path, data: np.ndarray, start: int) -> GGUFTensor:
    """Find a tensor's bytes. Raises ModelError if they are not all there."""
    name, type_name = printable(info.name), TYPE_NAMES.get(info.type_number)
    if type_name is None:
        raise UnsupportedModelError(f"{path}: tensor {name} has {_unknown_type(info.type_number)}")
    block_size, block_bytes = BLOCK_SIZES[type_name]
    columns = info.shape[-1]
    if columns % block_size != 0:
        raise ModelError(f"{path}: tensor {name} has {columns} columns, not a multiple of {block_size} ({type_name})")
    begin = start + info.offset
    end = begin + math.prod(info.shape) // block_size * block_bytes
    if end > data.size:
        raise cut_short(path, data.size, f"tensor {name} ends at byte {end}")
    return GGUFTensor(info.name, info.shape, type_name, data[begin:end])


def _require_apart(path: Path, infos: Sequence[TensorInfo], tensors: dict[str, GGUFTensor], alignment: int) -> None:
    """Raise ModelError for a tensor that begins inside another one, or is not aligned. llama.cpp even requires each to
    begin at the next possible offset after the one before it."""
    end, before = 0, ""
    for info in sorted(infos, key=lambda info: info.offset):
        name = printable(info.name)
        if info.offset < end:
            raise ModelError(
                f"{path}: tensor {name} begins at offset {info.offset}, inside tensor {before}: the file is damaged, "
                "or written wrongly"
            )
        if info.offset % alignment:
            raise ModelError(f"{path}: tensor {name} begins at offset {info.offset}, not a multiple of {alignment}")
        end, before = info.offset + tensors[info.name].data.size, name


def _unknown_type(number: int) -> str:
    if repacked := REPACKED_TYPES.get(number):
        plain = repacked[:-4]
        return f"type {repacked}, which llama.cpp has removed, too: get the {plain} file of this model"
    return f"type number {number}, which is not known; known: {', '.join(TYPE_NAMES.values())}"


def split_files(path: Path) -> list[Path]:
    """The files of the model of which `path` is a file: one, or all parts of a split one."""
    return _parts(path, GGUFFile(path).metadata)


def read_metadata_bytes(path: Path) -> dict[str, bytes]:
    """The metadata of a file, or of the first part of a split one, as it is stored: a type number and the value. A copy
    of the file needs them, because the Python values do not tell whether a number was signed."""
    first = _parts(path, GGUFFile(path).metadata)[0]
    cursor = Cursor(first, _map(first))
    _, num_keys = cursor.preamble()
    found = {}
    for key, type_number in cursor.keys(num_keys):
        begin = cursor.offset - 4
        cursor.value(key, type_number)
        found[key] = bytes(cursor.bytes[begin : cursor.offset])
    return found


def _parts(path: Path, metadata: dict[str, Any]) -> list[Path]:
    """The files of a split model, of which only the first has the model's metadata, or the one file of another.

    The parts are beside the given file. If it is a link with another name, as in a cache that keeps contents under
    their hashes, it is the link's own name that counts; a link whose name is not that of a part leads to its target.
    """
    count = _split_value(path, metadata, "split.count", 1)
    if count < 2:
        return [path]
    named = next((place for place in (path, path.resolve()) if SPLIT_FILE.fullmatch(place.name)), None)
    match = None if named is None else SPLIT_FILE.fullmatch(named.name)
    if named is None or match is None or int(match["count"]) != count:
        raise ModelError(
            f"{path} is one of {count} parts, which must be called NAME-00001-of-{count:05}.gguf and so on"
        )
    begin, end = match.span("number")
    parts = [named.with_name(f"{named.name[:begin]}{number:05}{named.name[end:]}") for number in range(1, count + 1)]
    if missing := [part.name for part in parts if not is_regular(part)]:
        listed = ", ".join(missing[:MAX_LISTED]) + (", ..." if len(missing) > MAX_LISTED else "")
        raise ModelError(f"{path} is one of {count} parts, but its directory lacks {listed}: download all parts")
    return [path, *parts[1:]] if parts[0] == named else parts


def _split_value(path: Path, metadata: dict[str, Any], key: str, default: int) -> int:
    return Values(path, metadata).integer(key, default, at_least=0, at_most=MAX_PARTS)
