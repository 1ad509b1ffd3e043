"""Values that outlive the process, one checked file each, in a folder that only its user can write.

A file holds a pickle with machine code: anyone who can write it can run code here. So the folder and each file must
belong to the user and be writable by no one else. A checksum detects torn files. The unpickler constructs only listed
classes, which stops accidents and simple gadgets, but not an attacker who may write the machine code.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import os
import pickle
import stat
from collections.abc import Iterator
from pathlib import Path

from tinyvllm.config import cache_dir, cache_dir_variable
from tinyvllm.errors import CacheError
from tinyvllm.faults import reach

logger = logging.getLogger(__name__)

MAX_BYTES = 256 << 20  # of all files under a root; a model's graphs take a few MB
CHECKSUM_BYTES = hashlib.sha256().digest_size
WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH

# The classes of compiled kernels and recorded steps.
ALLOWED = {
    "tinygrad.uop": frozenset({"Ops"}),
    "tinygrad.uop.ops": frozenset({"UOp", "AxisType", "CallInfo", "KernelInfo", "ParamArg", "ProgramInfo"}),
    "tinygrad.dtype": frozenset({"AddrSpace", "DType", "PtrDType", "ImageDType", "InvalidType", "ConstFloat"}),
    "tinygrad.helpers": frozenset({"Target"}),
    "tinygrad.renderer": frozenset({"Estimates"}),
    "tinygrad.codegen.opt": frozenset({"Opt", "OptOps"}),
    "tinyvllm.device.recording": frozenset({"SavedStep"}),
}


def default_root() -> Path:
    """Where programs and steps are kept."""
    return cache_dir() / "programs"


class PrivateFolder:
    """The values of one key, which names what they depend on. Each key has a folder of its own under the same root.

    Processes may share it: a file is complete when it appears, and equal names hold equal values."""

    def __init__(self, root: Path, key: str) -> None:
        """Create or check the folders. Raises CacheError for a folder that others could write."""
        self.root, self.folder = root, root / key
        self._has_failed = False  # to write a value
        for folder in (self.root, self.folder):
            try:
                reach("cache.open")
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                _require_private(folder, os.lstat(folder))
            except (OSError, MemoryError) as error:
                raise CacheError(f"{folder} cannot be used: {error}") from error

    def read(self, name: str) -> object | None:
        """The value, or None if there is none that can be trusted. A damaged file is deleted."""
        path = self.folder / name
        try:
            reach("cache.read")
            value = _load(_read_private(path))
        except FileNotFoundError:
            return None
        except (CacheError, OSError, MemoryError) as error:
            logger.warning("%s is not used: %s", path, error)
            return None
        except Exception as error:  # unpickling damaged data may raise anything
            logger.warning("%s is damaged (%s): it will be rebuilt", path, error)
            with contextlib.suppress(OSError):
                path.unlink()
            return None
        with contextlib.suppress(OSError):
            os.utime(path)  # `trim` keeps what was read last
        return value

    def has(self, beginning: str) -> bool:
        """Whether there is a value whose name begins so."""
        with contextlib.suppress(OSError):
            return any(path.name.startswith(beginning) for path in self.folder.iterdir())
        return False

    def write(self, name: str, value: object) -> None:
        """Save a value. If it cannot be written (a full disk), the next start does without it."""
        temporary = self.folder / f".{name}.{os.getpid()}"
        try:
            payload = pickle.dumps(value, protocol=5)
            reach("cache.write")
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
            with os.fdopen(fd, "wb") as file:
                file.write(hashlib.sha256(payload).digest() + payload)
            os.replace(temporary, self.folder / name)
        except (OSError, MemoryError) as error:
            if not self._has_failed:  # on a full disk, each of hundreds of values fails
                logger.warning("%s cannot be kept for the next start: %s", self.folder / name, error)
            self._has_failed = True
            with contextlib.suppress(OSError):
                temporary.unlink()

    def trim(self, max_bytes: int = MAX_BYTES) -> None:
        """Delete the least recently used files of all keys until the root holds at most `max_bytes`."""
        newest_first = sorted(_files(self.root), key=lambda file: file[1].st_mtime, reverse=True)
        total = 0
        for path, info in newest_first:
            total += info.st_size
            if total > max_bytes:
                with contextlib.suppress(OSError):
                    path.unlink()
        for folder in self.root.iterdir():
            with contextlib.suppress(OSError):  # not empty, or not a folder
                folder.rmdir()


def _require_private(path: Path, info: os.stat_result) -> None:
    """Raises CacheError unless the path belongs to the user and no one else can write it."""
    if info.st_uid != os.getuid():
        raise CacheError(
            f"{path} belongs to user {info.st_uid}, not to you ({os.getuid()}): "
            f"delete it, or name another folder in {cache_dir_variable()}"
        )
    if stat.S_ISLNK(info.st_mode):
        raise CacheError(f"{path} is a symbolic link: put the folder itself there")
    if info.st_mode & WRITABLE_BY_OTHERS:
        raise CacheError(f"{path} can be written by others (mode {info.st_mode & 0o777:o}): chmod go-w {path}")


def _read_private(path: Path) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    with os.fdopen(fd, "rb") as file:
        _require_private(path, os.fstat(fd))
        return file.read()


def _load(content: bytes) -> object:
    checksum, payload = content[:CHECKSUM_BYTES], content[CHECKSUM_BYTES:]
    if hashlib.sha256(payload).digest() != checksum:
        raise ValueError("wrong checksum")
    return _Unpickler(io.BytesIO(payload)).load()


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> type:
        if name in ALLOWED.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not allowed in a cache file")


def _files(root: Path) -> Iterator[tuple[Path, os.stat_result]]:
    for path in root.glob("*/*"):
        with contextlib.suppress(OSError):  # another process deleted it
            yield path, path.stat()
