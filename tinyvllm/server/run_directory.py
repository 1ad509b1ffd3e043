"""The private directory of a running server: sockets and memory that its processes share."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

PREFIX = "tinyvllm-"
MAX_PATH_BYTES = 60  # Unix sockets' paths end at 107 bytes on Linux and 103 on macOS, and have a file's name
_LOCK = "lock"
_SHARED_MEMORY = Path("/dev/shm")


@contextlib.contextmanager
def run_directory() -> Iterator[Path]:
    """A new directory that only this user can enter, removed at the end. Also removes those of servers that died."""
    base = _base()
    sweep(base)
    path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=base))  # mode 0700
    with (path / _LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until this process ends, whatever ends it
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)


def _base() -> Path:
    """Memory if there is a file system for it: writing back mapped files to a disk can stall whoever writes them."""
    if _SHARED_MEMORY.is_dir() and os.access(_SHARED_MEMORY, os.W_OK | os.X_OK):
        return _SHARED_MEMORY
    base = Path(tempfile.gettempdir())
    return base if len(os.fsencode(base)) <= MAX_PATH_BYTES else Path("/tmp")


def sweep(base: Path) -> None:
    """Remove the directories in `base` that this user's servers left behind when they were killed."""
    for path in base.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):  # another server may be sweeping, too
            status = path.lstat()
            if stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not _is_in_use(path):
                shutil.rmtree(path)


def _is_in_use(path: Path) -> bool:
    try:
        lock = (path / _LOCK).open("rb")
    except FileNotFoundError:  # a server is starting, and locks it in a moment
        return True
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False
