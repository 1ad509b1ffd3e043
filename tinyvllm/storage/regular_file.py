"""Read a model's files without trusting them: regular files only, and never more bytes than the caller allows.

A file that a stranger wrote may be a pipe, which blocks whoever opens it, or a device such as /dev/zero, which never
ends. Symbolic links are followed, because the cache of huggingface_hub consists of them; what counts is their target.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from tinyvllm.errors import ModelError

SNAPSHOTS, BLOBS = "snapshots", "blobs"  # of the cache of huggingface_hub, in the folder of each repository
MAX_SHOWN_NAME = 200  # characters
# By stat's file types, for messages
_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def is_regular(path: Path) -> bool:
    """Whether there is a regular file, or a link to one. Never raises: a name that is too long names no file."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except (OSError, ValueError):
        return False


def is_present(path: Path) -> bool:
    """Whether there is anything at `path`, even a broken link, which readers then refuse. Never raises."""
    try:
        os.lstat(path)
    except (OSError, ValueError):
        return False
    return True


def file_inside(directory: Path, name: str, source: Path) -> Path:
    """The path of a file that a model's file (`source`) names, which must lie in the model's directory.

    Refused are absolute names, names with "..", and links that lead out of the directory. Only the cache of
    huggingface_hub may have such links: from <repository>/snapshots/<commit> into <repository>/blobs. Raises
    ModelError.
    """
    pure = PurePosixPath(name)
    if not name or "\0" in name or "\\" in name or pure.is_absolute() or ".." in pure.parts:
        raise ModelError(f"{source} names {shortened(name)}, but must name files in {directory}")
    path = directory / name
    check_inside(directory, path)
    return path


def check_inside(directory: Path, path: Path) -> None:
    """Raise ModelError if `path`, which is in `directory` by its name, is a link that leads out of it."""
    try:
        home, target = directory.resolve(), path.resolve()
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle
        raise ModelError(f"cannot read {path}: {reason_of(error)}") from error
    homes = [home]
    if home.parent.name == SNAPSHOTS:
        homes.append(home.parent.parent / BLOBS)
    if not any(target.is_relative_to(allowed) for allowed in homes):
        raise ModelError(
            f"{path} is a link to {target}, which is outside the model's directory: copy the file into it, or give "
            "the directory that the file is in"
        )


def shortened(name: str) -> str:
    """A name from a file, in a message: one line, and short."""
    return repr(name if len(name) <= MAX_SHOWN_NAME else name[:MAX_SHOWN_NAME] + "...")


def file_status(path: Path) -> os.stat_result:
    """The status of a regular file. Raises ModelError for anything else."""
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:  # ValueError: a name with a null character
        raise ModelError(f"cannot read {path}: {reason_of(error)}") from error
    return _checked(path, status)


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading. Never blocks. Raises ModelError for anything else.

    The file is checked before it is opened, because opening a device may have effects, and again afterwards, because
    it may have been replaced.
    """
    file_status(path)
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise ModelError(f"cannot read {path}: {reason_of(error)}") from error
    file = os.fdopen(handle, "rb")
    try:
        _checked(path, os.fstat(handle))
    except BaseException:
        file.close()
        raise
    return file


def read_regular(path: Path, at_most: int) -> bytes:
    """All bytes of a regular file. Raises ModelError for anything else, and, without reading, for a file of more than
    `at_most` bytes."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > at_most:
            raise ModelError(f"{path} has {size} bytes, but a file of its kind must have at most {at_most}")
        try:
            data = file.read(size + 1)  # one more: it may have grown
        except OSError as error:
            raise ModelError(f"cannot read {path}: {reason_of(error)}") from error
    if len(data) > size:
        raise ModelError(f"{path} grew while it was read: wait until it is complete")
    return data


def entries_of(directory: Path) -> list[Path]:
    """The entries of a directory, sorted. Raises ModelError if it cannot be read."""
    try:
        return sorted(directory.iterdir())
    except OSError as error:
        raise ModelError(f"cannot read {directory}: {reason_of(error)}") from error


def reason_of(error: Exception) -> str:
    """The error's text without the path, which messages name once."""
    return (isinstance(error, OSError) and error.strerror) or str(error)


def _checked(path: Path, status: os.stat_result) -> os.stat_result:
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "not a regular file")
        raise ModelError(f"cannot read {path}: it is {kind}, and a model's files must be regular files")
    return status
