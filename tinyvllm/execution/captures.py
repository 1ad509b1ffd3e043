"""The captured graphs: which exist, which to capture next, and which one a plan runs in."""

from __future__ import annotations

import itertools
import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence

from tinyvllm.device.compiling import Compiler, num_workers
from tinyvllm.device.program_store import ProgramStore
from tinyvllm.device.scratch import own_bytes
from tinyvllm.errors import InvariantError
from tinyvllm.execution.buckets import Bucket, choose_bucket, first_buckets, first_fit, ranked
from tinyvllm.execution.early_start import MANY_LAYERS
from tinyvllm.execution.early_traces import EarlyTraces
from tinyvllm.execution.graphs import Graph, PendingGraph
from tinyvllm.execution.step_code import GraphContext
from tinyvllm.execution.tracing import Tracer
from tinyvllm.faults import reach
from tinyvllm.scheduling.plan import StepPlan

MAX_PENDING = 32  # graphs that are traced and compiled at once, at most; fewer if fewer processes trace
POLL_S = 0.003  # how often a start that waits for other processes looks

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]  # stage ("load", "warm-up"), done, total


class Captures:
    """Owns the graphs and captures them: all at once, or first those that serve everything and then one after another.

    A plan runs in the smallest captured graph that holds it. If a smaller one is missing, that one counts as requested,
    and the most requested one is captured next. If a graph cannot be captured, larger ones take its place. While the
    engine serves, other processes trace and compile, as many graphs at once as there are processes.

    On a CPU a missing graph whose steps are kept is captured for the plan that it would run: that takes 0.05 s, and the
    padding of a larger one up to half a second.
    """

    def __init__(
        self,
        buckets: Sequence[Bucket],
        context: GraphContext,
        store: ProgramStore | None,
        early: EarlyTraces | None = None,
    ) -> None:
        """early: of the first graphs, if they were begun."""
        self.buckets = tuple(buckets)
        self._ranked = ranked(buckets)
        self.graphs: dict[Bucket, Graph] = {}
        self.num_made = 0  # since the start, repeated captures included
        self.failed: dict[Bucket, Exception] = {}  # of the graphs that `advance` captures
        self.store = store
        self._context = context
        self._compiler = Compiler(store) if early is None else early.compiler
        self._tuning_compiler = Compiler()
        self._tracer = Tracer(context, {} if early is None else early.traces)
        self._early = early  # until every graph of these is traced
        self._pending: dict[Bucket, PendingGraph] = {}  # those that are being traced or compiled
        self._urgencies = itertools.count(1)
        self._requested: Counter[Bucket] = Counter()  # plans that would have run in a missing graph
        self._not_kept: set[Bucket] = set()  # missing graphs whose steps the store has not
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
        """The smallest captured graph that holds the plan, if need be one that is captured now."""
        best = first_fit(self._ranked, plan)
        graph = None if best is None else self.graphs.get(best) or self._restored(best)
        if best is None or graph is None:
            best = choose_bucket(self.buckets, plan)
            if not self.graphs:
                raise InvariantError(f"graph {best.name} was not captured: warm_up() must run before a step")
            self._requested[best] += 1
            graph = self.graphs[choose_bucket(self.graphs, plan)]
        return graph

    def _restored(self, bucket: Bucket) -> Graph | None:
        """A missing graph, captured now, if its steps are kept and this takes less time than padding."""
        context, is_tried = self._context, bucket in self._not_kept or bucket in self.failed
        if is_tried or not self.graphs or context.is_jit or not context.backend.device.is_cpu:
            return None
        self._try(bucket, self._restore)
        if not self._to_come:
            self._close()
        return self.graphs.get(bucket)

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
        return any(pending.is_recorded for pending in self._pending.values())

    def advance(self) -> None:
        """Do one part of the graphs to come: capture one whose steps are recorded, or take over what other processes
        have done for one, or begin others. Returns soon. A failure is logged, and that graph is not tried again."""
        ready = [bucket for bucket, pending in self._pending.items() if pending.is_recorded]
        if ready:
            self._try(max(ready, key=self._requested.__getitem__), self._capture)
        elif not any(self._try(bucket, self._advance) for bucket in list(self._pending)):
            self._begin_next()
        if not self._to_come:
            self._close()

    def remake(self, bucket: Bucket) -> None:
        """Capture a bucket again, with the current choices of `ops.kernel.tuning`, without saving it."""
        self.replace(PendingGraph(bucket, self._context, self._tuning_compiler).finish())

    def begin_again(self, bucket: Bucket) -> PendingGraph:
        """Begin to capture a bucket again, with the current choices, in other processes if there are any. The graph
        takes the bucket's place when it is passed to `replace`."""
        tracer = None if self._context.backend.device.is_cpu else self._tracer
        return PendingGraph(bucket, self._context, self._tuning_compiler, tracer, next(self._urgencies))

    def replace(self, graph: Graph) -> None:
        """Let a graph take the place of its bucket's."""
        self.graphs[graph.bucket] = graph
        self.num_made += 1

    def clear(self) -> None:
        """Drop all graphs."""
        self.graphs.clear()
        self._pending.clear()
        self._close()

    def _make(self, buckets: Sequence[Bucket], progress: Progress | None) -> None:
        """Capture these graphs. All are traced before waiting for the first, to keep the compilers busy: here and, as
        far as they have begun, by other processes. The largest first, since its intermediate values need the largest
        arena."""
        report = progress or (lambda stage, done, total: None)
        report("warm-up", 0, len(buckets))
        order = sorted(buckets, key=lambda bucket: (-bucket.num_tokens, -bucket.num_seqs, not bucket.has_adapters))
        is_long = len(order) * len(self._context.model.layers) >= MANY_LAYERS
        tracer = self._tracer if is_long or self._early is not None else None
        pending = [
            self._pending.pop(bucket) if bucket in self._pending else self._begin(bucket, tracer) for bucket in order
        ]
        for one in pending:
            one.trace_here()
            self._advance_all(pending)
        for done, one in enumerate(pending, 1):
            while not one.is_compiled:
                if not self._advance_all(pending[done - 1 :]):
                    time.sleep(POLL_S)
            self._finish(one)
            report("warm-up", done, len(buckets))

    def _advance_all(self, pending: Sequence[PendingGraph]) -> bool:
        """Take over what other processes have done. Returns whether there was something."""
        if self._early is not None:
            self._early.advance()
        has_done = any([one.advance() for one in pending if not one.is_recorded])
        if self._early is not None and all(one.is_traced for one in pending):
            self._early.withdraw()
            self._early = None
        return has_done

    def _begin(self, bucket: Bucket, tracer: Tracer | None) -> PendingGraph:
        return PendingGraph(bucket, self._context, self._compiler, tracer, next(self._urgencies))

    def _restore(self, bucket: Bucket) -> bool:
        """Capture a graph if its steps are kept. Returns whether they are."""
        pending = self._pending.get(bucket) or PendingGraph(
            bucket, self._context, self._compiler, is_restored_only=True
        )
        if not pending.is_recorded:
            self._not_kept.add(bucket)
            return False
        self._pending[bucket] = pending
        return self._capture(bucket)

    def _begin_next(self) -> None:
        """Begin the most requested bucket, or else the smallest, unless enough are pending."""
        if len(self._pending) >= max(1, min(num_workers(), MAX_PENDING)):
            return
        waiting = [bucket for bucket in self._to_come if bucket not in self._pending]
        bucket = max(waiting, key=lambda one: (self._requested[one], -one.num_tokens), default=None)
        if bucket is None:
            return
        try:
            self._pending[bucket] = self._begin(bucket, self._tracer)
        except Exception as error:
            self._give_up(bucket, error)

    def _try(self, bucket: Bucket, part: Callable[[Bucket], bool]) -> bool:
        """Do a part of a pending graph. Returns whether there was something to do."""
        try:
            return part(bucket)
        except Exception as error:
            self._pending.pop(bucket, None)
            self._give_up(bucket, error)
            return True

    def _advance(self, bucket: Bucket) -> bool:
        return self._pending[bucket].advance()

    def _capture(self, bucket: Bucket) -> bool:
        pending = self._pending.pop(bucket)
        reach("runner.capture")
        self._finish(pending)
        return True

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
