"""A GGUF file taken apart, so that each of its parts can be changed and the rest still be read.

Format: https://github.com/ggml-org/ggml/blob/9d325133eed396b7bf005a53a83d9747cbd8bde1/docs/gguf.md
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass, field, replace
from typing import Any

STRING, ARRAY, BOOL = 8, 9, 7
FORMS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
FLOATS = (6, 12)
KINDS = (*FORMS, STRING, ARRAY)


@dataclass(frozen=True)
class Value:
    """A metadata value. `kind`: its type number. `item`: a number, bytes, or a list of an array's items.

    `item_kind`: of an array's items, which are `Value`s if they are arrays themselves. `stated`: the length that is
    written in place of the true one.
    """

    kind: int
    item: Any
    item_kind: int = 0
    stated: int | None = None


@dataclass(frozen=True)
class TensorInfo:
    name: bytes
    lengths: tuple[int, ...]  # columns first
    kind: int
    offset: int
    num_dims: int | None = None  # written in place of the true number


@dataclass(frozen=True)
class Image:
    """A whole file. `num_tensors`, `num_values`: written in place of the true counts."""

    values: list[tuple[bytes, Value]]
    tensors: list[TensorInfo]
    data: bytes
    magic: bytes = b"GGUF"
    version: int = 3
    alignment: int = 32
    num_tensors: int | None = None
    num_values: int | None = None

    def header(self) -> bytes:
        counts = (
            len(self.tensors) if self.num_tensors is None else self.num_tensors,
            len(self.values) if self.num_values is None else self.num_values,
        )
        parts = [self.magic, struct.pack("<I", self.version & 0xFFFFFFFF), *map(_u64, counts)]
        for key, value in self.values:
            parts += [_text(key), struct.pack("<I", value.kind), pack(value)]
        for tensor in self.tensors:
            num_dims = len(tensor.lengths) if tensor.num_dims is None else tensor.num_dims
            parts += [_text(tensor.name), struct.pack("<I", num_dims & 0xFFFFFFFF), *map(_u64, tensor.lengths)]
            parts += [struct.pack("<I", tensor.kind & 0xFFFFFFFF), _u64(tensor.offset)]
        return b"".join(parts)

    def to_bytes(self) -> bytes:
        header = self.header()
        return header + bytes(-len(header) % self.alignment) + self.data

    def with_value(self, key: bytes, value: Value) -> Image:
        """With another value of a key, or with one more."""
        values = [(name, value if name == key else old) for name, old in self.values]
        return replace(self, values=values if key in dict(self.values) else [*values, (key, value)])


def pack(value: Value) -> bytes:
    """The bytes after the type number."""
    if value.kind == STRING:
        return _text(value.item, value.stated)
    if value.kind != ARRAY:
        return _number(value.kind, value.item)
    count = len(value.item) if value.stated is None else value.stated
    return struct.pack("<I", value.item_kind & 0xFFFFFFFF) + _u64(count) + b"".join(_items(value))


def _items(value: Value) -> list[bytes]:
    if value.item_kind == STRING:
        return [_text(item) for item in value.item]
    if value.item_kind == ARRAY:
        return [pack(item) for item in value.item]
    return [_number(value.item_kind, item) for item in value.item]


def _number(kind: int, number: Any) -> bytes:
    """A number as the kind has it: whole numbers are cut to its bits, and too large ones are infinite."""
    form = FORMS.get(kind)
    if form is None:
        return b""
    if form == "?":
        return bytes([bool(number)])
    if kind in FLOATS:
        try:
            return struct.pack(f"<{form}", number)
        except OverflowError:
            return struct.pack(f"<{form}", float("inf") if number > 0 else float("-inf"))
    width = struct.calcsize(form)
    whole = number if isinstance(number, int) else int(number) if math.isfinite(number) else 0
    return (whole & ((1 << 8 * width) - 1)).to_bytes(width, "little")


def _text(text: bytes, stated: int | None = None) -> bytes:
    return _u64(len(text) if stated is None else stated) + text


def _u64(number: int) -> bytes:
    return struct.pack("<Q", number & 0xFFFFFFFFFFFFFFFF)


@dataclass
class _Reader:
    data: bytes
    offset: int = field(default=0)

    def take(self, form: str) -> Any:
        value = struct.unpack_from(f"<{form}", self.data, self.offset)[0]
        self.offset += struct.calcsize(f"<{form}")
        return value

    def text(self) -> bytes:
        length = self.take("Q")
        self.offset += length
        return self.data[self.offset - length : self.offset]

    def value(self, kind: int) -> Value:
        if kind == ARRAY:
            item_kind, count = self.take("I"), self.take("Q")
            return Value(kind, [self._item(item_kind) for _ in range(count)], item_kind)
        return Value(kind, self._item(kind))

    def _item(self, kind: int) -> Any:
        if kind == STRING:
            return self.text()
        return self.value(kind) if kind == ARRAY else self.take(FORMS[kind])


def parse(data: bytes) -> Image:
    """The parts of a valid file."""
    reader = _Reader(data, offset=4)
    version, num_tensors, num_values = reader.take("I"), reader.take("Q"), reader.take("Q")
    values = [(reader.text(), reader.value(reader.take("I"))) for _ in range(num_values)]
    tensors = []
    for _ in range(num_tensors):
        name = reader.text()
        lengths = tuple(reader.take("Q") for _ in range(reader.take("I")))
        tensors.append(TensorInfo(name, lengths, reader.take("I"), reader.take("Q")))
    return Image(values, tensors, data[-(-reader.offset // 32) * 32 :], version=version)
