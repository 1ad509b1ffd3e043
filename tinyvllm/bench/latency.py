"""Single steps: synthetic plans passed directly to the runner, without scheduler, text or queue.

Prefill computes whole prompts, in pieces as large as the engine's token budget. Decode steps continue from a context
that is already in the pool: random keys and values, in shuffled blocks. Every step produces the next one's token. As in
the engine, the next step is launched while one runs, if the device feeds it that token (--no-async-scheduling: one
after another).

The cases take turns, a repeat each, so that a slow minute of the machine touches all of them alike.
"""

from __future__ import annotations

import dataclasses
import random
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

from tinyvllm.bench.estimate import Estimate
from tinyvllm.bench.rows import Machine, Row
from tinyvllm.bench.spread import Spread
from tinyvllm.bench.trust import ConditionsWatch, is_noisy
from tinyvllm.config import Capacity, EngineConfig, ModelConfig, SamplingParams
from tinyvllm.errors import CapacityError, DeviceError, TinyvllmError
from tinyvllm.execution.buckets import make_buckets
from tinyvllm.execution.cost import StepCost
from tinyvllm.scheduling.block_manager import fixed_states, fixed_tables
from tinyvllm.scheduling.plan import Scheduled, StepOutput, StepPlan
from tinyvllm.scheduling.request import Request

Report = Callable[[str, int, int], None]  # stage, done, total
# Fields that a row shares with the cost of a step
BYTES = ("nbytes", "weight_bytes", "kv_read_bytes", "kv_written_bytes", "state_bytes", "moved_bytes")


class Runner(Protocol):
    """What is measured here of execution.runner.ModelRunner."""

    @property
    def model_config(self) -> ModelConfig: ...

    @property
    def capacity(self) -> Capacity: ...

    @property
    def max_in_flight(self) -> int: ...

    def launch(self, plan: StepPlan) -> Any: ...

    def sample(self, flight: Any) -> None: ...

    def collect(self, flight: Any) -> StepOutput: ...


class Inspector(Protocol):
    """The part of execution.inspector.RunnerInspector that is used here."""

    @property
    def runner(self) -> Runner: ...

    def cost(self, plan: StepPlan) -> StepCost: ...

    def fill_pool(self, num_blocks: int, seed: int) -> None: ...

    def fill_adapters(self, seed: int) -> None:
        """Random adapters in all slots."""


@dataclass(frozen=True)
class Case:
    """`length` is the prompt's for a prefill, and the context before the first step for a decode."""

    phase: str  # prefill or decode
    batch: int
    length: int
    num_adapters: int = 0  # different ones, which the sequences have in turn


@dataclass(frozen=True)
class LatencyWork:
    """The cases, and how each is repeated: `num_warmup` untimed repeats, then `num_repeats`, and up to `num_extra` more
    while the rates of the repeats differ too much (`trust.is_noisy`)."""

    cases: tuple[Case, ...]
    num_decoded: int = 32  # decode steps of a repeat
    num_repeats: int = 5
    num_warmup: int = 1
    seed: int = 0
    num_extra: int = 0

    def __post_init__(self) -> None:
        if not self.cases:
            raise TinyvllmError("there is nothing to measure: give --prefill, or --batch and --context")
        for flag, value, least in (
            ("tokens", self.num_decoded, 1),
            ("repeats", self.num_repeats, 1),
            ("warmup", self.num_warmup, 1),
            *(("batch", case.batch, 1) for case in self.cases),
            *(("context", case.length, 0) for case in self.cases if case.phase == "decode"),
            *(("prefill", case.length, 2) for case in self.cases if case.phase == "prefill"),
        ):
            if value < least:
                raise TinyvllmError(f"--{flag} has {value}: give at least {least}")

    def max_tokens(self, case: Case) -> int:
        """Of one sequence of the case, in the pool."""
        return case.length + (self.num_decoded if case.phase == "decode" else 0)

    def num_blocks(self, case: Case, block_size: int) -> int:
        return case.batch * -(-self.max_tokens(case) // block_size)


def fit_config(config: EngineConfig, work: LatencyWork, model: ModelConfig) -> EngineConfig:
    """The engine's settings, with limits for this work and only the buckets that it runs in: those that the engine
    would choose. Raises TinyvllmError if a case is longer than the model's context."""
    from tinyvllm.execution.limits import resolve_limits  # here: it imports tinygrad, which --device must come before

    longest = max(work.max_tokens(case) for case in work.cases) + 1
    if longest > model.max_position:
        raise TinyvllmError(
            f"the longest case has {longest} tokens, but the model's context is {model.max_position}: "
            "lower --context, --prefill or --tokens"
        )
    num_seqs = max(case.batch for case in work.cases)
    limited = dataclasses.replace(config, max_num_seqs=num_seqs, max_model_len=longest)
    limits = resolve_limits(limited)
    sizes = [bucket.num_tokens for bucket in make_buckets(limits, limited) if bucket.is_for_prompts]
    budget = limits.max_num_batched_tokens
    totals = [case.batch * case.length for case in work.cases if case.phase == "prefill"]
    pieces = {min(budget, total) for total in totals} | {total % budget for total in totals} - {0}
    if not pieces:  # the smallest limit that is allowed
        sizes, budget = [num_seqs], num_seqs
    needed = {min(size for size in sizes if size >= piece) for piece in pieces}
    return dataclasses.replace(
        limited,
        max_num_batched_tokens=budget,
        decode_buckets=tuple(sorted({case.batch for case in work.cases if case.phase == "decode"} | {num_seqs})),
        token_buckets=tuple(sorted(needed | {budget})),
    )


def measure_latency(inspector: Inspector, machine: Machine, work: LatencyWork, report: Report) -> list[Row]:
    """One row per case. Raises CapacityError, before anything is measured, for a case that the pool cannot hold."""
    capacity = inspector.runner.capacity
    size, available = capacity.block_size, capacity.num_blocks - 1
    for case in work.cases:
        needed = work.num_blocks(case, size)
        if needed > available and capacity.window is None:
            raise CapacityError(
                f"{case.batch} sequences of {work.max_tokens(case)} tokens need {needed} KV blocks, but the pool has "
                f"{available}: lower --batch or --context, or raise --gpu-memory-utilization"
            )
    if any(case.num_adapters for case in work.cases):
        inspector.fill_adapters(work.seed)
    inspector.fill_pool(1 + max(work.num_blocks(case, size) for case in work.cases), work.seed)
    makers: dict[str, type[_TimedCase]] = {"prefill": _TimedPrefill, "decode": _TimedDecode}
    timed = [makers[case.phase](inspector.runner, work, case) for case in work.cases]
    run_in_turn(timed, work, report)
    return [one.row(inspector, machine) for one in timed]


def run_in_turn(timed: Sequence[_TimedCase], work: LatencyWork, report: Report) -> None:
    """All repeats of all cases; then those of the noisy ones, in turn."""
    num_rounds, done = work.num_warmup + work.num_repeats, 0
    for number in range(num_rounds + work.num_extra):
        chosen = timed if number < num_rounds else [one for one in timed if is_noisy(one.estimate)]
        for one in chosen:
            report("measure", done, max(done + 1, num_rounds * len(timed)))
            one.repeat(is_timed=number >= work.num_warmup)
            done += 1
    report("measure", done, done)


def make_requests(runner: Runner, work: LatencyWork, case: Case) -> list[Request]:
    """Random prompts that own shuffled blocks. A decode's prompt is its context and the token of the first step."""
    rng = random.Random(work.seed)
    per_request = work.num_blocks(case, runner.capacity.block_size) // case.batch
    tables = fixed_tables(runner.capacity.groups, [per_request] * case.batch, rng)
    states = fixed_states(runner.capacity, case.batch)
    num_tokens = case.length + (1 if case.phase == "decode" else 0)
    params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=None)
    return [
        Request(
            f"{case.phase}-{index}",
            [rng.randrange(runner.model_config.vocab_size) for _ in range(num_tokens)],
            params,
            tables=tables[index],
            state=states[index],
            adapter_slot=1 + index % case.num_adapters if case.num_adapters else 0,
        )
        for index in range(case.batch)
    ]


def prefill_plans(requests: Sequence[Request], budget: int) -> list[StepPlan]:
    """Steps that compute all prompts in order, each as full as the budget allows: what the scheduler would do."""
    plans: list[StepPlan] = []
    entries: list[Scheduled] = []
    room = budget
    for request in requests:
        start = 0
        while start < request.num_tokens:
            count = min(room, request.num_tokens - start)
            entries.append(Scheduled(request, start, count))
            start += count
            room -= count
            if room == 0:
                plans.append(StepPlan(tuple(entries)))
                entries, room = [], budget
    return [*plans, StepPlan(tuple(entries))] if entries else plans


class _TimedCase(ABC):
    """A case, the times of its repeats, and what else the machine did during them."""

    def __init__(self, runner: Runner, work: LatencyWork, case: Case) -> None:
        self._runner, self._case, self._watch = runner, case, ConditionsWatch()
        self._requests = make_requests(runner, work, case)
        self._repeats: list[list[float]] = []  # seconds of each step

    def repeat(self, *, is_timed: bool) -> None:
        with self._watch if is_timed else nullcontext():
            times = self._run()
        if is_timed:
            self._repeats.append(times)

    @property
    def estimate(self) -> Estimate:
        """Tokens per second of all sequences together, by repeat."""
        return Estimate.of_values(self._rates)

    @property
    def _rates(self) -> list[float]:
        return [self._case.batch * self._num_tokens / sum(times) for times in self._repeats]

    def row(self, inspector: Inspector, machine: Machine) -> Row:
        case = self._case
        return Row(
            test=self._name
            + (f", batch {case.batch}" if case.batch > 1 else "")
            + (f", {case.num_adapters} adapters" if case.num_adapters else ""),
            phase=case.phase,
            batch=case.batch,
            num_tokens=self._num_tokens,
            machine=machine,
            tok_s=Spread.of(self._rates),
            step_ms=Spread.of([seconds * 1e3 for times in self._repeats for seconds in times]),
            trust=self._watch.trust(self.estimate),
            **self._fields(inspector),
        )

    @property
    @abstractmethod
    def _name(self) -> str: ...

    @property
    @abstractmethod
    def _num_tokens(self) -> int:
        """Of one sequence in a repeat."""

    @abstractmethod
    def _run(self) -> list[float]:
        """One repeat: the seconds of each step."""

    @abstractmethod
    def _fields(self, inspector: Inspector) -> dict[str, Any]:
        """What the row has besides times."""


class _TimedPrefill(_TimedCase):
    """A whole prompt is one step here."""

    def __init__(self, runner: Runner, work: LatencyWork, case: Case) -> None:
        super().__init__(runner, work, case)
        self._plans = prefill_plans(self._requests, runner.capacity.max_num_batched_tokens)
        self._num_rows = 0  # of graphs

    @property
    def _name(self) -> str:
        return f"pp{self._case.length}"

    @property
    def _num_tokens(self) -> int:
        return self._case.length

    def _run(self) -> list[float]:
        start_s = time.perf_counter()
        self._num_rows = _run(self._runner, self._plans)
        return [time.perf_counter() - start_s]

    def _fields(self, inspector: Inspector) -> dict[str, Any]:
        case, costs = self._case, [inspector.cost(plan) for plan in self._plans]
        padding = 1 - case.batch * case.length / self._num_rows if self._num_rows else 0.0
        counts = {name: sum(getattr(cost, name) for cost in costs) for name in BYTES}
        fields: dict[str, Any] = dict(
            context=0,
            num_replays=len(self._plans),
            bucket=costs[0].bucket,
            kernels=sum(cost.num_kernels for cost in costs),
            more={"padding_share": padding},
        )
        return fields | counts


class _TimedDecode(_TimedCase):
    def __init__(self, runner: Runner, work: LatencyWork, case: Case) -> None:
        super().__init__(runner, work, case)
        self._num_steps = work.num_decoded

    @property
    def _name(self) -> str:
        return f"tg{self._num_steps} @ d{self._case.length}"

    @property
    def _num_tokens(self) -> int:
        return self._num_steps

    def _run(self) -> list[float]:
        return _decode(self._runner, self._requests, self._num_steps)

    def _fields(self, inspector: Inspector) -> dict[str, Any]:
        costs = _decode_costs(inspector, self._requests, self._num_steps)
        # the context grows with the steps: their mean
        counts = {name: _mean([getattr(cost, name) for cost in costs]) for name in BYTES}
        fields = dict(context=self._case.length, bucket=costs[0].bucket, kernels=costs[0].num_kernels)
        return fields | counts


def _run(runner: Runner, plans: Sequence[StepPlan]) -> int:
    """Run plans of which only the last one's tokens are needed, with as many in flight as allowed. Returns the rows of
    their graphs."""
    flights: deque[Any] = deque()
    num_rows = 0
    for plan in plans:
        if len(flights) == runner.max_in_flight:
            num_rows += runner.collect(flights.popleft()).num_rows
        flight = runner.launch(plan)
        runner.sample(flight)
        flights.append(flight)
    return num_rows + sum(runner.collect(flight).num_rows for flight in flights)


def _mean(counts: list[int]) -> int:
    return round(sum(counts) / len(counts))


def _decode(runner: Runner, requests: list[Request], num_steps: int) -> list[float]:
    """Generate from the requests' prompts: each step's seconds. The requests are left as they were."""
    times: list[float] = []
    flights: deque[Any] = deque()
    last_s = time.perf_counter()
    for number in range(num_steps + runner.max_in_flight - 1):
        if number < num_steps:  # while the previous step runs, as in the engine, if the device feeds itself
            flight = runner.launch(_decode_plan(requests))
            runner.sample(flight)
            flights.append(flight)
            for row, request in enumerate(requests):
                request.num_in_flight, request.flight_row = request.num_in_flight + 1, row
        if len(flights) == runner.max_in_flight or number >= num_steps:
            _append(requests, runner.collect(flights.popleft()))
            now_s = time.perf_counter()
            times.append(now_s - last_s)
            last_s = now_s
    for request in requests:
        request.output_ids.clear()
    return times


def _append(requests: list[Request], output: StepOutput) -> None:
    for request, token_id in zip(requests, output.token_ids, strict=True):
        if token_id < 0:
            raise DeviceError(f"a step of {len(requests)} sequences produced no finite logits")
        request.output_ids.append(token_id)
        request.num_in_flight -= 1


def _decode_costs(inspector: Inspector, requests: list[Request], num_steps: int) -> list[StepCost]:
    """The costs of the same steps. Counted separately, because that takes longer than the time between two steps."""
    costs = []
    for _ in range(num_steps):
        costs.append(inspector.cost(_decode_plan(requests)))
        for request in requests:
            request.output_ids.append(0)
    for request in requests:
        request.output_ids.clear()
    return costs


def _decode_plan(requests: list[Request]) -> StepPlan:
    """The next token of every request."""
    return StepPlan(tuple(Scheduled(request, request.num_tokens - 1, 1) for request in requests))
