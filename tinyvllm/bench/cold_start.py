"""The parts of a cold start, from the process to a warm engine: costs that a start pays once and steps never."""

from __future__ import annotations

import os
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyvllm.bench.latency import prefill_plans
from tinyvllm.bench.memory import MemoryWatch
from tinyvllm.bench.trust import Trust
from tinyvllm.config import Capacity, EngineConfig, SamplingParams
from tinyvllm.execution.buckets import least_context, lengths_that_fill
from tinyvllm.scheduling.block_manager import fixed_states, fixed_tables
from tinyvllm.scheduling.plan import Scheduled, StepPlan
from tinyvllm.scheduling.request import Request

if TYPE_CHECKING:
    from tinyvllm.bench.subject import Subject
    from tinyvllm.execution.buckets import Bucket
    from tinyvllm.execution.runner import ModelRunner, Progress

GREEDY = SamplingParams(temperature=0.0, ignore_eos=True)
FIRST_PROMPT = 16  # tokens
MIN_WARM_UP_CALLS = 3  # per bucket: a graph's first calls find caches empty
MAX_WARM_UP_S = 2.0  # per bucket: a slow or busy machine calls it only twice; the second call shows its time


@dataclass(frozen=True)
class BucketStart:
    """The start of one bucket, in seconds. `schedule_s`: tracing the model and planning its kernels, or reading a
    cached step. `capture_s`: building the graph, and on a GPU its first run. `calls_s`: each warm-up call in turn."""

    name: str
    schedule_s: float
    compile_s: float
    capture_s: float
    calls_s: tuple[float, ...] = ()

    def as_json(self) -> dict[str, Any]:
        return {
            "bucket": self.name,
            "schedule_s": self.schedule_s,
            "compile_s": self.compile_s,
            "capture_s": self.capture_s,
            "calls_s": list(self.calls_s),
        }


@dataclass(frozen=True)
class ColdStart:
    """A start by parts, in seconds. `process_s`: from the start of the process to the command's first line; None if the
    system does not report it.

    `first_graphs_s`: capturing the graphs that can run every request, after which a server is ready. `first_step_s`:
    the step of a short prompt, in one of them, or in one that is captured for it because its steps are kept. `buckets`:
    in the order of capture, these first."""

    process_s: float | None
    import_s: float
    load_s: float
    buckets: tuple[BucketStart, ...]
    first_graphs_s: float = 0.0
    first_step_s: float = 0.0
    num_kept: int = 0  # steps found in the cache of earlier starts
    num_compiled: int = 0  # programs that were not in the cache
    trust: Trust | None = None  # of total_s

    @property
    def first_token_s(self) -> float:
        """From the start of the process to the first token of a server that warms up in the background."""
        return (self.process_s or 0.0) + self.import_s + self.load_s + self.first_graphs_s + self.first_step_s

    @property
    def all_graphs_s(self) -> float:
        """From the start of the process until all graphs are captured."""
        sums = self.sums
        parts = sums["schedule_s"] + sums["compile_s"] + sums["capture_s"]
        return (self.process_s or 0.0) + self.import_s + self.load_s + parts

    @property
    def total_s(self) -> float:
        return (self.process_s or 0.0) + self.import_s + self.load_s + sum(self.sums.values())

    @property
    def sums(self) -> dict[str, float]:
        """Each part summed over all buckets."""
        return {
            "schedule_s": sum(bucket.schedule_s for bucket in self.buckets),
            "compile_s": sum(bucket.compile_s for bucket in self.buckets),
            "capture_s": sum(bucket.capture_s for bucket in self.buckets),
            "warm_up_s": sum(sum(bucket.calls_s) for bucket in self.buckets),
        }

    def as_json(self) -> dict[str, Any]:
        return {
            "process_s": self.process_s,
            "import_s": self.import_s,
            "load_s": self.load_s,
            **self.sums,
            "first_token_s": self.first_token_s,
            "all_graphs_s": self.all_graphs_s,
            "num_kept": self.num_kept,
            "num_compiled": self.num_compiled,
            "total_s": self.total_s,
            "trust": None if self.trust is None else self.trust.as_json(),
            "buckets": [bucket.as_json() for bucket in self.buckets],
        }


def import_engine() -> float:
    """Import everything that an engine needs, tinygrad above all. Returns the seconds it took: almost 0 the second
    time."""
    start_s = time.perf_counter()
    import tinyvllm.engine.loading
    import tinyvllm.execution.runner  # noqa: F401

    return time.perf_counter() - start_s


def process_age() -> float | None:
    """Seconds since this process started; None except on Linux."""
    if not sys.platform.startswith("linux"):
        return None
    started_ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started_ticks / os.sysconf("SC_CLK_TCK")


def start_engine(
    subject: Subject,
    config: EngineConfig,
    progress: Progress,
    process_s: float | None,
    import_s: float,
    num_calls: int,
    memory: MemoryWatch | None = None,
) -> tuple[ModelRunner, ColdStart]:
    """Start a runner and call every bucket `num_calls` times, at least MIN_WARM_UP_CALLS, but only twice if that
    takes more than MAX_WARM_UP_S. The caller closes the runner. `memory`: measures the parts."""
    memory = memory or MemoryWatch()
    memory.mark()
    start_s = time.perf_counter()
    runner = subject.open(config, progress)
    load_s = time.perf_counter() - start_s
    memory.device_bytes = _device_bytes(runner)
    memory.end("load")
    try:
        first = _capture(runner, runner.warm_up_first, progress)
        first_step_s, needed = _answer_once(runner)
        starts = first | needed | _capture(runner, runner.warm_up, progress)
        memory.end(f"capture {len(starts)} graphs")
        called = tuple(_call(runner, bucket, start, num_calls) for bucket, start in starts.items())
        memory.end("warm-up calls")
    except BaseException:
        runner.close()
        raise
    first_graphs_s = sum(start.schedule_s + start.compile_s + start.capture_s for start in first.values())
    kept = runner.store.num_steps_read if runner.store else 0
    compiled = runner.store.num_programs_compiled if runner.store else 0
    return runner, ColdStart(
        process_s, import_s, load_s, called, first_graphs_s, first_step_s, num_kept=kept, num_compiled=compiled
    )


def _device_bytes(runner: ModelRunner) -> Callable[[], int]:
    from tinyvllm.execution.inspector import RunnerInspector

    return RunnerInspector(runner).account().used_memory


def _capture(runner: ModelRunner, capture: Callable[[Progress], None], progress: Progress) -> dict[Bucket, BucketStart]:
    """Time each of the graphs that `capture` builds. All of them are traced before the first is built."""
    from tinyvllm.execution.inspector import RunnerInspector

    before, seconds = set(runner.captures.graphs), []
    with RunnerInspector(runner).account() as account:
        account.take()
        last_s = time.perf_counter()

        def watch(stage: str, done: int, total: int) -> None:
            nonlocal last_s
            now_s, counts = time.perf_counter(), account.take()
            if done:
                seconds.append((now_s - last_s, counts.compile_s, counts.replay_s))
            progress(stage, done, total)
            last_s = time.perf_counter()

        capture(watch)
    made = [graph for bucket, graph in runner.captures.graphs.items() if bucket not in before]
    traced_s = [0.0 if index else sum(graph.trace_s for graph in made) for index in range(len(made))]
    return {
        graph.bucket: BucketStart(
            graph.bucket.name, graph.trace_s + max(0.0, all_s - others_s - compile_s - capture_s), compile_s, capture_s
        )
        for graph, others_s, (all_s, compile_s, capture_s) in zip(made, traced_s, seconds, strict=True)
    }


def _answer_once(runner: ModelRunner) -> tuple[float, dict[Bucket, BucketStart]]:
    """Run the step of a short prompt: its seconds, and of these the graph that is captured for it, if one is."""
    request = Request("first", [1] * min(FIRST_PROMPT, runner.capacity.max_num_batched_tokens), GREEDY)
    capacity = runner.capacity
    (request.tables,) = fixed_tables(capacity.groups, [-(-request.num_tokens // capacity.block_size)])
    (request.state,) = fixed_states(capacity, 1)
    plan = StepPlan((Scheduled(request, 0, request.num_tokens),))
    before, start_s = set(runner.captures.graphs), time.perf_counter()
    graph = runner.captures.graph_for(plan)
    capture_s = time.perf_counter() - start_s - graph.trace_s
    runner.execute(plan)
    step_s = time.perf_counter() - start_s
    is_new = graph.bucket not in before
    return step_s, {graph.bucket: BucketStart(graph.bucket.name, graph.trace_s, 0.0, capture_s)} if is_new else {}


def _call(runner: ModelRunner, bucket: Bucket, start: BucketStart, num_calls: int) -> BucketStart:
    plans = plans_for(bucket, runner.capacity, least_context(bucket, runner.buckets) - 1)
    calls_s = []
    for _ in range(max(num_calls, MIN_WARM_UP_CALLS)):
        before_s = time.perf_counter()
        for plan in plans:
            runner.execute(plan)
        calls_s.append(time.perf_counter() - before_s)
        if len(calls_s) > 1 and sum(calls_s) > MAX_WARM_UP_S:
            break
    return BucketStart(start.name, start.schedule_s, start.compile_s, start.capture_s, tuple(calls_s))


def plans_for(
    bucket: Bucket, capacity: Capacity, context: int = 0, params: SamplingParams = GREEDY, vocab_size: int = 2
) -> list[StepPlan]:
    """Plans that fill a bucket with as few sequences as possible. Sequences of a decode have `context` tokens already;
    so has the one of a verify bucket, whose other rows are its drafts.
    Token ids are random, and below `vocab_size`: rows that differ choose different experts.

    The sequences own blocks from the start of the pool, so it must hold nothing else."""
    size, limit = capacity.block_size, capacity.max_model_len
    if bucket.is_decode:
        lengths = [min(context, min(limit, bucket.max_context or limit) - 2) + 1] * bucket.num_tokens
    elif bucket.is_verify:
        lengths = [max(0, min(context, limit - 2 - bucket.num_drafts)) + 1]
    else:
        lengths = lengths_that_fill(bucket, limit)
    tables = fixed_tables(capacity.groups, [-(-(length + bucket.num_drafts) // size) for length in lengths])
    states = fixed_states(capacity, len(lengths))
    rng = random.Random(bucket.name)
    requests = [
        Request(f"{bucket.name}-{number}", rng.choices(range(vocab_size), k=length), params, tables=own, state=state)
        for number, (length, own, state) in enumerate(zip(lengths, tables, states, strict=True))
    ]
    if bucket.is_decode:
        return [StepPlan(tuple(Scheduled(request, request.num_tokens - 1, 1) for request in requests))]
    if bucket.is_verify:
        (request,), drafts = requests, tuple(rng.choices(range(vocab_size), k=bucket.num_drafts))
        return [StepPlan((Scheduled(request, request.num_tokens - 1, bucket.num_tokens, drafts),))]
    return prefill_plans(requests, bucket.num_tokens)
