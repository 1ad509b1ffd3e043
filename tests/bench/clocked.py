"""A breakdown in virtual time: a runner whose device takes a known time, on clocks that only move when told to."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace, TracebackType
from typing import Any

import pytest

from tests.bench.fakes import FakeRunner, make_machine
from tinyvllm.bench.breakdown import BreakdownWork
from tinyvllm.bench.breakdown_json import breakdown_json
from tinyvllm.bench.breakdown_measure import measure_breakdown
from tinyvllm.bench.cold_start import ColdStart
from tinyvllm.bench.stages import Case
from tinyvllm.device.accounting import DeviceCounts
from tinyvllm.execution.buckets import Bucket
from tinyvllm.execution.cost import StepCost
from tinyvllm.profiling import measure
from tinyvllm.profiling.chips import Chip
from tinyvllm.profiling.expert_load import ExpertLoad
from tinyvllm.profiling.kernels import Kernel, StepProfile
from tinyvllm.profiling.names import SAMPLE
from tinyvllm.scheduling.plan import StepOutput, StepPlan
from tinyvllm.text.tokenizer import Tokenizer

LOOK_NS, STEP_NS, PACK_NS = 1_000, 2_000_000, 50_000
CHIP = Chip("test chip", 100.0, 10.0, "made up", "CPU")
WORK = BreakdownWork((Case("short", 0, 1, 8),), num_repeats=3)


class Clock:
    """A clock on which each reading takes a microsecond, and nothing else takes time. The thread's own clock stands
    still while the thread waits."""

    def __init__(self) -> None:
        self.now_ns = self.waited_ns = 0

    def look_ns(self) -> int:
        self.now_ns += LOOK_NS
        return self.now_ns

    def look_s(self) -> float:
        return self.look_ns() / 1e9

    def thread_ns(self) -> int:
        return self.now_ns - self.waited_ns

    def compute(self, duration_ns: int) -> None:
        self.now_ns += duration_ns

    def wait(self, duration_ns: int) -> None:
        self.now_ns += duration_ns
        self.waited_ns += duration_ns


def install(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Let the clock take the place of the real ones."""
    monkeypatch.setattr(time, "perf_counter_ns", clock.look_ns)
    monkeypatch.setattr(time, "perf_counter", clock.look_s)
    monkeypatch.setattr(time, "monotonic", clock.look_s)  # by which requests are dated
    monkeypatch.setattr(time, "thread_time_ns", clock.thread_ns)
    return clock


class ClockedRunner(FakeRunner):
    """Launching takes as long as packing, waiting as long as the device."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._clock, self._is_busy = clock, False
        self.step_ns = STEP_NS

    def launch(self, plan: StepPlan) -> StepOutput:
        with measure.span(measure.PACK):
            self.pack()
        self._is_busy = True
        return self.execute(plan)

    def pack(self) -> None:
        self._clock.compute(PACK_NS)

    def wait(self) -> None:
        self._clock.wait(self.step_ns * self._is_busy)
        self._is_busy = False

    def collect(self, flight: StepOutput) -> StepOutput:
        self.wait()
        with measure.span(measure.TOKENS):
            self.read_tokens()
        return flight

    def read_tokens(self) -> None:
        """Takes no time."""

    @property
    def buckets(self) -> tuple[Bucket, ...]:
        return (Bucket.decode(4), Bucket(64, False, 4))


class ClockedInspector:
    """Counts nothing but kernels, of which one samples."""

    num_cores, output_bytes = 1, 4

    def __init__(self, runner: ClockedRunner) -> None:
        self.runner = runner
        self.sample_s = 0.2e-3

    def account(self) -> ClockedInspector:
        return self

    def __enter__(self) -> ClockedInspector:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...

    def take(self) -> Any:
        counts = DeviceCounts()
        return SimpleNamespace(
            numbers=dict.fromkeys(counts.numbers, 1) | {"eager_kernels": 0, "compilations": 0}, details=counts.details
        )

    def fill_adapters(self, seed: int) -> None: ...

    def fill_pool(self, num_blocks: int, seed: int) -> None:
        """There is no pool."""

    def used_memory(self) -> int:
        return 1 << 20

    def cost(self, plan: StepPlan, loads: Sequence[ExpertLoad] = ()) -> StepCost:
        bucket = next(bucket for bucket in self.runner.buckets if bucket.is_decode == plan.is_decode)
        return StepCost(bucket.name, 2, 1000, 8, 8, moved_bytes=2000)

    def profile(self, plan: StepPlan, *, repeats: int, warmup: int) -> StepProfile:
        seconds = {"gate up": self.runner.step_ns / 1e9 - self.sample_s, SAMPLE: self.sample_s}
        kernels = tuple(
            Kernel(device="CPU", layer=None, operation=name, program=name, seconds=took_s, nbytes=1000.0, flops=1000.0)
            for name, took_s in seconds.items()
        )
        whole_s = sum(seconds.values())
        return StepProfile("decode 4", "CPU", 1, True, kernels, whole_s, whole_s, ())


def measure_clocked(inspector: ClockedInspector, tokenizer: Tokenizer) -> dict[str, Any]:
    """The JSON of a breakdown of WORK in virtual time."""
    start = ColdStart(None, 0.0, 0.0, ())
    result = measure_breakdown(inspector, tokenizer, make_machine(), WORK, start, CHIP, lambda *stage: None)
    return breakdown_json(result)


@contextmanager
def planted(owner: Any, name: str, delay: Any) -> Iterator[None]:
    """Call `delay` before each call of a method."""
    original = getattr(owner, name)

    def delayed(*args: Any, **kwargs: Any) -> Any:
        delay()
        return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, delayed)
        yield
