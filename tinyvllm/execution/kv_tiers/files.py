"""The files of the tier on disk: one for each block or checkpoint, complete and checked, or ignored.

A file is a header, the block's tokens (int32), and its bytes. The header has the format's version; a digest of all that
the bytes depend on besides the tokens: the weights, the model's settings, the format and layout of the pool, the block
size; the hash of the block and of all before it, in which the salt and the adapter are; and a checksum.
"""

from __future__ import annotations

import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tinyvllm.errors import CacheError
from tinyvllm.faults import reach
from tinyvllm.scheduling.tiers import Key

MAGIC = b"tvllm-kv"
VERSION = 1
HEADER = struct.Struct("<8sII16s16siIQI4x")  # magic, version, own size, digest, hash, kind, tokens, bytes, checksum
SUFFIX = ".kv"


@dataclass(frozen=True)
class Block:
    """What a file is for. digest: 16 bytes, of what the content depends on besides the tokens."""

    digest: bytes
    key: Key
    tokens: bytes

    @property
    def name(self) -> str:
        """Of its file."""
        return file_name(self.key)

    def header(self, data: NDArray[np.uint8]) -> bytes:
        checksum = zlib.crc32(data.data, zlib.crc32(self.tokens))
        sizes = (len(self.tokens), data.nbytes)
        return HEADER.pack(
            MAGIC, VERSION, HEADER.size, self.digest, self.key.block_hash, self.key.kind, *sizes, checksum
        )


def file_name(key: Key) -> str:
    return f"{key.block_hash.hex()}.{key.kind + 1}{SUFFIX}"


def key_of(name: str) -> Key | None:
    """The key of a file's name; None for a name that is not of these files."""
    digits, _, kind = name.removesuffix(SUFFIX).partition(".")
    if not name.endswith(SUFFIX) or len(digits) != 32 or not kind.isdecimal():
        return None
    try:
        return Key(int(kind) - 1, bytes.fromhex(digits))
    except ValueError:
        return None


def is_unfinished(name: str) -> bool:
    """Whether it is the name of a block's file that is being written."""
    begun, _, process = name.rpartition(".")
    return begun.startswith(".") and process.isdecimal() and key_of(begun[1:]) is not None


def write_block(folder: Path, block: Block, data: NDArray[np.uint8]) -> int:
    """Write a block's file, which appears complete. Returns its size. Raises OSError."""
    temporary = folder / f".{block.name}.{os.getpid()}"
    parts = [memoryview(block.header(data) + block.tokens), data.data]
    size = sum(map(len, parts))
    try:
        reach("tier.write")
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
        try:
            written = os.writev(fd, parts)
            while written < size:  # a signal, or more than 2 GiB
                rest = b"".join(parts)[written:]
                written += os.write(fd, rest)
        finally:
            os.close(fd)
        os.replace(temporary, folder / block.name)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    return size


def read_block(folder: Path, block: Block, data: NDArray[np.uint8]) -> None:
    """Read a block's file into `data`. Raises FileNotFoundError, OSError, and CacheError for a file that is damaged, or
    of something else."""
    reach("tier.read")
    head = bytearray(HEADER.size + len(block.tokens))
    fd = os.open(folder / block.name, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        size = os.readv(fd, [head, data.data])
        is_longer = os.read(fd, 1) != b""
        os.utime(fd)  # the least recently used are deleted first
    finally:
        os.close(fd)
    if is_longer or size != len(head) + data.nbytes:
        raise CacheError(f"it has {'more' if is_longer else size} bytes instead of {len(head) + data.nbytes}")
    if bytes(head) != block.header(data) + block.tokens:
        found = HEADER.unpack(bytes(head[: HEADER.size]))
        if found[:2] != (MAGIC, VERSION):
            raise CacheError("it is not a KV block of this version")
        if found[3] != block.digest or bytes(head[HEADER.size :]) != block.tokens:
            raise CacheError("it is of another model or other tokens")
        raise CacheError("its checksum is wrong")
