"""Write pieces to files, a few rows at a time: memory holds one tensor's packed codes at most."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from tinyvllm.convert.pieces import Piece

Report = Callable[[int, int], None]  # bytes written so far, bytes in all


@dataclass(frozen=True)
class Place:
    """Where an array begins."""

    path: Path
    offset: int  # bytes


def write_pieces(pieces: Sequence[Piece], places: Mapping[str, Place], report: Report, num_threads: int) -> None:
    """Encode every piece and write its planes at their places, whose files exist. Rows are encoded by `num_threads`
    threads, which NumPy lets run at the same time, and written in order."""
    total, done = sum(piece.num_bytes for piece in pieces), 0
    report(0, total)
    with ExitStack() as opened, ThreadPoolExecutor(num_threads) as pool:
        paths = sorted({place.path for place in places.values()})
        files = {path: opened.enter_context(path.open("r+b")) for path in paths}
        for piece in pieces:
            offsets = [places[plane.name].offset for plane in piece.planes]
            targets = [files[places[plane.name].path] for plane in piece.planes]
            for arrays in _encode(piece, pool, num_threads):
                for index, array in enumerate(arrays):
                    offsets[index] += _write(targets[index], offsets[index], array)
                    done += array.nbytes
                report(done, total)
            _check(piece, offsets, places)


def _encode(piece: Piece, pool: ThreadPoolExecutor, num_threads: int) -> Iterator[Sequence[np.ndarray]]:
    """The encoded chunks of a piece, in order. A few are computed ahead."""
    matrix = piece.read()
    ahead: deque[Future[Sequence[np.ndarray]]] = deque()
    for rows in piece.chunks():
        ahead.append(pool.submit(lambda rows: piece.encode(piece.values(matrix, rows)), rows))
        if len(ahead) > num_threads:
            yield ahead.popleft().result()
    while ahead:
        yield ahead.popleft().result()


def _write(file: BinaryIO, offset: int, array: np.ndarray) -> int:
    file.seek(offset)
    file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return array.nbytes


def _check(piece: Piece, ends: Sequence[int], places: Mapping[str, Place]) -> None:
    for plane, end in zip(piece.planes, ends, strict=True):
        written = end - places[plane.name].offset
        assert written == plane.num_bytes, f"{plane.name}: {written=} {plane.num_bytes=}"
