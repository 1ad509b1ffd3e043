"""What /metrics says of the server's processes: time, memory, files, event loops and connections, by process."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Iterator

from prometheus_client.core import Metric
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from tinyvllm.server.board import NUM_REQUESTS
from tinyvllm.server.counters import Family, Value
from tinyvllm.server.front_ends import FrontEnds

ONLY_PROCESS = "server"  # the label of a server of one process
TICK_S = 0.1  # how often uvicorn calls on_tick
GC_TICKS = 10
LAG_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)  # seconds

LAG = Family("tinyvllm:event_loop_lag_seconds", "How late an event loop is.", "histogram", ("process",), LAG_BUCKETS)
CONNECTIONS = Family("tinyvllm:open_connections", "Open connections of clients.", "gauge", ("process",))
REQUESTS = Family("tinyvllm:open_requests", "Requests for work that are not answered yet.", "gauge", ("process",))
# Names and texts are those of prometheus_client's GCCollector.
GC_COUNTS = {
    "collected": Family("python_gc_objects_collected", "Objects collected during gc", "counter", ("generation",)),
    "uncollectable": Family(
        "python_gc_objects_uncollectable", "Uncollectable objects found during GC", "counter", ("generation",)
    ),
    "collections": Family(
        "python_gc_collections", "Number of times this generation was collected", "counter", ("generation",)
    ),
}


class ProcessMetrics:
    """What a front-end counts of itself. The garbage collector's counts are summed over front-ends."""

    def __init__(self, front_ends: FrontEnds) -> None:
        counters, labels = front_ends.counters, (front_ends.name or ONLY_PROCESS,)
        self._board = front_ends.board
        self._lag_s = counters.histogram(LAG, labels)
        self._connections = counters.value(CONNECTIONS, labels)
        self._requests = counters.value(REQUESTS, labels)
        self._gc: list[tuple[str, int, Value]] = [
            (name, generation, counters.value(family, (str(generation),)))
            for name, family in GC_COUNTS.items()
            for generation in range(3)
        ]
        self._last_gc = gc.get_stats()
        self._num_ticks = 0
        self._last_s: float | None = None

    def observe(self, num_connections: int) -> None:
        """Called every TICK_S on the event loop."""
        now_s = time.monotonic()
        if self._last_s is not None:
            self._lag_s.observe(max(0.0, now_s - self._last_s - TICK_S))
        self._last_s = now_s
        self._board.show_alive()
        self._connections.set(num_connections)
        self._requests.set(self._board.own.cells[NUM_REQUESTS])
        self._num_ticks += 1
        if self._num_ticks % GC_TICKS == 0:
            last, self._last_gc = self._last_gc, gc.get_stats()
            for name, generation, value in self._gc:
                value.inc(self._last_gc[generation][name] - last[generation][name])


class ProcessesCollector(Collector):
    """process_*: what the operating system knows of each process. Empty where there is no /proc."""

    def __init__(self, pids: Callable[[], dict[str, int]]) -> None:
        self._pids = pids

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterator[Metric]:
        pids = self._pids()
        if not pids:
            yield from ProcessCollector(registry=None).collect()
            return
        merged: dict[str, Metric] = {}
        for name, pid in pids.items():
            for metric in _of_process(pid):
                family = merged.setdefault(metric.name, Metric(metric.name, metric.documentation, metric.type))
                for sample in metric.samples:
                    family.add_sample(sample.name, {"process": name}, sample.value)
        yield from merged.values()


def _of_process(pid: int) -> Iterable[Metric]:
    return ProcessCollector(pid=lambda: pid, registry=None).collect()
