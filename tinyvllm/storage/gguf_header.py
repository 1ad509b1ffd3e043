"""Read the header of a GGUF file: metadata as Python values, and where each tensor is.

Our own reader, because the gguf package makes NumPy views of every string: it takes 2.0 s for a vocabulary of 49k
tokens and its merges, this one 0.07 s. Counts and lengths are checked before anything is allocated: a header never
takes more memory than a small multiple of its own size.
Format: https://github.com/ggml-org/ggml/blob/9d325133eed396b7bf005a53a83d9747cbd8bde1/docs/gguf.md
What is refused here is refused by llama.cpp too, except where a limit says otherwise:
https://github.com/ggml-org/llama.cpp/blob/067d44f6c48459f7a82dbafc6fbd0bae97755a4e/ggml/src/gguf.cpp
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tinyvllm.errors import ModelError, UnsupportedModelError
from tinyvllm.storage.gguf_types import ValueType
from tinyvllm.storage.regular_file import shortened

MAGIC = b"GGUF"
OTHER_MAGICS = {
    b"vers": "it is a pointer of Git LFS, not the weights: run `git lfs pull` there",
    **dict.fromkeys(
        (b"lmgg", b"fmgg", b"tjgg", b"algg"), "it is in a format of ggml from before GGUF: get the model's GGUF file"
    ),
}
VERSIONS = (2, 3)
SCALAR_DTYPES = {
    ValueType.UINT8: np.dtype("<u1"),
    ValueType.INT8: np.dtype("<i1"),
    ValueType.UINT16: np.dtype("<u2"),
    ValueType.INT16: np.dtype("<i2"),
    ValueType.UINT32: np.dtype("<u4"),
    ValueType.INT32: np.dtype("<i4"),
    ValueType.FLOAT32: np.dtype("<f4"),
    ValueType.BOOL: np.dtype("?"),
    ValueType.UINT64: np.dtype("<u8"),
    ValueType.INT64: np.dtype("<i8"),
    ValueType.FLOAT64: np.dtype("<f8"),
}
# Limits that llama.cpp does not have, far above what models need
MAX_KEYS = 1 << 16  # files have fewer than a hundred
MAX_TENSORS = 1 << 18  # Kimi K2 would have 70,000 if each expert's matrices were tensors of their own
MAX_ITEMS = 3 << 20  # of all arrays together: Gemma's vocabulary of 262,144 tokens takes 1.3 million
MAX_TEXT_BYTES = 1 << 26  # of one text: whole tokenizer.json files of 30 MB are in use
MAX_NAME_BYTES = 0xFFFF  # of a key, and of a tensor's name: the format's own limit for keys
MAX_DIMS = 4  # ggml's
U32, U64 = struct.Struct("<I"), struct.Struct("<Q")


@dataclass(frozen=True)
class TensorInfo:
    """A tensor as the header states it."""

    name: str
    shape: tuple[int, ...]  # NumPy's order: rows first
    type_number: int
    offset: int  # from the start of the data section


def cut_short(path: Path, num_bytes: int, detail: str) -> ModelError:
    return ModelError(f"{path} is cut short or damaged: it has {num_bytes} bytes, but {detail}; download it again")


class Cursor:
    """Reads the header value by value. Raises ModelError at the end of the file, and for counts out of bounds."""

    def __init__(self, path: Path, data: np.ndarray) -> None:
        self.path = path
        self.bytes = data.data
        self.offset = 0
        self._num_items = 0  # in all arrays up to here

    def take(self, num_bytes: int) -> memoryview:
        end = self.offset + num_bytes
        if end > len(self.bytes):
            raise cut_short(self.path, len(self.bytes), f"its header continues to byte {end} or further")
        taken = self.bytes[self.offset : end]
        self.offset = end
        return taken

    def number(self, form: struct.Struct) -> int:
        value: int = form.unpack(self.take(form.size))[0]
        return value

    def string(self, at_most: int = MAX_TEXT_BYTES) -> str:
        num_bytes = self.number(U64)
        if num_bytes > at_most:
            if self.offset + num_bytes > len(self.bytes):
                self.take(num_bytes)  # says that the file is damaged, as it most likely is
            raise ModelError(f"{self.path}: a text in its header has {num_bytes} bytes: it must have at most {at_most}")
        # a damaged character spoils one string, not the file: vocabularies with such entries are in use
        return str(self.take(num_bytes), "utf-8", "replace")

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
        num_tensors, num_keys = self.number(U64), self.number(U64)
        for what, count, limit in (("tensors", num_tensors, MAX_TENSORS), ("keys", num_keys, MAX_KEYS)):
            if count > limit:
                raise ModelError(f"{self.path} states {count} {what}: a GGUF file must have at most {limit}")
        return num_tensors, num_keys

    def metadata(self, num_keys: int) -> dict[str, Any]:
        """The values by key. Raises ModelError for a key that comes twice."""
        found: dict[str, Any] = {}
        for key, type_number in self.keys(num_keys):
            if key in found:
                raise ModelError(f"{self.path} has the key {shortened(key)} twice: it is damaged, or written wrongly")
            found[key] = self.value(key, type_number)
        return found

    def keys(self, num_keys: int) -> Iterator[tuple[str, int]]:
        """Each key with the type of its value, which the caller reads before it asks for the next."""
        for _ in range(num_keys):
            yield self.string(MAX_NAME_BYTES), self.number(U32)

    def value(self, key: str, type_number: int) -> Any:
        """A metadata value: str, int, float, bool or a list of one of them."""
        if type_number == ValueType.STRING:
            return self.string()
        if type_number == ValueType.ARRAY:
            return self._array(key, self.number(U32), self.number(U64))
        return self._scalars(key, type_number, 1)[0]

    def _array(self, key: str, type_number: int, count: int) -> list[Any]:
        self._num_items += count
        if self._num_items > MAX_ITEMS:
            raise ModelError(
                f"{self.path}: {shortened(key)} is a list of {count} items: the lists of a GGUF file must have at most "
                f"{MAX_ITEMS} together"
            )
        if type_number == ValueType.STRING:
            return self._strings(count)
        return self._scalars(key, type_number, count)

    def _strings(self, count: int) -> list[str]:
        """The same as `count` calls of `string`, which would take most of a header's time."""
        found, data, end, read = [], self.bytes, self.offset, U64.unpack_from
        for _ in range(count):
            begin = end + U64.size
            end = begin + read(data, end)[0] if begin <= len(data) else begin
            if end > len(data) or end - begin > MAX_TEXT_BYTES:
                break
            found.append(str(data[begin:end], "utf-8", "replace"))
            self.offset = end
        return found if len(found) == count else [*found, self.string()]  # which says what is wrong

    def _scalars(self, key: str, type_number: int, count: int) -> list[Any]:
        dtype = SCALAR_DTYPES.get(type_number)  # type: ignore[call-overload]
        if dtype is None:
            kind = "a list of lists" if type_number == ValueType.ARRAY else f"of type number {type_number}"
            raise ModelError(
                f"{self.path}: {shortened(key)} is {kind}: a value must be a text, a number, a boolean or a list of "
                "one of them; the file is damaged: download it again"
            )
        values: list[Any] = np.frombuffer(self.take(count * dtype.itemsize), dtype).tolist()
        return values

    def tensor_infos(self, num_tensors: int) -> list[TensorInfo]:
        """Raises ModelError for a name that comes twice."""
        found: dict[str, TensorInfo] = {}
        for _ in range(num_tensors):
            info = self._tensor_info()
            if info.name in found:
                raise ModelError(
                    f"{self.path} has tensor {printable(info.name)} twice: it is damaged, or written wrongly"
                )
            found[info.name] = info
        return list(found.values())

    def _tensor_info(self) -> TensorInfo:
        name = self.string(MAX_NAME_BYTES)
        num_dims = self.number(U32)
        if num_dims > MAX_DIMS:
            raise ModelError(
                f"{self.path}: tensor {printable(name)} has {num_dims} dimensions: it must have at most {MAX_DIMS}"
            )
        lengths = [self.number(U64) for _ in range(num_dims)] or [1]  # columns first
        if not all(lengths):
            raise ModelError(f"{self.path}: tensor {printable(name)} has a dimension of 0: all must be at least 1")
        return TensorInfo(name, tuple(reversed(lengths)), self.number(U32), self.number(U64))


def printable(name: str) -> str:
    """A tensor's name in a message: unchanged, unless it is too long or has unusual characters."""
    return name if name.isprintable() and name and len(name) < 200 else shortened(name)
