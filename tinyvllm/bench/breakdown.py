"""Where an engine's time goes: stages that add up to the wall time, kernels and counts of a step, parts of a start.

Sampling runs inside the recorded step, where no host clock can time it. Its time is estimated as a share of the step's
device time: the share of the kernels after the logits, timed kernel by kernel in the same bucket and context.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from tinyvllm.bench.cold_start import GREEDY, ColdStart, plans_for
from tinyvllm.bench.counts import Fault, StepCounts, find_faults
from tinyvllm.bench.prompts import make_text
from tinyvllm.bench.rows import Machine, Row
from tinyvllm.bench.spread import Spread
from tinyvllm.bench.stages import (
    DECODE,
    PREFILL,
    REST,
    SAMPLING,
    STAGES,
    Case,
    Driver,
    PlainRound,
    Round,
    Runner,
)
from tinyvllm.config import EngineConfig, ModelConfig, SamplingParams
from tinyvllm.errors import TinyvllmError
from tinyvllm.execution.buckets import Bucket
from tinyvllm.execution.cost import StepCost
from tinyvllm.profiling.chips import Chip
from tinyvllm.profiling.kernels import StepProfile, tabulate
from tinyvllm.profiling.measure import DETOKENIZE, PACK, QUEUE, SCHEDULE, TOKENIZE
from tinyvllm.profiling.names import SAMPLE
from tinyvllm.profiling.roofline import Roofline
from tinyvllm.profiling.verdict import Evidence, Finding, judge
from tinyvllm.scheduling.plan import StepPlan
from tinyvllm.text.tokenizer import Tokenizer

Report = Callable[[str, int, int], None]  # stage, done, total
MAX_RESIDUAL_SHARE = 0.02  # of the wall time that no stage accounts for
SCHEMA = 2  # of the JSON: raised when a field changes its name or meaning


class Account(Protocol):
    """The part of device.accounting.DeviceAccount that is used here."""

    def __enter__(self) -> Any: ...

    def __exit__(self, *error: Any) -> None: ...

    def take(self) -> Any: ...

    def used_memory(self) -> int: ...


class MeasuredRunner(Runner, Protocol):
    """The part of execution.runner.ModelRunner that is used here."""

    @property
    def buckets(self) -> tuple[Bucket, ...]: ...

    @property
    def num_cores(self) -> int: ...

    @property
    def output_bytes(self) -> int: ...

    def account(self) -> Account: ...

    def cost(self, plan: StepPlan) -> StepCost: ...

    def profile(self, plan: StepPlan, *, repeats: int, warmup: int) -> StepProfile: ...


@dataclass(frozen=True)
class BreakdownWork:
    """The cases and how often to run each: `num_repeats` times instrumented and as often plain, after one run of each
    that is not counted. `num_warmup`: calls of each bucket before all cases."""

    cases: tuple[Case, ...]
    num_repeats: int = 3
    num_warmup: int = 3
    num_profiled: int = 5  # repeats of the step that is timed kernel by kernel
    seed: int = 0
    prefix_caching: bool = False
    params: SamplingParams = GREEDY

    def __post_init__(self) -> None:
        if not self.cases:
            raise TinyvllmError("there is nothing to measure: give --prompts or --context")
        for flag, value, least in (("repeats", self.num_repeats, 1), ("warmup", self.num_warmup, 1)):
            if value < least:
                raise TinyvllmError(f"--{flag} is {value}: give at least {least}")


@dataclass(frozen=True)
class StageTimes:
    """One stage over all repeats: the spread of its times in seconds, and their sum."""

    name: str
    spread: Spread | None  # None: it never ran
    total_s: float
    share: float  # of the wall time
    components: dict[str, float] = field(default_factory=dict)  # seconds: enqueue, wait, read

    def as_json(self) -> dict[str, Any]:
        spread = self.spread
        numbers = ("mean", "std", "min", "median", "p95", "p99")
        times = {f"{name}_s": 0.0 if spread is None else getattr(spread, name) for name in numbers}
        count = 0 if spread is None else spread.count
        return {"count": count, "total_s": self.total_s, "share": self.share, **times, **self.components}


@dataclass(frozen=True)
class CaseResult:
    """The measurements of one case."""

    case: Case
    num_prompt_tokens: int  # of one prompt, on average
    rounds: tuple[Round, ...]
    plain: tuple[PlainRound, ...]
    sampling_shares: dict[str, float]  # of the device's time, by phase
    counts: dict[str, StepCounts]  # by phase
    profiles: dict[str, StepProfile]  # by phase
    costs: dict[str, StepCost]  # by phase

    @property
    def wall_s(self) -> float:
        return sum(one.wall_s for one in self.rounds)

    @property
    def samples(self) -> dict[str, list[float]]:
        """All times of each stage, in seconds."""
        out: dict[str, list[float]] = {name: [] for name in STAGES}
        for one in self.rounds:
            out[TOKENIZE] += one.tokenize_s
            out[QUEUE] += one.queue_s
            for step in one.steps:
                sampling_s = step.device_s * self.sampling_shares[step.kind]
                out[SCHEDULE].append(step.schedule_s)
                out[PACK].append(step.pack_s)
                out[step.kind].append(step.device_s - sampling_s + step.read_s)
                out[SAMPLING].append(sampling_s)
                out[DETOKENIZE].append(step.detokenize_s)
                out[REST].append(step.rest_s)
        return out

    def components(self, phase: str) -> dict[str, float]:
        """A phase's seconds, sampling included, split by what the host did: enqueue, wait for the device, read."""
        steps = [step for one in self.rounds for step in one.steps if step.kind == phase]
        return {
            "enqueue_s": sum(step.enqueue_s for step in steps),
            "wait_s": sum(step.wait_s for step in steps),
            "read_s": sum(step.read_s for step in steps),
        }


@dataclass(frozen=True)
class Breakdown:
    """All measurements of a run."""

    machine: Machine
    work: BreakdownWork
    cold_start: ColdStart
    cases: tuple[CaseResult, ...]
    max_in_flight: int  # steps that the engine overlaps in a plain run
    faults: tuple[Fault, ...]
    chip: Chip
    vocab_size: int

    @property
    def wall_s(self) -> float:
        return sum(case.wall_s for case in self.cases)

    @property
    def stages(self) -> list[StageTimes]:
        return sum_stages(self.cases)

    @property
    def residual_share(self) -> float:
        return residual_share(self.cases)

    @property
    def device_share(self) -> float:
        """Share of the wall time between each launch and the end of its step on the device."""
        busy_s = sum(step.device_s for case in self.cases for one in case.rounds for step in one.steps)
        return busy_s / self.wall_s

    @property
    def overhead_share(self) -> float:
        """Measurement overhead: how much longer instrumented runs take than plain ones. Medians over repeats, summed
        over all cases."""
        instrumented_s = sum(statistics.median(one.wall_s for one in case.rounds) for case in self.cases)
        plain_s = sum(statistics.median(one.wall_s for one in case.plain) for case in self.cases)
        return instrumented_s / plain_s - 1

    @property
    def main(self) -> CaseResult:
        """The case whose decode step is shown kernel by kernel: the longest prompt, alone."""
        return max(self.cases, key=lambda result: (-result.case.batch, result.num_prompt_tokens))

    def roofline(self, phase: str) -> Roofline | None:
        """The roofline of the main case's step of a phase; None if it has no such step."""
        profile, cost = self.main.profiles.get(phase), self.main.costs.get(phase)
        if profile is None or cost is None:
            return None
        flops = sum(kernel.flops or 0.0 for kernel in profile.kernels)
        return Roofline(self.chip, cost.nbytes, flops, profile.step_s)

    @property
    def verdicts(self) -> list[Finding]:
        """What limits the main case: its decode steps, and its prefill compared with them. The first is the verdict."""
        roofline = self.roofline(DECODE)
        assert roofline is not None, "every case decodes"
        main = self.main
        profile = main.profiles[DECODE]
        phases = {name: [s for one in main.rounds for s in one.steps if s.kind == name] for name in (PREFILL, DECODE)}
        plain_s = [(one.wall_s - one.first_token_s) / (main.case.num_output - 1) for one in main.plain]
        return judge(
            Evidence(
                kernels=profile.kernels,
                step_s=profile.step_s,
                roofline=roofline,
                context=main.num_prompt_tokens + main.case.num_output // 2,
                turn_s=statistics.median(plain_s),
                prefill_s=sum(step.device_s for step in phases[PREFILL]),
                decode_s=sum(step.device_s for step in phases[DECODE]),
            )
        )


def sum_stages(cases: Sequence[CaseResult]) -> list[StageTimes]:
    """The stages of several cases together, in the order in which a request passes them."""
    wall_s = sum(case.wall_s for case in cases)
    pooled: dict[str, list[float]] = {name: [] for name in STAGES}
    for case in cases:
        for name, values in case.samples.items():
            pooled[name] += values
    out = []
    for name, values in pooled.items():
        components: dict[str, float] = {}
        if name in (PREFILL, DECODE):
            each = [case.components(name) for case in cases]
            components = {key: sum(one[key] for one in each) for key in each[0]}
        spread = Spread.of(values) if values else None
        out.append(StageTimes(name, spread, sum(values), sum(values) / wall_s, components))
    return out


def residual_share(cases: Sequence[CaseResult]) -> float:
    """Share of the wall time that no stage accounts for."""
    return 1 - sum(stage.share for stage in sum_stages(cases))


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
    runner: MeasuredRunner,
    tokenizer: Tokenizer | None,
    machine: Machine,
    work: BreakdownWork,
    cold_start: ColdStart,
    chip: Chip,
    report: Report,
) -> Breakdown:
    """Measure all cases. The runner must be warm, and its pool must not be used otherwise meanwhile. `chip`: whose
    roofline applies."""
    driver = Driver(runner, tokenizer, seed=work.seed, prefix_caching=work.prefix_caching, params=work.params)
    results = []
    for done, case in enumerate(work.cases):
        report("measure", done, len(work.cases))
        results.append(measure_case(driver, runner, work, case))
    report("measure", len(work.cases), len(work.cases))
    faults: dict[tuple[str, str], Fault] = {}
    for result in results:
        for counts in result.counts.values():
            for fault in find_faults(
                counts,
                num_layers=runner.model_config.num_layers,
                num_cores=runner.num_cores,
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
    )


def measure_case(driver: Driver, runner: MeasuredRunner, work: BreakdownWork, case: Case) -> CaseResult:
    """Measure one case: counts first, which also warms up; then instrumented and plain runs in turn; then kernels."""
    counts, plans = count_steps(driver, runner, case)
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
        plan = plans_for(bucket, runner.capacity, context, work.params)[0]
        profiles[phase] = runner.profile(plan, repeats=work.num_profiled, warmup=1)
        costs[phase] = runner.cost(plan)
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
    num_kernels = sum(kernel.count for kernel in profile.kernels if kernel.operation == SAMPLE)
    return dataclasses.replace(counts, sampling_kernels=num_kernels)


def count_steps(driver: Driver, runner: MeasuredRunner, case: Case) -> tuple[dict[str, StepCounts], dict[str, Bucket]]:
    """The maximum of each count over the steps of each phase, and the bucket of each phase's largest step."""
    highest: dict[str, dict[str, Any]] = {}
    buckets: dict[str, Bucket] = {}
    by_name = {bucket.name: bucket for bucket in runner.buckets}
    num_captures = runner.num_captures
    with runner.account() as account:
        account.take()

        def add_counts(plan: StepPlan | None) -> None:
            nonlocal num_captures
            counts = account.take()
            if plan is None:
                return
            phase = DECODE if plan.is_decode else PREFILL
            cost = runner.cost(plan)
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
    return {phase: _step_counts(phase, values, runner.output_bytes) for phase, values in highest.items()}, buckets


def _step_counts(phase: str, values: dict[str, Any], output_bytes: int) -> StepCounts:
    details = tuple(f"{text} x {count}" for text, count in values.pop("details").items())
    values.pop("replays")
    return StepCounts(phase=phase, details=details, sampling_kernels=0, output_bytes=output_bytes, **values)


# -- llama-bench's rows ----------------------------------------------------------------------------------------------


def bench_rows(breakdown: Breakdown) -> list[Row]:
    """Prefill and decode of each case's plain runs, under llama-bench's names.

    Prefill ends when every request has its first token; requests that have theirs earlier decode meanwhile. Decode is
    the rest, of all requests that still generate."""
    rows = []
    for result in breakdown.cases:
        case, length = result.case, result.num_prompt_tokens
        suffix = f", batch {case.batch}" if case.batch > 1 else ""
        num_prompt = sum(request.num_prompt_tokens for request in result.plain[0].requests)
        first_s = [one.first_token_s for one in result.plain]
        rates = [num_prompt / seconds for seconds in first_s]
        rows.append(_row(breakdown, result, f"pp{length}{suffix}", PREFILL, rates, [1e3 * one for one in first_s]))
        rest = [one for one in result.plain if one.num_decoded]
        if rest:
            rates = [one.num_decoded / (one.wall_s - one.first_token_s) for one in rest]
            steps_ms = [1e3 * (one.wall_s - one.first_token_s) / one.num_decode_steps for one in rest]
            name = f"tg{case.num_output} @ d{length}{suffix}"
            rows.append(_row(breakdown, result, name, DECODE, rates, steps_ms))
    return rows


def _row(
    breakdown: Breakdown, result: CaseResult, name: str, phase: str, rates: list[float], steps_ms: list[float]
) -> Row:
    counts, cost = result.counts.get(phase), result.costs.get(phase)
    # minimal bytes and floor are those of one step with all sequences: a prompt may take several steps
    is_whole = phase == DECODE and cost is not None and cost.bucket == Bucket.decode(result.case.batch).name
    return Row(
        test=name,
        phase=phase,
        batch=result.case.batch,
        context=result.num_prompt_tokens if phase == DECODE else 0,
        num_tokens=result.case.num_output if phase == DECODE else result.num_prompt_tokens,
        machine=breakdown.machine,
        tok_s=Spread.of(rates),
        step_ms=Spread.of(steps_ms),
        bucket=None if cost is None else cost.bucket,
        kernels=None if counts is None else counts.kernels,
        nbytes=cost.nbytes if cost is not None and is_whole else None,
        moved_bytes=cost.moved_bytes if cost is not None and is_whole else None,
    )


# -- JSON ------------------------------------------------------------------------------------------------------------


def breakdown_json(breakdown: Breakdown) -> dict[str, Any]:
    """The breakdown as JSON values. docs/PROFILING.md describes the fields."""
    return {
        "schema": SCHEMA,
        "kind": "breakdown",
        **_machine_json(breakdown.machine),
        "wall_s": breakdown.wall_s,
        "residual_share": breakdown.residual_share,
        "device_share": breakdown.device_share,
        "overhead_share": breakdown.overhead_share,
        "max_in_flight": breakdown.max_in_flight,
        "vocab_size": breakdown.vocab_size,
        "sampling": {
            "temperature": breakdown.work.params.temperature,
            "top_p": breakdown.work.params.top_p,
            "top_k": breakdown.work.params.top_k,
        },
        "prefix_caching": breakdown.work.prefix_caching,
        "repeats": breakdown.work.num_repeats,
        "stages": {stage.name: stage.as_json() for stage in breakdown.stages},
        "cold_start": breakdown.cold_start.as_json(),
        "per_step": _per_step(breakdown.cases),
        "findings": [fault.as_json() for fault in breakdown.faults],
        "verdicts": [verdict.as_json() for verdict in breakdown.verdicts],
        "roofline": {
            phase: roofline.as_json()
            for phase in (PREFILL, DECODE)
            if (roofline := breakdown.roofline(phase)) is not None
        },
        "main_case": breakdown.main.case.name,
        "cases": [_case_json(breakdown, result) for result in breakdown.cases],
        "environment": breakdown.machine.environment,
    }


def _machine_json(machine: Machine) -> dict[str, Any]:
    return {
        "model": machine.model,
        "dtype": machine.dtype,
        "params": machine.num_params,
        "model_bytes": machine.model_bytes,
        "device": machine.device,
        "bandwidth_gbps": machine.bandwidth_gbps,
    }


def _per_step(cases: Sequence[CaseResult]) -> dict[str, Any]:
    """The maximum of each count over all cases' decode steps."""
    found = [case.counts[DECODE].as_json() for case in cases if DECODE in case.counts]
    names = [name for name, value in found[0].items() if isinstance(value, int)]
    return {name: max(one[name] for one in found) for name in names}


def _case_json(breakdown: Breakdown, result: CaseResult) -> dict[str, Any]:
    walls = Spread.of([one.wall_s for one in result.rounds])
    plain = Spread.of([one.wall_s for one in result.plain])
    ttft = [request.token_s[0] for one in result.plain for request in one.requests]
    tpot = [
        (request.token_s[-1] - request.token_s[0]) / (len(request.token_s) - 1)
        for one in result.plain
        for request in one.requests
    ]
    waited = [request.waited_s for one in result.rounds for request in one.requests]
    decode = result.profiles.get(DECODE)
    return {
        "name": result.case.name,
        "batch": result.case.batch,
        "prompt_tokens": result.num_prompt_tokens,
        "output_tokens": result.case.num_output,
        "wall_s": _spread_json(walls),
        "plain_wall_s": _spread_json(plain),
        "residual_share": residual_share([result]),
        "ttft_s": _spread_json(Spread.of(ttft)),
        "tpot_s": _spread_json(Spread.of(tpot)),
        "queue_wait_s": _spread_json(Spread.of(waited)),
        "stages": {stage.name: stage.as_json() for stage in sum_stages([result])},
        "sampling_share": result.sampling_shares,
        "per_step": {phase: counts.as_json() for phase, counts in result.counts.items()},
        "kernels": [] if decode is None else [row.as_json() for row in tabulate(decode.kernels, chip=breakdown.chip)],
    }


def _spread_json(spread: Spread) -> dict[str, Any]:
    return dataclasses.asdict(spread)
