"""Read a GGUF file: metadata as Python values, tensors as raw bytes of the memory map.

Our own reader of the header, because the gguf package's makes NumPy views of every string: 2.0 s for a vocabulary of
49k tokens and its merges, where this takes 0.07 s. Names, type numbers and block sizes are that package's.
Format: https://github.com/ggml-org/ggml/blob/9d325133eed396b7bf005a53a83d9747cbd8bde1/docs/gguf.md
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType, GGUFValueType

from tinyvllm.errors import ModelError, UnsupportedModelError
from tinyvllm.storage.resolve import SPLIT_FILE

MAGIC = b"GGUF"
OTHER_MAGICS = {
    b"vers": "it is a pointer of Git LFS, not the weights: run `git lfs pull` there",
    **dict.fromkeys(
        (b"lmgg", b"fmgg", b"tjgg", b"algg"), "it is in a format of ggml from before GGUF: get the model's GGUF file"
    ),
}
VERSIONS = (2, 3)
SCALAR_DTYPES = {
    GGUFValueType.UINT8: np.dtype("<u1"),
    GGUFValueType.INT8: np.dtype("<i1"),
    GGUFValueType.UINT16: np.dtype("<u2"),
    GGUFValueType.INT16: np.dtype("<i2"),
    GGUFValueType.UINT32: np.dtype("<u4"),
    GGUFValueType.INT32: np.dtype("<i4"),
    GGUFValueType.FLOAT32: np.dtype("<f4"),
    GGUFValueType.BOOL: np.dtype("?"),
    GGUFValueType.UINT64: np.dtype("<u8"),
    GGUFValueType.INT64: np.dtype("<i8"),
    GGUFValueType.FLOAT64: np.dtype("<f8"),
}
# Names of ggml's types by number. The gguf package of 2026 lacks the newest.
TYPE_NAMES = {int(known): known.name for known in GGMLQuantizationType} | {42: "Q2_0"}
# Weights and bytes of a block, by a type's name
BLOCK_SIZES = {known.name: size for known, size in GGML_QUANT_SIZES.items()} | {"Q2_0": (64, 18)}
# Layouts for one kind of CPU, which were files once; llama.cpp and its converters make them of Q4_0 and IQ4_NL today
REPACKED_TYPES = {31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8", 36: "IQ4_NL_4_4", 37: "IQ4_NL_4_8", 38: "IQ4_NL_8_8"}
U32, U64 = struct.Struct("<I"), struct.Struct("<Q")


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

    Raises ModelError for a file that is cut short or damaged, UnsupportedModelError for a version of the format or a
    type of tensor that is not known. The header is read again only when the file has changed; all objects of a file
    share its metadata and tensors, which must not be modified.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise ModelError(f"there is no file {path}")
        status = path.stat()
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
        if (stated := its_metadata.get("split.no", number)) != number:
            raise ModelError(f"{part} is part {stated + 1} by its metadata, but {number + 1} by its name: rename it")
        if twice := sorted(found.keys() & tensors.keys()):
            raise ModelError(f"{part} has tensor {twice[0]}, which another part has too: download all parts again")
        tensors |= found
    return metadata, tensors


def _read_part(path: Path) -> tuple[dict[str, Any], dict[str, GGUFTensor]]:
    """Metadata and tensors of one file."""
    if path.stat().st_size == 0:
        raise ModelError(f"{path} is empty: download it again")
    data = np.asarray(np.memmap(path, np.uint8, "r"))
    cursor = _Cursor(path, data)
    num_tensors, num_values = cursor.preamble()
    metadata = {}
    for _ in range(num_values):
        key = cursor.string()
        metadata[key] = cursor.value(cursor.number(U32))
    infos = [cursor.tensor_info() for _ in range(num_tensors)]
    if len(names := {info.name for info in infos}) < num_tensors:
        twice = next(name for name in names if sum(info.name == name for info in infos) > 1)
        raise ModelError(f"{path} has tensor {twice} twice: it is damaged, or its writer was")
    alignment = metadata.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise ModelError(f"{path}: general.alignment is {alignment!r}: it must be a power of two")
    start = -(-cursor.offset // alignment) * alignment
    return metadata, {info.name: _locate(info, path, data, start) for info in infos}


def split_files(path: Path) -> list[Path]:
    """The files of the model of which `path` is a file: one, or all parts of a split one."""
    return _parts(path, GGUFFile(path).metadata)


def read_metadata_bytes(path: Path) -> dict[str, bytes]:
    """The metadata of a file, or of the first part of a split one, as it is stored: a type number and the value. A copy
    of the file needs them, because the Python values do not tell whether a number was signed."""
    first = _parts(path, GGUFFile(path).metadata)[0]
    cursor = _Cursor(first, np.asarray(np.memmap(first, np.uint8, "r")))
    _, num_values = cursor.preamble()
    found = {}
    for _ in range(num_values):
        key, begin = cursor.string(), cursor.offset
        cursor.value(cursor.number(U32))
        found[key] = bytes(cursor.bytes[begin : cursor.offset])
    return found


def _parts(path: Path, metadata: dict[str, Any]) -> list[Path]:
    """The files of a split model, of which only the first has the model's metadata, or the one file of another.

    The parts are beside the given file. If it is a link with another name, as in a cache that keeps contents under
    their hashes, it is the link's own name that counts; a link whose name is not that of a part leads to its target.
    """
    count = metadata.get("split.count", 1)
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
    if missing := [part.name for part in parts if not part.is_file()]:
        raise ModelError(
            f"{path} is one of {count} parts, but its directory lacks {', '.join(missing)}: download all parts"
        )
    return [path, *parts[1:]] if parts[0] == named else parts


@dataclass(frozen=True)
class _TensorInfo:
    name: str
    shape: tuple[int, ...]
    type_number: int
    offset: int  # from the start of the data section


def _locate(info: _TensorInfo, path: Path, data: np.ndarray, start: int) -> GGUFTensor:
    """Find a tensor's bytes. Raises ModelError if they are not all there."""
    type_name = TYPE_NAMES.get(info.type_number)
    if type_name is None:
        raise UnsupportedModelError(f"{path}: tensor {info.name} has {_unknown_type(info.type_number)}")
    block_size, block_bytes = BLOCK_SIZES[type_name]
    columns = info.shape[-1] if info.shape else 1
    if columns % block_size != 0:
        raise ModelError(
            f"{path}: tensor {info.name} has {columns} columns, not a multiple of {block_size} ({type_name})"
        )
    begin = start + info.offset
    end = begin + math.prod(info.shape) // block_size * block_bytes
    if end > data.size:
        raise _cut_short(path, data.size, f"tensor {info.name} ends at byte {end}")
    return GGUFTensor(info.name, info.shape, type_name, data[begin:end])


def _unknown_type(number: int) -> str:
    if repacked := REPACKED_TYPES.get(number):
        plain = repacked[:-4]
        return f"type {repacked}, which llama.cpp has removed, too: get the {plain} file of this model"
    return f"type number {number}, which is not known; known: {', '.join(TYPE_NAMES.values())}"


def _cut_short(path: Path, num_bytes: int, detail: str) -> ModelError:
    return ModelError(f"{path} is cut short or damaged: it has {num_bytes} bytes, but {detail}; download it again")


class _Cursor:
    """Reads the header value by value. Raises ModelError at the end of the file."""

    def __init__(self, path: Path, data: np.ndarray) -> None:
        self.path = path
        self.bytes = data.data
        self.offset = 0

    def take(self, num_bytes: int) -> memoryview:
        end = self.offset + num_bytes
        if end > len(self.bytes):
            raise _cut_short(self.path, len(self.bytes), f"its header continues to byte {end} or further")
        taken = self.bytes[self.offset : end]
        self.offset = end
        return taken

    def number(self, form: struct.Struct) -> int:
        value: int = form.unpack(self.take(form.size))[0]
        return value

    def string(self) -> str:
        # a damaged character spoils one string, not the file: vocabularies with such entries are in use
        return str(self.take(self.number(U64)), "utf-8", "replace")

    def preamble(self) -> tuple[int, int]:
        """Counts of tensors and of metadata values."""
        magic = bytes(self.take(4))
        if magic != MAGIC:
            hint = OTHER_MAGICS.get(magic, f"it begins with {magic!r}, not {MAGIC!r}")
            raise ModelError(f"{self.path} is not a GGUF file: {hint}")
        version = self.number(U32)
        if version not in VERSIONS:
            order = " (is it a big-endian file?)" if version & 0xFFFF == 0 else ""
            known = " and ".join(map(str, VERSIONS))
            raise UnsupportedModelError(
                f"{self.path} has GGUF version {version}{order}, which is not supported; known: {known}"
            )
        return self.number(U64), self.number(U64)

    def value(self, type_number: int) -> Any:
        """A metadata value: str, int, float, bool or a list of one of them."""
        if type_number == GGUFValueType.STRING:
            return self.string()
        if type_number == GGUFValueType.ARRAY:
            return self.array(self.number(U32), self.number(U64))
        return self.scalars(type_number, 1)[0]

    def array(self, type_number: int, count: int) -> list[Any]:
        if type_number in (GGUFValueType.STRING, GGUFValueType.ARRAY):
            return [self.value(type_number) for _ in range(count)]
        return self.scalars(type_number, count)

    def scalars(self, type_number: int, count: int) -> list[Any]:
        dtype = SCALAR_DTYPES.get(type_number)  # type: ignore[call-overload]
        if dtype is None:
            raise _cut_short(self.path, len(self.bytes), f"a metadata value has type number {type_number}")
        values: list[Any] = np.frombuffer(self.take(count * dtype.itemsize), dtype).tolist()
        return values

    def tensor_info(self) -> _TensorInfo:
        name = self.string()
        lengths = [self.number(U64) for _ in range(self.number(U32))]  # columns first
        return _TensorInfo(name, tuple(reversed(lengths)), self.number(U32), self.number(U64))
