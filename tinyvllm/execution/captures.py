"""The captured graphs: which exist, which to capture next, and which one a plan runs in."""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence

from tinyvllm.device.compiling import Compiler
from tinyvllm.device.program_store import ProgramStore
from tinyvllm.device.scratch import own_bytes
from tinyvllm.errors import InvariantError
from tinyvllm.execution.buckets import Bucket, choose_bucket, first_buckets
from tinyvllm.execution.graphs import Graph, GraphContext, PendingGraph
from tinyvllm.faults import reach
from tinyvllm.scheduling.plan import StepPlan

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]  # stage ("load", "warm-up"), done, total


class Captures:
    """Owns the graphs and captures them: all at once, or first those that serve everything and then one after another.

    A plan runs in the smallest captured graph that holds it. If a smaller one is missing, that one counts as requested,
    and the most requested one is captured next. If a graph cannot be captured, larger ones take its place.
    """

    def __init__(self, buckets: Sequence[Bucket], context: GraphContext, store: ProgramStore | None) -> None:
        self.buckets = tuple(buckets)
        self.graphs: dict[Bucket, Graph] = {}
        self.num_made = 0  # since the start, repeated captures included
        self.failed: dict[Bucket, Exception] = {}  # of the graphs that `advance` captures
        self.store = store
        self._context = context
        self._compiler = Compiler(store)
        self._tuning_compiler = Compiler()
        self._next: PendingGraph | None = None  # the next one, while it is compiled
        self._requested: Counter[Bucket] = Counter()  # plans that would have run in a missing graph
        self._is_closed = False

    @property
    def capture(self) -> str:
        """How steps are captured: replay or tinyjit."""
        return self._context.capture

    @property
    def num_to_come(self) -> int:
        """Graphs still to be captured. Read at every step, so it costs nothing once all are there."""
        return 0 if self._is_closed else len(self._to_come)

    @property
    def num_failed(self) -> int:
        """Graphs that `advance` could not capture."""
        return len(self.failed)

    @property
    def scratch_bytes(self) -> int:
        """Bytes of the intermediate values of all graphs."""
        if not self._context.is_jit:
            return self._context.scratch.nbytes
        instances = [instance for graph in self.graphs.values() for instance in graph.instances]
        return sum(own_bytes(one.step, one.processed) for one in instances)

    @property
    def _to_come(self) -> list[Bucket]:
        return [bucket for bucket in self.buckets if bucket not in self.graphs and bucket not in self.failed]

    def graph_for(self, plan: StepPlan) -> Graph:
        """The smallest captured graph that holds the plan."""
        best = choose_bucket(self.buckets, plan)
        graph = self.graphs.get(best)
        if graph is None:
            if not self.graphs:
                raise InvariantError(f"graph {best.name} was not captured: warm_up() must run before a step")
            self._requested[best] += 1
            graph = self.graphs[choose_bucket(self.graphs, plan)]
        return graph

    def make_all(self, progress: Progress | None = None) -> None:
        """Capture every missing graph. Raises if one cannot be captured."""
        self._make([bucket for bucket in self.buckets if bucket not in self.graphs], progress)
        self._close()

    def make_first(self, progress: Progress | None = None) -> None:
        """Capture the graphs that serve everything. `advance` captures the others."""
        self._make(first_buckets(self.buckets), progress)
        if not self._to_come:
            self._close()

    @property
    def is_next_compiled(self) -> bool:
        """Whether the next `advance` captures a graph, for which no step may be in flight."""
        return self._next is not None and self._next.is_compiled

    def advance(self) -> None:
        """Do one part of the next graph: trace it, or capture it if it was compiled meanwhile. Returns soon. A failure
        is logged, and that graph is not tried again."""
        if self._next is None:
            self._begin_next()
        elif self._next.is_compiled:
            pending, self._next = self._next, None
            try:
                reach("runner.capture")
                self._finish(pending)
            except Exception as error:
                self._give_up(pending.bucket, error)
        if not self._to_come:
            self._close()

    def remake(self, bucket: Bucket) -> None:
        """Capture a bucket again, with the current choices of `ops.kernel.tuning`, without saving it."""
        self.graphs[bucket] = PendingGraph(bucket, self._context, self._tuning_compiler).finish()
        self.num_made += 1

    def foresee(self, bucket: Bucket) -> None:
        """Begin to compile what a `remake` with the current choices will need."""
        PendingGraph(bucket, self._context, self._tuning_compiler)

    def clear(self) -> None:
        """Drop all graphs."""
        self.graphs.clear()
        self._next = None
        self._close()

    def _make(self, buckets: Sequence[Bucket], progress: Progress | None) -> None:
        """Capture these graphs. All are traced before waiting for the first, to keep the compilers busy; the largest
        first, since its intermediate values need the largest arena."""
        report = progress or (lambda stage, done, total: None)
        report("warm-up", 0, len(buckets))
        order = sorted(buckets, key=lambda bucket: (-bucket.num_tokens, -bucket.num_seqs))
        pending = deque(PendingGraph(bucket, self._context, self._compiler) for bucket in order)
        for done in range(1, len(pending) + 1):
            self._finish(pending.popleft())
            report("warm-up", done, len(buckets))

    def _begin_next(self) -> None:
        """Trace the most requested bucket, or else the smallest."""
        bucket = max(self._to_come, key=lambda one: (self._requested[one], -one.num_tokens), default=None)
        if bucket is None:
            return
        try:
            self._next = PendingGraph(bucket, self._context, self._compiler)
        except Exception as error:
            self._give_up(bucket, error)

    def _finish(self, pending: PendingGraph) -> None:
        start_s = time.perf_counter()
        self.graphs[pending.bucket] = pending.finish()
        self.num_made += 1
        seconds = pending.trace_s + time.perf_counter() - start_s
        logger.debug("captured %s in %.2f s, %d to come", pending.bucket.name, seconds, self.num_to_come)

    def _give_up(self, bucket: Bucket, error: Exception) -> None:
        self.failed[bucket] = error
        logger.error("graph %s cannot be captured: larger ones take its place", bucket.name, exc_info=error)

    def _close(self) -> None:
        """Finish once all graphs are there."""
        if not self._is_closed:
            self._is_closed = True
            if self.graphs:
                logger.info("%d graphs are captured: nothing is left to compile", len(self.graphs))
            self._compiler.close()
            if self.store is not None:
                self.store.close()
