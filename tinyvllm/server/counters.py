"""Counters, gauges and histograms of one or several front-ends, and their sums for /metrics.

Each front-end writes cells of its own: 64-bit floats in memory, or in a file that the others map to read them. Adding
to one takes 0.2 us, without a lock, since only its event loop writes. A restarted front-end continues the cells of the
one that died, so counters never go back. `prometheus_client` renders the sums; its own multiprocess mode takes ten
times as long for each change, and its files grow with every restart.
"""

from __future__ import annotations

import mmap
import os
import weakref
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from tinyvllm.errors import InvariantError

NUM_CELLS = 1 << 14  # of one front-end; a server uses about 1,500
NAMES_SUFFIX, VALUES_SUFFIX = ".names", ".values"


class Key(msgspec.Struct, frozen=True, array_like=True):
    """What a range of cells counts. A line of the names' file; the ranges follow each other in its order."""

    family: str
    labels: tuple[str, ...]
    num_cells: int


class Cells:
    """One front-end's cells. With a path, names and values are in two files, which the others read as `PeerCells`."""

    def __init__(self, path: Path | None = None) -> None:
        self._starts: dict[Key, int] = {}
        self._num_used = 0
        self._names: _NamesFile | None = None
        if path is None:
            self.values: memoryview[float] = memoryview(bytearray(8 * NUM_CELLS)).cast("d")
        else:
            self.values = _map_values(path)
            self._names = _NamesFile(path, os.O_RDWR | os.O_APPEND | os.O_CREAT)
            self._names.drop_incomplete_line()
            for key in self._names.read():
                self._keep(key)

    def find(self, key: Key) -> int:
        """The first cell of `key`. New ones are 0."""
        if key not in self._starts:
            if self._num_used + key.num_cells > NUM_CELLS:
                raise InvariantError(f"{key} needs more than the {NUM_CELLS} cells of a front-end")
            if self._names is not None:
                self._names.append(key)
            self._keep(key)
        return self._starts[key]

    def keys(self) -> dict[Key, int]:
        """The first cell of every key."""
        return self._starts

    def _keep(self, key: Key) -> None:
        self._starts[key] = self._num_used
        self._num_used += key.num_cells


def _map_values(path: Path) -> memoryview[float]:
    with open(f"{path}{VALUES_SUFFIX}", "a+b") as file:
        file.truncate(8 * NUM_CELLS)
        return memoryview(mmap.mmap(file.fileno(), 8 * NUM_CELLS)).cast("d")


class _NamesFile:
    """The keys of one front-end, one per line."""

    def __init__(self, path: Path, flags: int) -> None:
        self._fd = os.open(f"{path}{NAMES_SUFFIX}", flags | os.O_CLOEXEC, 0o600)
        weakref.finalize(self, os.close, self._fd)

    @property
    def num_bytes(self) -> int:
        return os.fstat(self._fd).st_size

    def read(self) -> list[Key]:
        """All keys, without a last line that is not complete yet."""
        lines = os.pread(self._fd, self.num_bytes, 0).split(b"\n")[:-1]
        return [msgspec.json.decode(line, type=Key) for line in lines]

    def append(self, key: Key) -> None:
        os.write(self._fd, msgspec.json.encode(key) + b"\n")

    def drop_incomplete_line(self) -> None:
        """Drop what a front-end wrote when it was killed."""
        os.ftruncate(self._fd, os.pread(self._fd, self.num_bytes, 0).rfind(b"\n") + 1)


class PeerCells:
    """Another front-end's cells, for reading. Empty until it has started."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._names: _NamesFile | None = None
        self._num_bytes = 0
        self._starts: dict[Key, int] = {}
        self.values: memoryview[float] = memoryview(b"").cast("d")

    def keys(self) -> dict[Key, int]:
        if self._names is None:
            try:
                self._names = _NamesFile(self._path, os.O_RDONLY)
            except FileNotFoundError:
                return {}
            self.values = _map_values(self._path)
        size = self._names.num_bytes
        if size != self._num_bytes:
            start, self._num_bytes, self._starts = 0, size, {}
            for key in self._names.read():
                self._starts[key] = start
                start += key.num_cells
        return self._starts


class Value:
    """A counter or a gauge."""

    def __init__(self, cells: Cells, key: Key) -> None:
        self._values = cells.values
        self._cell = cells.find(key)

    def inc(self, amount: float = 1.0) -> None:
        self._values[self._cell] += amount

    def set(self, value: float) -> None:
        self._values[self._cell] = value


class Histogram:
    """Counts by bucket, and the sum of what was observed."""

    def __init__(self, cells: Cells, key: Key, buckets: tuple[float, ...]) -> None:
        self._values = cells.values
        self._buckets = buckets
        self._first = cells.find(key)
        self._sum = self._first + len(buckets) + 1

    def observe(self, value: float, count: int = 1) -> None:
        """Count `count` observations of `value`."""
        self._values[self._first + bisect_left(self._buckets, value)] += count
        self._values[self._sum] += value * count


@dataclass(frozen=True)
class Family:
    """The values of one name. `labels` are those that tell its values apart, besides the registry's own."""

    name: str
    text: str
    kind: str  # counter, gauge or histogram
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()

    @property
    def num_cells(self) -> int:
        return len(self.buckets) + 2 if self.kind == "histogram" else 1


class Counters(Collector):
    """Owns the families, and this front-end's cells in them. A scrape yields the sums over all front-ends."""

    def __init__(self, cells: Cells, peers: Sequence[PeerCells] = ()) -> None:
        self._cells = cells
        self._sources: tuple[Cells | PeerCells, ...] = (cells, *peers)
        self._families: dict[str, Family] = {}

    @classmethod
    def shared(cls, directory: Path, num_front_ends: int, own: int) -> Counters:
        """The counters of front-end `own`, in files of `directory`."""
        paths = [directory / f"metrics-{number}" for number in range(num_front_ends)]
        return cls(Cells(paths[own]), [PeerCells(path) for number, path in enumerate(paths) if number != own])

    def value(self, family: Family, labels: tuple[str, ...] = ()) -> Value:
        return Value(self._cells, self._key(family, labels))

    def histogram(self, family: Family, labels: tuple[str, ...] = ()) -> Histogram:
        return Histogram(self._cells, self._key(family, labels), family.buckets)

    def register(self, family: Family) -> None:
        """Show the family in every scrape, even before it has a value."""
        self._families.setdefault(family.name, family)

    def _key(self, family: Family, labels: tuple[str, ...]) -> Key:
        self.register(family)
        return Key(family.name, labels, family.num_cells)

    def total(self, name: str) -> float:
        """The sum of a counter over all of its labels and all front-ends."""
        return sum(values[0] for (family, _), values in self._sums().items() if family == name)

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterator[Metric]:
        shown: dict[str, Metric] = {}
        for name, family in self._families.items():
            shown[name] = _metric(family)
        for (name, labels), values in self._sums().items():
            if name in shown:  # else another front-end was faster to register it
                _add(shown[name], self._families[name], labels, values)
        yield from shown.values()

    def _sums(self) -> dict[tuple[str, tuple[str, ...]], list[float]]:
        sums: dict[tuple[str, tuple[str, ...]], list[float]] = {}
        for source in self._sources:
            for key, start in source.keys().items():
                values = source.values[start : start + key.num_cells].tolist()
                earlier = sums.setdefault((key.family, key.labels), [0.0] * key.num_cells)
                if len(earlier) == len(values):  # else its buckets are those of an earlier context length
                    earlier[:] = [a + b for a, b in zip(earlier, values, strict=True)]
        return sums


def _metric(family: Family) -> Metric:
    kinds = {"counter": CounterMetricFamily, "gauge": GaugeMetricFamily, "histogram": HistogramMetricFamily}
    metric: Metric = kinds[family.kind](family.name, family.text, labels=family.labels)
    return metric


def _add(metric: Metric, family: Family, labels: tuple[str, ...], values: list[float]) -> None:
    if not isinstance(metric, HistogramMetricFamily):
        assert isinstance(metric, CounterMetricFamily | GaugeMetricFamily)
        metric.add_metric(labels, values[0])
        return
    buckets, num_below = [], 0.0
    for bound, count in zip((*family.buckets, float("inf")), values[:-1], strict=True):
        num_below += count
        buckets.append((floatToGoString(bound), num_below))  # type: ignore[no-untyped-call]
    metric.add_metric(labels, buckets, sum_value=values[-1])
