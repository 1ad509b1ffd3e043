"""From nothing to a warm engine, by parts: what a start costs once and a step never again."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyvllm.bench.latency import prefill_plans
from tinyvllm.config import Capacity, EngineConfig, SamplingParams
from tinyvllm.scheduling.plan import Scheduled, StepPlan
from tinyvllm.scheduling.request import Request

if TYPE_CHECKING:
    from tinyvllm.bench.subject import Subject
    from tinyvllm.execution.buckets import Bucket
    from tinyvllm.execution.runner import ModelRunner, Progress

GREEDY = SamplingParams(temperature=0.0, ignore_eos=True)
MIN_WARM_UP_CALLS = 3  # of each bucket: a graph's first calls still find caches empty


@dataclass(frozen=True)
class BucketStart:
    """Of one bucket, in seconds. `schedule_s`: tracing the model and planning its kernels, or reading a kept step;
    `capture_s`: making the graph, and on a GPU its first run. `calls_s`: the warm-up calls, one after another."""

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
    """Seconds. `process_s`: from the process's start until the command's first line; None where nobody tells."""

    process_s: float | None
    import_s: float
    load_s: float
    buckets: tuple[BucketStart, ...]

    @property
    def total_s(self) -> float:
        return (self.process_s or 0.0) + self.import_s + self.load_s + sum(self.sums.values())

    @property
    def sums(self) -> dict[str, float]:
        """Over all buckets."""
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
            "total_s": self.total_s,
            "buckets": [bucket.as_json() for bucket in self.buckets],
        }


def import_engine() -> float:
    """Import what an engine needs, tinygrad first of all; the seconds that it took, next to none the second time."""
    start_s = time.perf_counter()
    import tinyvllm.engine.parts
    import tinyvllm.execution.runner  # noqa: F401

    return time.perf_counter() - start_s


def process_age() -> float | None:
    """Seconds since this process started. Linux only."""
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
) -> tuple[ModelRunner, ColdStart]:
    """A warm runner, every bucket called `num_calls` times; the caller closes it."""
    start_s = time.perf_counter()
    runner = subject.open(config, progress)
    load_s = time.perf_counter() - start_s
    try:
        captured = _capture(runner, progress)
        called = [_call(runner, bucket, start, num_calls) for bucket, start in captured]
    except BaseException:
        runner.close()
        raise
    return runner, ColdStart(process_s, import_s, load_s, tuple(called))


def _capture(runner: ModelRunner, progress: Progress) -> list[tuple[Bucket, BucketStart]]:
    """Capture all buckets, each apart."""
    starts: list[BucketStart] = []
    with runner.account() as account:
        account.take()
        last_s = time.perf_counter()

        def watch(stage: str, done: int, total: int) -> None:
            nonlocal last_s
            now_s, counts = time.perf_counter(), account.take()
            if done:
                schedule_s = now_s - last_s - counts.compile_s - counts.replay_s
                name = runner.buckets[done - 1].name
                starts.append(BucketStart(name, max(0.0, schedule_s), counts.compile_s, counts.replay_s))
            progress(stage, done, total)
            last_s = time.perf_counter()

        runner.warm_up(watch)
    return list(zip(runner.buckets, starts, strict=True))


def _call(runner: ModelRunner, bucket: Bucket, start: BucketStart, num_calls: int) -> BucketStart:
    plans = plans_for(bucket, runner.capacity)
    calls_s = []
    for _ in range(max(num_calls, MIN_WARM_UP_CALLS)):
        before_s = time.perf_counter()
        for plan in plans:
            runner.execute(plan)
        calls_s.append(time.perf_counter() - before_s)
    return BucketStart(start.name, start.schedule_s, start.compile_s, start.capture_s, tuple(calls_s))


def plans_for(bucket: Bucket, capacity: Capacity, context: int = 0, params: SamplingParams = GREEDY) -> list[StepPlan]:
    """One step that fills a bucket, of as few sequences as hold it; a decode's have `context` tokens behind them.

    The sequences own blocks from the pool's beginning, so nothing else may be in it."""
    size, limit = capacity.block_size, capacity.max_model_len
    if bucket.is_decode:
        lengths = [min(context, limit - 2) + 1] * bucket.num_tokens
    else:
        whole, part = divmod(bucket.num_tokens, limit)
        lengths = [limit] * whole + [part] * (part > 0)
    requests, first = [], 1
    for number, length in enumerate(lengths[: capacity.max_num_seqs]):
        num_blocks = -(-length // size)
        request = Request(f"{bucket.name}-{number}", [1] * length, params)
        request.block_ids = [1 + (first - 1 + index) % (capacity.num_blocks - 1) for index in range(num_blocks)]
        first += num_blocks
        requests.append(request)
    if bucket.is_decode:
        return [StepPlan(tuple(Scheduled(request, request.num_tokens - 1, 1) for request in requests))]
    return prefill_plans(requests, bucket.num_tokens)
