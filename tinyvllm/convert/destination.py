"""Where an output may go: what `--force` may replace, a temporary name until the output is complete, and errors."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tinyvllm.config import ModelFiles
from tinyvllm.errors import ModelError
from tinyvllm.storage.gguf_file import split_files
from tinyvllm.storage.gguf_header import MAGIC

SPARE_BYTES = 64 << 20  # of disk, for headers, tokenizer files and others' writing
# What a model directory has: weights, settings, the tokenizer's files and the license
MODEL_SUFFIXES = (".safetensors", ".json", ".jinja", ".model", ".txt", ".md")
MODEL_NAMES = ("LICENSE", "NOTICE", "README")
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
NOT_ALLOWED = (errno.EACCES, errno.EPERM, errno.EROFS)


@contextmanager
def finished(path: Path, num_bytes: int, *, force: bool) -> Iterator[Path]:
    """A temporary path beside `path`, which takes its name at the end: others never see half an output. On an error
    nothing is left behind, and what was at `path` is there still.

    Raises ModelError if `path` exists and `force` is not set, or if the disk has no room for `num_bytes`.
    """
    check_room(path, num_bytes)
    temporary, replaced = (path.with_name(f".{path.name}.{state}") for state in ("partial", "replaced"))
    remove(temporary)  # of a run that was killed
    is_directory = False
    try:
        yield temporary
        is_directory = temporary.is_dir()
        check_replaceable(path, is_directory=is_directory, force=force)  # again: converting takes minutes
        _take_name(temporary, path, replaced)
    finally:
        remove(temporary)


def _take_name(temporary: Path, path: Path, replaced: Path) -> None:
    """Rename the output. A directory cannot be replaced in one call: the old one is moved aside, and back on an
    error."""
    if not path.is_dir():
        os.replace(temporary, path)
        return
    remove(replaced)
    os.replace(path, replaced)
    try:
        os.replace(temporary, path)
    except OSError:
        os.replace(replaced, path)
        raise
    remove(replaced)


def check_room(path: Path, num_bytes: int) -> None:
    """Make the directory that `path` is in. Raises ModelError if its disk has no room for `num_bytes`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(path.parent).free
    if free < num_bytes + SPARE_BYTES:
        raise ModelError(
            f"{path} needs {num_bytes / 1e9:.2f} GB, but {path.parent} has {free / 1e9:.2f} GB free: free some space, "
            "or give another --out"
        )


def remove(path: Path) -> None:
    """Delete a file or a directory, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# --- What may be replaced ------------------------------------------------------------------------------------------


def check_destination(source: ModelFiles, path: Path, *, is_directory: bool, force: bool) -> None:
    """Raise ModelError if an output at `path` would replace or enter the source, or replace what `check_replaceable`
    refuses."""
    for ours in _files_of(source):
        if path.exists() and path.samefile(ours):
            raise ModelError(f"{path} is the source itself: give another --out")
        if ours.resolve().is_relative_to(path.resolve()):
            raise ModelError(f"{path} contains the source, {ours}: give another --out")
    if source.path.is_dir() and path.resolve().is_relative_to(source.path.resolve()):
        raise ModelError(f"{path} is inside the source, {source.path}: give another --out")
    check_replaceable(path, is_directory=is_directory, force=force)


def _files_of(source: ModelFiles) -> list[Path]:
    """The source and its files, which may be links to files elsewhere."""
    if source.path.is_dir():
        return [source.path, *sorted(source.path.iterdir())]
    return [source.path, *split_files(source.path)]


def check_replaceable(path: Path, *, is_directory: bool, force: bool) -> None:
    """Raise ModelError unless `path` is free or, with `force`, has a model of the output's kind: a GGUF file, or a
    directory that has nothing but a model's files."""
    if path.is_symlink():
        raise ModelError(f"{path} is a symbolic link to {path.resolve()}: give that as --out, or remove the link")
    if not path.exists():
        return
    _check_directory(path) if is_directory else _check_gguf(path)
    if not force:
        raise ModelError(f"{path} exists already: give another --out, or --force to replace it")


def _check_gguf(path: Path) -> None:
    if path.is_dir():
        raise ModelError(f"{path} is a directory, but the output is a GGUF file: give a file as --out")
    if not path.is_file() or not _begins_with_magic(path):
        raise ModelError(f"{path} is not a GGUF file, and nothing else is replaced by one: give another --out")


def _begins_with_magic(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def _check_directory(path: Path) -> None:
    if not path.is_dir():
        raise ModelError(f"{path} is a file, but the output is a directory: give a directory as --out")
    found = sorted(path.iterdir())
    if not (path / "config.json").is_file() or not any(one.suffix == ".safetensors" for one in found):
        raise ModelError(
            f"{path} is not a model directory (config.json and *.safetensors), and no other is replaced: give another "
            "--out, or remove it yourself"
        )
    for one in found:
        if not one.is_file() or not (one.suffix in MODEL_SUFFIXES or one.stem in MODEL_NAMES):
            raise ModelError(
                f"{path} has {one.name}, which is not part of a model that this command writes: give another --out, "
                "or move it away"
            )


# --- Errors --------------------------------------------------------------------------------------------------------


@contextmanager
def os_errors_named(source: ModelFiles, path: Path) -> Iterator[None]:
    """Raise an OSError of converting as a ModelError with the file, the reason and what to do."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        name = error.filename2 or error.filename  # of copying a file, the second is the copy
        where = Path(os.fsdecode(name)) if isinstance(name, (str, bytes)) else path
        if where.is_relative_to(source.path):
            raise ModelError(f"{where} cannot be read: {reason}: check the source's files") from error
        at = "" if where == path else f" ({where})"
        raise ModelError(f"{path} cannot be written: {reason}{at}: {_remedy(error)}") from error


def _remedy(error: OSError) -> str:
    if error.errno in NO_ROOM:
        return "free some space, or give another --out"
    if error.errno == errno.EFBIG:
        return "raise the limit (`ulimit -f`), or give an --out on a file system that takes larger files"
    if error.errno in NOT_ALLOWED:
        return "give an --out in a directory that you may write to"
    return "give another --out"
