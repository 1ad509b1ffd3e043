"""Measure a breakdown: instrumented and plain runs of each case, counts of its steps, kernels of its largest steps."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from tinyvllm.bench.breakdown import Breakdown, BreakdownWork, CaseResult
from tinyvllm.bench.cold_start import ColdStart, plans_for
from tinyvllm.bench.counts import Fault, StepCounts, find_faults
from tinyvllm.bench.estimate import Estimate
from tinyvllm.bench.memory import MemoryWatch
from tinyvllm.bench.prompts import make_text
from tinyvllm.bench.rows import Machine
from tinyvllm.bench.stages import Case, Driver, PlainRound, Round, Runner
from tinyvllm.bench.trust import ConditionsWatch, is_noisy
from tinyvllm.config import EngineConfig, ModelConfig
from tinyvllm.errors import TinyvllmError
from tinyvllm.execution.buckets import Bucket, make_buckets
from tinyvllm.execution.cost import StepCost
from tinyvllm.profiling.chips import Chip
from tinyvllm.profiling.expert_load import ExpertLoad
from tinyvllm.profiling.interpreter import RARE_PROBES_S, Watch
from tinyvllm.profiling.kernels import StepProfile
from tinyvllm.profiling.names import SAMPLE
from tinyvllm.profiling.request_stages import DECODE, PREFILL
from tinyvllm.scheduling.plan import StepPlan
from tinyvllm.text.tokenizer import Tokenizer

Report = Callable[[str, int, int], None]  # stage, done, total
MAX_REPEATS = 12  # of a noisy case


class Account(Protocol):
    """The part of device.accounting.DeviceAccount that is used here."""

    def __enter__(self) -> Any: ...

    def __exit__(self, *error: Any) -> None: ...

    def take(self) -> Any: ...

    def used_memory(self) -> int: ...


class BucketRunner(Runner, Protocol):
    """The part of execution.runner.ModelRunner that is used here."""

    @property
    def buckets(self) -> tuple[Bucket, ...]: ...


class Inspector(Protocol):
    """The part of execution.inspector.RunnerInspector that is used here."""

    @property
    def runner(self) -> BucketRunner: ...

    @property
    def num_cores(self) -> int: ...

    @property
    def output_bytes(self) -> int: ...

    def account(self) -> Account: ...

    def cost(self, plan: StepPlan, loads: Sequence[ExpertLoad] = ()) -> StepCost: ...

    def profile(self, plan: StepPlan, *, repeats: int, warmup: int) -> StepProfile: ...


def fit_config(
    config: dict[str, Any], work: BreakdownWork, longest: int, model: ModelConfig, totals: Sequence[int] = ()
) -> EngineConfig:
    """The engine's settings for this work: those of serving, with the limits that the cases need, and no graphs for
    other numbers of requests. `longest`: tokens of the longest case, prompt plus output. `totals`: tokens of each
    case's prompts; if given, there are no graphs for other numbers of tokens either, so that the start is short.

    Raises TinyvllmError if they exceed the model's context."""
    if longest > model.max_position:
        raise TinyvllmError(
            f"the longest case has {longest} tokens, but the model's context is {model.max_position}: "
            "lower --context or --tokens"
        )
    batches = sorted({case.batch for case in work.cases})
    batch = batches[-1]
    budget = max(config["max_num_batched_tokens"], batch) if config["max_num_batched_tokens"] else None
    limits = {"max_num_seqs": batch, "max_model_len": longest + 1, "max_num_batched_tokens": budget}
    fitted = EngineConfig(**(config | limits | {"decode_buckets": tuple(batches)}))
    return dataclasses.replace(fitted, token_buckets=token_buckets(fitted, totals)) if totals else fitted


def token_buckets(config: EngineConfig, totals: Sequence[int]) -> tuple[int, ...]:
    """Of the engine's own buckets, those that prompts of `totals` tokens use when cut into steps as full as possible;
    and the largest, which everything fits into."""
    from tinyvllm.execution.limits import resolve_limits  # here: it imports tinygrad, which --device must come before

    limits = resolve_limits(config)
    sizes = [bucket.num_tokens for bucket in make_buckets(limits, config) if bucket.is_for_prompts]
    rest = {total % limits.max_num_batched_tokens for total in totals} - {0}
    return tuple(sorted({min(size for size in sizes if size >= tokens) for tokens in rest} | {max(sizes)}))


def longest_case(work: BreakdownWork, tokenizer: Tokenizer | None) -> int:
    """Tokens of the longest request of all cases, prompt plus output."""
    return max(max(prompt_lengths(case, tokenizer)) + case.num_output for case in work.cases)


def prompt_lengths(case: Case, tokenizer: Tokenizer | None) -> list[int]:
    """Tokens of each prompt of a case."""
    if case.text is None or tokenizer is None:
        return [case.num_ids] * case.batch
    return [len(tokenizer.encode(make_text(case.text, number))) for number in range(case.batch)]


def measure_breakdown(
    inspector: Inspector,
    tokenizer: Tokenizer | None,
    machine: Machine,
    work: BreakdownWork,
    cold_start: ColdStart,
    chip: Chip,
    report: Report,
    memory: MemoryWatch | None = None,
    until_s: float | None = None,
) -> Breakdown:
    """Measure all cases. The runner must be warm, and its pool must not be used otherwise meanwhile. `chip`: whose
    roofline applies. `memory`: has measured the start, and measures the cases. `until_s`: by time.monotonic; before it
    cases whose repeats differ too much are repeated again."""
    runner = inspector.runner
    driver = Driver(runner, tokenizer, seed=work.seed, prefix_caching=work.prefix_caching, params=work.params)
    memory = memory or MemoryWatch()
    watch, progress = Watch(RARE_PROBES_S), _Progress(report, work)
    measured = [_MeasuredCase(driver, inspector, work, case, memory, progress) for case in work.cases]
    repeat_in_turn(measured, work.num_repeats, until_s)
    results = [one.finish() for one in measured]
    interpreter = watch.stop()
    faults: dict[tuple[str, str], Fault] = {}
    for result in results:
        for counts in result.counts.values():
            for fault in find_faults(
                counts,
                num_layers=runner.model_config.num_layers,
                num_cores=inspector.num_cores,
                vocab_size=runner.model_config.vocab_size,
            ):
                faults.setdefault((fault.name, counts.phase), fault)
    return Breakdown(
        machine=machine,
        work=work,
        cold_start=cold_start,
        cases=tuple(results),
        max_in_flight=runner.max_in_flight,
        faults=tuple(faults.values()),
        chip=chip,
        vocab_size=runner.model_config.vocab_size,
        interpreter=interpreter,
        memory=tuple(memory.blocks),
    )


class _Progress:
    """Reports each round of each case."""

    def __init__(self, report: Report, work: BreakdownWork) -> None:
        self._report, self._done = report, 0
        self._total = len(work.cases) * (3 + work.num_repeats)  # counts, warm-up, repeats, kernels
        report("measure", 0, self._total)

    def advance(self) -> None:
        self._done += 1
        self._total = max(self._total, self._done)  # noisy cases are repeated again
        self._report("measure", self._done, self._total)


class Repeated(Protocol):
    """A case that can be repeated."""

    @property
    def is_noisy(self) -> bool: ...

    @property
    def repeat_s(self) -> float: ...

    def repeat(self) -> None: ...


def repeat_in_turn(cases: Sequence[Repeated], num_repeats: int, until_s: float | None) -> None:
    """Repeat all cases, one after the other each time, so that a slow minute of the machine touches all alike; then
    those that are noisy, as long as a repeat ends before `until_s` (time.monotonic), up to MAX_REPEATS."""
    for _ in range(num_repeats):
        for one in cases:
            one.repeat()
    if until_s is None:
        return
    for _ in range(MAX_REPEATS - num_repeats):
        chosen = [one for one in cases if one.is_noisy]
        for one in chosen:
            if time.monotonic() + one.repeat_s > until_s:
                return
            one.repeat()
        if not chosen:
            return


class _MeasuredCase:
    """One case: counts and memory first, which also warms up; then instrumented and plain runs in turn; then
    kernels."""

    def __init__(
        self,
        driver: Driver,
        inspector: Inspector,
        work: BreakdownWork,
        case: Case,
        memory: MemoryWatch,
        progress: _Progress,
    ) -> None:
        self._driver, self._inspector, self._work, self._case = driver, inspector, work, case
        self._progress, self._watch = progress, ConditionsWatch()
        self._rounds: list[Round] = []
        self._plain: list[PlainRound] = []
        memory.mark()
        self._counts = count_steps(driver, inspector, case, memory)
        progress.advance()
        driver.run(case)
        progress.advance()

    def repeat(self) -> None:
        with self._watch:
            self._rounds.append(self._driver.run(self._case))
            self._plain.append(self._driver.run_plain(self._case))
        self._progress.advance()

    @property
    def repeat_s(self) -> float:
        """How long a repeat takes."""
        return statistics.fmean(one.wall_s for one in self._rounds) + self._estimate.value

    @property
    def is_noisy(self) -> bool:
        return is_noisy(self._estimate)

    @property
    def _estimate(self) -> Estimate:
        """Seconds of a plain run."""
        return Estimate.of_values([one.wall_s for one in self._plain])

    def finish(self) -> CaseResult:
        """Time the kernels of the largest step of each phase."""
        inspector, case, counts, work = self._inspector, self._case, self._counts, self._work
        num_prompt_tokens = round(statistics.fmean(one.num_prompt_tokens for one in self._rounds[0].requests))
        profiles, costs = {}, {}
        for phase, bucket in counts.buckets.items():
            context = num_prompt_tokens + case.num_output // 2
            vocab_size = inspector.runner.model_config.vocab_size
            plan = plans_for(bucket, inspector.runner.capacity, context, work.params, vocab_size)[0]
            profiles[phase] = inspector.profile(plan, repeats=work.num_profiled, warmup=1)
            costs[phase] = inspector.cost(plan, profiles[phase].experts)
        self._progress.advance()
        shares = {phase: sampling_share(profile) for phase, profile in profiles.items()}
        finished = {phase: _with_sampling(one, profiles[phase]) for phase, one in counts.highest.items()}
        return CaseResult(
            case=case,
            num_prompt_tokens=num_prompt_tokens,
            rounds=tuple(self._rounds),
            plain=tuple(self._plain),
            sampling_shares=shares,
            counts=finished,
            profiles=profiles,
            costs=costs,
            step_counts=tuple(counts.steps),
            token_texts=self._driver.texts(self._rounds[-1].requests[0].token_ids),
            trust=self._watch.trust(self._estimate),
        )


def sampling_share(profile: StepProfile) -> float:
    """Share of a step's kernel time spent in the kernels after the logits."""
    total_s = profile.kernels_s
    return sum(kernel.seconds for kernel in profile.kernels if kernel.operation == SAMPLE) / total_s if total_s else 0.0


def _with_sampling(counts: StepCounts, profile: StepProfile) -> StepCounts:
    num_kernels = sum(kernel.launches for kernel in profile.kernels if kernel.operation == SAMPLE)
    return dataclasses.replace(counts, sampling_kernels=num_kernels)


@dataclass(frozen=True)
class CaseCounts:
    """`highest`: the maximum of each count over the steps of each phase. `buckets`: that of each phase's largest step.
    `steps`: the counts of each step, in order."""

    highest: dict[str, StepCounts]
    buckets: dict[str, Bucket]
    steps: list[dict[str, int]]


def count_steps(driver: Driver, inspector: Inspector, case: Case, memory: MemoryWatch) -> CaseCounts:
    """Run a case, and count everything that its steps ask of the device."""
    highest: dict[str, dict[str, Any]] = {}
    buckets: dict[str, Bucket] = {}
    steps: list[dict[str, int]] = []
    runner = inspector.runner
    by_name = {bucket.name: bucket for bucket in runner.buckets}
    num_captures = runner.num_captures
    with inspector.account() as account:
        account.take()

        def add_counts(plan: StepPlan | None) -> None:
            nonlocal num_captures
            counts = account.take()
            if plan is None:
                return
            phase = DECODE if plan.has_no_prompts else PREFILL
            memory.end(f"{case.name}, {phase}")
            cost = inspector.cost(plan)
            bucket = by_name[cost.bucket]
            if bucket.num_tokens >= buckets.setdefault(phase, bucket).num_tokens:
                buckets[phase] = bucket
            steps.append(counts.numbers)
            values = counts.numbers | {
                "captures": runner.num_captures - num_captures,
                "moved_bytes": cost.moved_bytes,
                "num_seqs": len(plan.entries),
                "kv_blocks": driver.num_used_blocks,
                "device_bytes": account.used_memory(),
            }
            num_captures = runner.num_captures
            kept = highest.setdefault(phase, {"steps": 0, "details": {}})
            kept["steps"] += 1
            kept["details"] |= counts.details
            for name, value in values.items():
                kept[name] = max(kept.get(name, 0), value)
            account.take()  # drop what counting itself may have asked for
            memory.mark()

        driver.run_plain(case, add_counts)
    found = {phase: _step_counts(phase, values, inspector.output_bytes) for phase, values in highest.items()}
    return CaseCounts(found, buckets, steps)


def _step_counts(phase: str, values: dict[str, Any], output_bytes: int) -> StepCounts:
    details = tuple(f"{text} x {count}" for text, count in values.pop("details").items())
    values.pop("replays")
    return StepCounts(phase=phase, details=details, sampling_kernels=0, output_bytes=output_bytes, **values)
