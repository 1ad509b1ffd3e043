"""Which graphs are there, which come next, and which of those that are there a plan runs in."""

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
from tinyvllm.scheduling.plan import StepPlan

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]  # stage ("load", "warm-up"), done, total


class Captures:
    """Owns the graphs, and their making: all at once, or first those that serve everything and then one after another.

    A plan runs in the smallest graph that holds it and is there; the one that it would have run in is wanted, and what
    is wanted most comes next. Where a graph cannot be made, larger ones take its place.
    """

    def __init__(self, buckets: Sequence[Bucket], context: GraphContext, store: ProgramStore | None) -> None:
        self.buckets = tuple(buckets)
        self.graphs: dict[Bucket, Graph] = {}
        self.num_made = 0  # since start, those that were made anew too
        self.failed: dict[Bucket, Exception] = {}  # of those that came later
        self.store = store
        self._context = context
        self._compiler = Compiler(store)
        self._next: PendingGraph | None = None  # of what comes next, while it is compiled
        self._wanted: Counter[Bucket] = Counter()  # plans that would have run in a graph that is not there
        self._is_closed = False

    @property
    def num_to_come(self) -> int:
        """Graphs that are still to be made. Asked for at every step: once all are there, nothing is looked through."""
        return 0 if self._is_closed else len(self._to_come)

    @property
    def num_failed(self) -> int:
        """Graphs that `advance` could not make."""
        return len(self.failed)

    @property
    def scratch_bytes(self) -> int:
        """What the intermediate values of all graphs take."""
        if not self._context.is_jit:
            return self._context.scratch.nbytes
        instances = [instance for graph in self.graphs.values() for instance in graph.instances]
        return sum(own_bytes(one.step, one.processed) for one in instances)

    @property
    def _to_come(self) -> list[Bucket]:
        return [bucket for bucket in self.buckets if bucket not in self.graphs and bucket not in self.failed]

    def graph_for(self, plan: StepPlan) -> Graph:
        """The smallest graph that holds the plan and is there."""
        best = choose_bucket(self.buckets, plan)
        graph = self.graphs.get(best)
        if graph is None:
            if not self.graphs:
                raise InvariantError(f"graph {best.name} was not captured: warm_up() must run before a step")
            self._wanted[best] += 1
            graph = self.graphs[choose_bucket(self.graphs, plan)]
        return graph

    def make_all(self, progress: Progress | None = None) -> None:
        """Make every graph that is not there. Raises what keeps one from being made."""
        self._make([bucket for bucket in self.buckets if bucket not in self.graphs], progress)
        self._close()

    def make_first(self, progress: Progress | None = None) -> None:
        """Make the graphs that serve everything. `advance` makes the others."""
        self._make(first_buckets(self.buckets), progress)
        if not self._to_come:
            self._close()

    @property
    def is_next_compiled(self) -> bool:
        """Whether the next `advance` makes a graph, which no step in flight may see."""
        return self._next is not None and self._next.is_compiled

    def advance(self) -> None:
        """Do one part of what makes the next graph: trace it, or make it where it was compiled meanwhile. Returns soon.
        What fails is logged and not tried again."""
        if self._next is None:
            self._begin_next()
        elif self._next.is_compiled:
            pending, self._next = self._next, None
            try:
                self._finish(pending)
            except Exception as error:
                self._give_up(pending.bucket, error)
        if not self._to_come:
            self._close()

    def remake(self, bucket: Bucket) -> None:
        """Trace a bucket's step anew, as the present choices of `ops.tuning` make it, and keep it nowhere."""
        self.graphs[bucket] = PendingGraph(bucket, self._context, Compiler()).finish()
        self.num_made += 1

    def clear(self) -> None:
        """Let go of all graphs."""
        self.graphs.clear()
        self._next = None
        self._close()

    def _make(self, buckets: Sequence[Bucket], progress: Progress | None) -> None:
        """Make these graphs. All are traced before the first is waited for, so that compilers have enough to do; the
        largest first, whose intermediate values leave room for all others'."""
        report = progress or (lambda stage, done, total: None)
        report("warm-up", 0, len(buckets))
        order = sorted(buckets, key=lambda bucket: (-bucket.num_tokens, -bucket.num_seqs))
        pending = deque(PendingGraph(bucket, self._context, self._compiler) for bucket in order)
        for done in range(1, len(pending) + 1):
            self._finish(pending.popleft())
            report("warm-up", done, len(buckets))

    def _begin_next(self) -> None:
        """Trace what is wanted most; of what nobody wants the smallest."""
        bucket = max(self._to_come, key=lambda one: (self._wanted[one], -one.num_tokens), default=None)
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
        logger.info("captured %s in %.2f s, %d to come", pending.bucket.name, seconds, self.num_to_come)

    def _give_up(self, bucket: Bucket, error: Exception) -> None:
        self.failed[bucket] = error
        logger.error("graph %s cannot be captured, larger ones take its place", bucket.name, exc_info=error)

    def _close(self) -> None:
        """What is left to do once all graphs are there."""
        if not self._is_closed:
            self._is_closed = True
            self._compiler.close()
            if self.store is not None:
                self.store.close()
