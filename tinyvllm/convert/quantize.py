"""Convert a model to a quantized format, tensor by tensor."""

from __future__ import annotations

import os
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from tinyvllm.config import ModelConfig, ModelFiles
from tinyvllm.convert.destination import check_destination, finished, os_errors_named
from tinyvllm.convert.gguf_metadata import check_same_model
from tinyvllm.convert.gguf_output import GGUFOutput
from tinyvllm.convert.hf_output import DirectoryOutput
from tinyvllm.convert.stream import Report, write_pieces
from tinyvllm.convert.targets import Target
from tinyvllm.errors import UnsupportedModelError
from tinyvllm.storage.model_config import read_model_config

MAX_THREADS = 16  # more than these wait for memory


@dataclass(frozen=True)
class Outcome:
    """What was written."""

    files: ModelFiles
    num_bytes: int  # of the weights
    num_weights: int
    seconds: float
    types: dict[str, int]  # number of arrays by their type in the file

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.num_bytes / self.num_weights


def default_threads() -> int:
    return min(MAX_THREADS, os.cpu_count() or 1)


def quantize(
    source: ModelFiles, target: Target, path: Path, report: Report, *, force: bool = False, num_threads: int = 1
) -> Outcome:
    """Write `source` in the target's format to `path`, under a temporary name until all is there and the settings were
    read back and compared. Memory holds a few rows, and of a quantized source one tensor's codes.

    Raises ModelError: for a source that cannot be read or written so; for a `path` that exists, unless `force` is set
    and it is a model of the same kind (`destination.check_destination`); for a disk without room or that cannot be
    written to.
    """
    if path.name in ("", ".."):  # of "." and ".."
        path = path.resolve()
    with os_errors_named(source, path):
        check_destination(source, path, is_directory=target.kind != "gguf", force=force)
        return _convert(source, target, path, report, force=force, num_threads=num_threads)


def _convert(
    source: ModelFiles, target: Target, path: Path, report: Report, *, force: bool, num_threads: int
) -> Outcome:
    start = time.perf_counter()
    config = read_model_config(source)
    output = _make_output(source, config, target)
    num_bytes = sum(piece.num_bytes for piece in output.pieces)
    kind = "gguf" if target.kind == "gguf" else "hf"
    with finished(path, num_bytes, force=force) as temporary:
        places = output.start(temporary)
        write_pieces(output.pieces, places, report, num_threads)
        _check(config, ModelFiles(kind, temporary, source.name), source, target)
    planes = [plane for piece in output.pieces for plane in piece.planes]
    num_weights = sum(piece.rows * piece.columns for piece in output.pieces)
    types = dict(Counter(plane.dtype for plane in planes))
    name = path.stem if kind == "gguf" else path.name
    return Outcome(ModelFiles(kind, path, name), num_bytes, num_weights, time.perf_counter() - start, types)


def _make_output(source: ModelFiles, config: ModelConfig, target: Target) -> GGUFOutput | DirectoryOutput:
    if target.kind == "gguf":
        return GGUFOutput(source, config, target.mixture)
    return DirectoryOutput(source, config, target)


def _check(config: ModelConfig, written: ModelFiles, source: ModelFiles, target: Target) -> None:
    """Raise UnsupportedModelError if the output's own files say another model than the source's."""
    try:
        found = read_model_config(written)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{source.path} cannot be written as {target.name}: {error}") from error
    check_same_model(config, found, target.name)
