"""The header of a safetensors file, read and checked against all rules of the format.

https://github.com/huggingface/safetensors/blob/b947b59079a6197d7930dfb535818ac4896113e8/README.md#format
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from tinyvllm.errors import ModelError
from tinyvllm.storage.regular_file import open_regular, shortened
from tinyvllm.storage.strict_json import parse_json
from tinyvllm.storage.values import is_integer, shown

LENGTH_BYTES = 8  # of the header's own length, which a file begins with
MAX_HEADER_BYTES = 100_000_000  # the library's own limit
MAX_NDIM = 16  # of a tensor; of those that models have: 4
LFS_POINTER = b"version "  # how a pointer of Git LFS begins
METADATA = "__metadata__"
# Bits of a value by the format's names of types
BITS = (
    {"BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "C64": 64}
    | dict.fromkeys(("U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8)
    | dict.fromkeys(("I16", "U16", "F16", "BF16"), 16)
    | dict.fromkeys(("I32", "U32", "F32"), 32)
    | dict.fromkeys(("I64", "U64", "F64"), 64)
)


@dataclass(frozen=True)
class Entry:
    """A tensor as the header lists it: its bytes are [begin, end) of the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors by name, in the order of their bytes. Raises ModelError for a file that breaks a rule."""
    with open_regular(path) as file:
        file_bytes = os.fstat(file.fileno()).st_size
        start = file.read(LENGTH_BYTES)
        if start == LFS_POINTER:
            raise ModelError(f"{path} is a pointer of Git LFS, not the weights: run `git lfs pull` there")
        size = int.from_bytes(start, "little")
        if len(start) < LENGTH_BYTES or size > file_bytes - LENGTH_BYTES:
            _refuse(path, f"its header would have {size} bytes, but the file has {file_bytes}")
        if size > MAX_HEADER_BYTES:
            _refuse(path, f"its header has {size} bytes, but may have at most {MAX_HEADER_BYTES}")
        try:
            stated = parse_json(file.read(size), "its header", allows_repeats=False)
        except ModelError as error:
            _refuse(path, str(error))
    if not isinstance(stated, dict):
        _refuse(path, "its header is not a JSON object")
    metadata = stated.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        _refuse(path, f"{METADATA} is not an object of texts")
    first = LENGTH_BYTES + size
    entries = [(name, _entry(path, name, value, first)) for name, value in stated.items()]
    entries.sort(key=lambda item: (item[1].begin, item[1].end))
    _check_layout(path, entries, first, file_bytes)
    return dict(entries)


def _entry(path: Path, name: str, value: Any, first: int) -> Entry:
    """One tensor. `first`: where the file's values begin."""
    if not isinstance(value, dict):
        _refuse(path, f"tensor {shortened(name)} is {shown(value)}, not an object")
    dtype, shape, offsets = (value.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in BITS:
        _refuse(path, f"tensor {shortened(name)} has the unknown type {shown(dtype)}; known: {', '.join(BITS)}")
    limit = 2**63 - 1
    if not isinstance(shape, list) or len(shape) > MAX_NDIM or not all(is_integer(size, 0, limit) for size in shape):
        _refuse(path, f"tensor {shortened(name)} has the shape {shown(shape)}, not a list of sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(is_integer(at, 0, limit) for at in offsets):
        _refuse(path, f"tensor {shortened(name)} has the data_offsets {shown(offsets)}, not a beginning and an end")
    begin, end = offsets
    num_bits = math.prod(shape) * BITS[dtype]
    if num_bits != (end - begin) * 8:
        _refuse(
            path,
            f"tensor {shortened(name)} of type {dtype} and shape {shown(shape)} takes {num_bits / 8:g} bytes, but its "
            f"data_offsets are {offsets}",
        )
    return Entry(dtype, tuple(shape), first + begin, first + end)


def _check_layout(path: Path, entries: list[tuple[str, Entry]], first: int, file_bytes: int) -> None:
    """Tensors must lie one after another, without sharing bytes and without gaps."""
    end, before = first, "the header"
    for name, entry in entries:
        if entry.begin != end:
            fault = "shares bytes with" if entry.begin < end else "leaves a gap after"
            _refuse(path, f"tensor {shortened(name)}, at byte {entry.begin}, {fault} {before}, which ends at {end}")
        end, before = entry.end, f"tensor {shortened(name)}"
    if end != file_bytes:
        _refuse(path, f"{before} ends at byte {end}, but the file has {file_bytes} bytes")


def _refuse(path: Path, fault: str) -> NoReturn:
    raise ModelError(f"{path} is cut short or damaged ({fault}); download it again")
