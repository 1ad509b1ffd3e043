"""Measure a breakdown: instrumented and plain runs of each case, counts of its steps, kernels of its largest steps."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from tinyvllm.bench.breakdown import Breakdown, BreakdownWork, CaseResult
from tinyvllm.bench.cold_start import ColdStart, plans_for
from tinyvllm.bench.counts import Fault, StepCounts, find_faults
from tinyvllm.bench.prompts import make_text
from tinyvllm.bench.rows import Machine
from tinyvllm.bench.stages import Case, Driver, PlainRound, Round, Runner
from tinyvllm.config import EngineConfig, ModelConfig
from tinyvllm.errors import TinyvllmError
from tinyvllm.execution.buckets import Bucket
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


def fit_config(config: dict[str, Any], work: BreakdownWork, longest: int, model: ModelConfig) -> EngineConfig:
    """The engine's settings for this work: those of serving, with the limits that the cases need. `longest`: tokens of
    the longest case, prompt plus output. Raises TinyvllmError if they exceed the model's context."""
    if longest > model.max_position:
        raise TinyvllmError(
            f"the longest case has {longest} tokens, but the model's context is {model.max_position}: "
            "lower --context or --tokens"
        )
    batch = max(case.batch for case in work.cases)
    budget = max(config["max_num_batched_tokens"], batch) if config["max_num_batched_tokens"] else None
    return EngineConfig(
        **(config | {"max_num_seqs": batch, "max_model_len": longest + 1, "max_num_batched_tokens": budget})
    )


def longest_case(work: BreakdownWork, tokenizer: Tokenizer | None) -> int:
    """Tokens of the longest request of all cases, prompt plus output."""

    def length(case: Case, number: int) -> int:
        if case.text is None or tokenizer is None:
            return case.num_ids + case.num_output
        return len(tokenizer.encode(make_text(case.text, number))) + case.num_output

    return max(length(case, number) for case in work.cases for number in range(case.batch))


def measure_breakdown(
    inspector: Inspector,
    tokenizer: Tokenizer | None,
    machine: Machine,
    work: BreakdownWork,
    cold_start: ColdStart,
    chip: Chip,
    report: Report,
) -> Breakdown:
    """Measure all cases. The runner must be warm, and its pool must not be used otherwise meanwhile. `chip`: whose
    roofline applies."""
    runner = inspector.runner
    driver = Driver(runner, tokenizer, seed=work.seed, prefix_caching=work.prefix_caching, params=work.params)
    results, watch = [], Watch(RARE_PROBES_S)
    for done, case in enumerate(work.cases):
        report("measure", done, len(work.cases))
        results.append(measure_case(driver, inspector, work, case))
    interpreter = watch.stop()
    report("measure", len(work.cases), len(work.cases))
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
    )


def measure_case(driver: Driver, inspector: Inspector, work: BreakdownWork, case: Case) -> CaseResult:
    """Measure one case: counts first, which also warms up; then instrumented and plain runs in turn; then kernels."""
    counts, plans = count_steps(driver, inspector, case)
    rounds: list[Round] = []
    plain: list[PlainRound] = []
    for repeat in range(-1, work.num_repeats):
        instrumented, uninstrumented = driver.run(case), driver.run_plain(case)
        if repeat >= 0:
            rounds.append(instrumented)
            plain.append(uninstrumented)
    num_prompt_tokens = round(statistics.fmean(request.num_prompt_tokens for request in rounds[0].requests))
    profiles, costs = {}, {}
    for phase, bucket in plans.items():
        context = num_prompt_tokens + case.num_output // 2
        vocab_size = inspector.runner.model_config.vocab_size
        plan = plans_for(bucket, inspector.runner.capacity, context, work.params, vocab_size)[0]
        profiles[phase] = inspector.profile(plan, repeats=work.num_profiled, warmup=1)
        costs[phase] = inspector.cost(plan, profiles[phase].experts)
    shares = {phase: sampling_share(profile) for phase, profile in profiles.items()}
    finished = {phase: _with_sampling(one, profiles[phase]) for phase, one in counts.items()}
    return CaseResult(
        case=case,
        num_prompt_tokens=num_prompt_tokens,
        rounds=tuple(rounds),
        plain=tuple(plain),
        sampling_shares=shares,
        counts=finished,
        profiles=profiles,
        costs=costs,
    )


def sampling_share(profile: StepProfile) -> float:
    """Share of a step's kernel time spent in the kernels after the logits."""
    total_s = profile.kernels_s
    return sum(kernel.seconds for kernel in profile.kernels if kernel.operation == SAMPLE) / total_s if total_s else 0.0


def _with_sampling(counts: StepCounts, profile: StepProfile) -> StepCounts:
    num_kernels = sum(kernel.launches for kernel in profile.kernels if kernel.operation == SAMPLE)
    return dataclasses.replace(counts, sampling_kernels=num_kernels)


def count_steps(driver: Driver, inspector: Inspector, case: Case) -> tuple[dict[str, StepCounts], dict[str, Bucket]]:
    """The maximum of each count over the steps of each phase, and the bucket of each phase's largest step."""
    highest: dict[str, dict[str, Any]] = {}
    buckets: dict[str, Bucket] = {}
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
            phase = DECODE if plan.is_decode else PREFILL
            cost = inspector.cost(plan)
            bucket = by_name[cost.bucket]
            if bucket.num_tokens >= buckets.setdefault(phase, bucket).num_tokens:
                buckets[phase] = bucket
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

        driver.run_plain(case, add_counts)
    return {phase: _step_counts(phase, values, inspector.output_bytes) for phase, values in highest.items()}, buckets


def _step_counts(phase: str, values: dict[str, Any], output_bytes: int) -> StepCounts:
    details = tuple(f"{text} x {count}" for text, count in values.pop("details").items())
    values.pop("replays")
    return StepCounts(phase=phase, details=details, sampling_kernels=0, output_bytes=output_bytes, **values)
