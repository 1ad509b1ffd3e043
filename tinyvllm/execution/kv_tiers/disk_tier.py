"""Copies of blocks on disk. One thread writes and deletes files, others read them; the engine's thread does neither.

Servers may share a folder, with the same model or others: each model and format has a folder of its own in it. Whoever
finds that all of them together exceed the limit deletes the files that were used least recently.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import queue
import re
import stat
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tinyvllm.config import usable_cores
from tinyvllm.device.private_folder import WRITABLE_BY_OTHERS
from tinyvllm.errors import CacheError
from tinyvllm.execution.kv_tiers.files import Block, is_unfinished, key_of, read_block, write_block
from tinyvllm.faults import reach
from tinyvllm.scheduling.tiers import Key

logger = logging.getLogger(__name__)

MAX_READERS = 8  # threads; they are as many as cores
RESCAN_S = 30.0  # how often files of other servers are looked for
PAUSE_S = 30.0  # after a failure to write
TRIMMED = 0.9  # of the limit that is left after deleting
STALE_S = 3600.0  # age of an unfinished file whose writer must be dead
CLOSE_S = 10.0  # how long the end of the server waits for blocks to be written
FOLDER_NAME = re.compile("[0-9a-f]{32}")  # of a model and format
NAME_TAKEN = frozenset({errno.EISDIR, errno.ELOOP})  # by a folder or a link: other blocks can be written

Done = Callable[[bool], None]  # called on another thread: whether it succeeded


@dataclass(frozen=True)
class _Write:
    block: Block
    data: NDArray[np.uint8]
    done: Done
    wait: Callable[[], None]  # for the data


class DiskTier:
    """Owns the folder of one model and format within `root`."""

    def __init__(self, root: Path, digest: bytes, max_bytes: int, max_queued_bytes: int) -> None:
        """max_bytes: of all models' files under `root`. max_queued_bytes: of copies that wait to be written. Never
        raises: an unusable folder is logged, and nothing is read or written."""
        self._root, self._digest = root, digest
        self._folder = root / digest.hex()
        self.max_bytes, self._max_queued_bytes = max_bytes, max_queued_bytes
        self.used_bytes = 0  # of all files under the root, when they were last counted, and since
        self.queued_bytes = 0
        self.num_failed = 0  # files that could not be read or written, or were damaged
        self._known: dict[Key, int] = {}  # the files, with their sizes
        self._jobs: queue.SimpleQueue[_Write | Callable[[], None] | None] = queue.SimpleQueue()
        self._readers = ThreadPoolExecutor(min(MAX_READERS, usable_cores()), thread_name_prefix="tinyvllm-kv-read")
        self._lock = threading.Lock()
        self._paused_until_s = 0.0
        self._warned: set[str] = set()  # messages that have been logged
        self.is_usable = self._open()
        self._thread = threading.Thread(target=self._run, name="tinyvllm-kv-write", daemon=True)
        self._thread.start()

    # -- on the engine's thread ----------------------------------------------------------------------------------------

    def has(self, key: Key) -> bool:
        """Whether there was a file when the folder was last read."""
        return key in self._known

    @property
    def num_files(self) -> int:
        return len(self._known)

    @property
    def is_paused(self) -> bool:
        """Whether nothing is written at all, for now or for good."""
        return not self.is_usable or time.monotonic() < self._paused_until_s

    def can_write(self, nbytes: int) -> bool:
        """Whether a block may be handed over now."""
        return self.queued_bytes + nbytes <= self._max_queued_bytes and not self.is_paused

    def write(
        self, key: Key, tokens: bytes, data: NDArray[np.uint8], done: Done, wait: Callable[[], None] = lambda: None
    ) -> None:
        """Write a block. Its data is there when `wait` has returned, and stays as it is until `done` is called."""
        with self._lock:
            self.queued_bytes += data.nbytes
        self._jobs.put(_Write(Block(self._digest, key, tokens), data, done, wait))

    def read(self, key: Key, tokens: bytes, data: NDArray[np.uint8], done: Done) -> None:
        """Read a block into `data`, which nobody else uses until `done` is called."""
        self._readers.submit(self._read, Block(self._digest, key, tokens), data, done)

    def drop(self, key: Key) -> None:
        """Delete a block's file, or the one that is about to be written."""
        self._known.pop(key, None)
        self._jobs.put(lambda: self._delete(key))

    def clear(self) -> None:
        """Delete the files of this model and format."""
        self._known = {}
        self._jobs.put(self._delete_all)

    def close(self) -> None:
        """Write what is queued, for a while, and stop."""
        self._jobs.put(None)
        self._thread.join(CLOSE_S)
        self._readers.shutdown(wait=False, cancel_futures=True)

    def wait_idle(self) -> None:
        """Return when everything that was handed over is written or deleted."""
        passed = threading.Event()
        self._jobs.put(passed.set)
        passed.wait()

    # -- on other threads ----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        """The writing thread's main function."""
        while True:
            try:
                job = self._jobs.get(timeout=RESCAN_S)
            except queue.Empty:
                job = self._scan
            if job is None:
                return
            if isinstance(job, _Write):
                self._write(job)
                continue
            try:
                job()
            except Exception:
                logger.exception("the KV blocks on disk cannot be put in order")

    def _write(self, job: _Write) -> None:
        is_written = False
        try:
            job.wait()
            if time.monotonic() >= self._paused_until_s and job.block.key not in self._known:
                size = self._put(job.block, job.data)
                self._known[job.block.key] = size
                self.used_bytes += size
                is_written = True
                if self.used_bytes > self.max_bytes:
                    self._trim()
        except (OSError, CacheError) as error:
            self.num_failed += 1
            if isinstance(error, OSError) and error.errno in NAME_TAKEN:
                self._warn("a KV block is not written to %s: %s", self._folder, error)
            else:
                self._paused_until_s = time.monotonic() + PAUSE_S
                message = "KV blocks cannot be written to %s: %s. Trying again every %.0f s"
                self._warn(message, self._folder, error, PAUSE_S)
        except Exception as error:  # of the device, or memory: other blocks may succeed
            self.num_failed += 1
            self._warn("a KV block is not written to %s: %s", self._folder, error or type(error).__name__)
        finally:
            with self._lock:
                self.queued_bytes -= job.data.nbytes
            job.done(is_written)

    def _put(self, block: Block, data: NDArray[np.uint8]) -> int:
        """Write a file, and its folder again if it is gone: another server removes empty ones, and people remove
        caches. Returns the file's size."""
        try:
            return write_block(self._folder, block, data)
        except FileNotFoundError:
            self._make_folder()
            return write_block(self._folder, block, data)

    def _read(self, block: Block, data: NDArray[np.uint8], done: Done) -> None:
        is_read = False
        try:
            read_block(self._folder, block, data)
            is_read = True
        except FileNotFoundError:  # another server has deleted it
            self._known.pop(block.key, None)
        except CacheError as error:
            self.num_failed += 1
            logger.warning("%s is not used and deleted: %s", self._folder / block.name, error)
            self._known.pop(block.key, None)
            self._delete(block.key)
        except Exception as error:
            self.num_failed += 1
            self._known.pop(block.key, None)
            self._warn("KV blocks cannot be read from %s: %s", self._folder, error)
        finally:
            done(is_read)

    def _warn(self, message: str, *values: object) -> None:
        """Log a kind of failure once: on a full disk, each of many blocks fails."""
        if message not in self._warned:
            logger.warning(message, *values)
        self._warned.add(message)

    def _open(self) -> bool:
        try:
            reach("tier.open")
            self._make_folder()
            self._scan()
        except (OSError, CacheError, MemoryError, RuntimeError) as error:
            logger.warning("KV blocks are not kept on disk: %s cannot be used: %s", self._root, error)
            return False
        return True

    def _make_folder(self) -> None:
        """Raises OSError, and CacheError if others can write the folder or put another in its place."""
        self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
        _check_root(self._root)
        self._folder.mkdir(mode=0o700, exist_ok=True)
        info = os.lstat(self._folder)
        if info.st_uid != os.getuid() or stat.S_ISLNK(info.st_mode) or info.st_mode & WRITABLE_BY_OTHERS:
            raise CacheError(
                f"{self._folder} (owner {info.st_uid}, mode {stat.S_IMODE(info.st_mode):04o}) must be a folder of this "
                f"user that nobody else can write: delete it, or choose another --kv-disk-cache"
            )

    def _scan(self) -> None:
        """Learn which files there are, those of other servers included."""
        known, total = {}, 0
        for path, info in _files(self._root):
            total += info.st_size
            if path.parent == self._folder and (key := key_of(path.name)) is not None:
                known[key] = info.st_size
        self._known, self.used_bytes = known, total
        if total > self.max_bytes:
            self._trim()

    def _trim(self) -> None:
        """Delete the least recently used files until the rest is well below the limit."""
        oldest_first = sorted(_files(self._root), key=lambda file: file[1].st_mtime_ns)
        total = sum(info.st_size for _, info in oldest_first)
        for path, info in oldest_first:
            if total <= TRIMMED * self.max_bytes:
                break
            with contextlib.suppress(OSError):
                path.unlink()
            total -= info.st_size
            if path.parent == self._folder and (key := key_of(path.name)) is not None:
                self._known.pop(key, None)
        self.used_bytes = total
        for folder in _folders(self._root):
            with contextlib.suppress(OSError):  # not empty
                if folder != self._folder:
                    folder.rmdir()

    def _delete(self, key: Key) -> None:
        self._known.pop(key, None)
        with contextlib.suppress(OSError):
            (self._folder / Block(self._digest, key, b"").name).unlink()

    def _delete_all(self) -> None:
        for path, info in _files_of(self._folder):
            with contextlib.suppress(OSError):
                path.unlink()
                self.used_bytes -= info.st_size
        self._known = {}  # again: a write or a scan under way when `clear` was called has added to it


def _check_root(root: Path) -> None:
    """Raises CacheError if another user could move a model's folder away and put files of their own in its place, which
    a checksum would not reveal."""
    info = os.stat(root)  # of the target, if it is a link
    mode = stat.S_IMODE(info.st_mode)
    if info.st_uid not in (0, os.getuid()):
        raise CacheError(
            f"{root} (mode {mode:04o}) belongs to user {info.st_uid}, who could replace the files in it: choose a "
            "--kv-disk-cache that belongs to you or to root"
        )
    if mode & WRITABLE_BY_OTHERS and not mode & stat.S_ISVTX:
        raise CacheError(
            f"{root} has mode {mode:04o}, so other users could replace the files in it: chmod go-w {root}, or "
            f"chmod +t {root} if several users share it"
        )


def _folders(root: Path) -> list[Path]:
    """The folders of this tier under a root, whatever the model. Others are left alone."""
    with contextlib.suppress(OSError), os.scandir(root) as entries:
        return [Path(one) for one in entries if FOLDER_NAME.fullmatch(one.name) and one.is_dir(follow_symlinks=False)]
    return []


def _files(root: Path) -> list[tuple[Path, os.stat_result]]:
    """The files of this tier under a root, whatever the model."""
    return [file for folder in _folders(root) for file in _files_of(folder)]


def _files_of(folder: Path) -> list[tuple[Path, os.stat_result]]:
    """The files of this tier in a model's folder. Unfinished ones are deleted if they are old."""
    found = []
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):
                info = entry.stat(follow_symlinks=False)
                if is_unfinished(entry.name) and time.time() - info.st_mtime > STALE_S:
                    os.unlink(entry)
                elif key_of(entry.name) is not None and not entry.is_dir(follow_symlinks=False):
                    found.append((Path(entry), info))
    return found
