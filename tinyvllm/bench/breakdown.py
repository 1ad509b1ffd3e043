"""Where an engine's time goes: stages that add up to the wall time, kernels and counts of a step, parts of a start.

Sampling runs inside the recorded step, where no host clock can time it. Its time is estimated as a share of the step's
device time: the share of the kernels after the logits, timed kernel by kernel in the same bucket and context.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tinyvllm.bench.cold_start import GREEDY, ColdStart
from tinyvllm.bench.counts import Fault, StepCounts
from tinyvllm.bench.memory import MemoryBlock
from tinyvllm.bench.rows import Machine
from tinyvllm.bench.spread import Spread
from tinyvllm.bench.stages import (
    DEVICE_STAGES,
    ENQUEUE,
    NO_TIME,
    READ,
    SAMPLING,
    STAGES,
    WAIT,
    Case,
    PlainRound,
    RequestTimes,
    Round,
    StepTimes,
    Took,
)
from tinyvllm.bench.trust import Trust
from tinyvllm.config import SamplingParams
from tinyvllm.errors import TinyvllmError
from tinyvllm.execution.cost import StepCost
from tinyvllm.profiling.chips import Chip
from tinyvllm.profiling.interpreter import Interpreter
from tinyvllm.profiling.kernels import StepProfile
from tinyvllm.profiling.measure import ADMISSION, TOKENIZE
from tinyvllm.profiling.request_stages import DECODE, PREFILL
from tinyvllm.profiling.roofline import Roofline
from tinyvllm.profiling.verdict import Evidence, Finding, Turn, judge

MAX_RESIDUAL_SHARE = 0.02  # of the wall time that no stage accounts for
STEP_HOST_STAGES = tuple(name for name in STAGES if name not in (TOKENIZE, ADMISSION, *DEVICE_STAGES))


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
    """One stage over all repeats: the spread of its times in seconds, and their sum. `cpu`: of its thread's processor
    time; None for a stage of the device."""

    name: str
    spread: Spread | None  # None: it never ran
    total_s: float
    share: float  # of the wall time
    cpu: Spread | None = None
    components: dict[str, float] = field(default_factory=dict)  # seconds: enqueue, wait, read

    def as_json(self) -> dict[str, Any]:
        spread, cpu = self.spread, self.cpu
        numbers = ("mean", "std", "min", "median", "p95", "p99")
        times = {f"{name}_s": 0.0 if spread is None else getattr(spread, name) for name in numbers}
        count = 0 if spread is None else spread.count
        of_thread = {} if cpu is None else {"cpu_mean_s": cpu.mean, "cpu_std_s": cpu.std}
        return {"count": count, "total_s": self.total_s, "share": self.share, **times, **of_thread, **self.components}


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
    step_counts: tuple[dict[str, int], ...] = ()  # of each step, in order
    token_texts: tuple[str, ...] = ()  # of the first request
    trust: Trust | None = None  # of a plain run's duration

    @property
    def wall_s(self) -> float:
        return sum(one.wall_s for one in self.rounds)

    @property
    def token_s(self) -> float:
        """Seconds of each token after a request's first, without instrumentation: the median."""
        return statistics.median(time_per_token(request) for one in self.plain for request in one.requests)

    @property
    def samples(self) -> dict[str, list[Took]]:
        """All times of each stage."""
        out: dict[str, list[Took]] = {name: [] for name in STAGES}
        for one in self.rounds:
            for name, values in self.samples_of(one).items():
                out[name] += values
        return out

    def samples_of(self, one: Round) -> dict[str, list[Took]]:
        """The times of each stage in one round: of tokenize and admission a request's, of the others a step's. Sampling
        is its share of the device's time, and what the host does for it."""
        out: dict[str, list[Took]] = {name: [] for name in STAGES}
        out[TOKENIZE], out[ADMISSION] = list(one.tokenize), list(one.admission)
        for step in one.steps:
            # a wait beyond the step's own time on the device is none of sampling's
            sampling_s = min(step.device_s, self.profiles[step.kind].step_s) * self.sampling_shares[step.kind]
            device_s = step.device_s - sampling_s + step.wall_s(READ)
            out[step.kind].append(Took(device_s, 0.0))
            host = step.parts.get(SAMPLING, NO_TIME)
            out[SAMPLING].append(Took(sampling_s + host.wall_s, host.cpu_s))
            for name in STEP_HOST_STAGES:
                out[name].append(step.parts.get(name, NO_TIME))
        return out

    def components(self, phase: str) -> dict[str, float]:
        """A phase's seconds, sampling included, split by what the host did: enqueue, wait for the device, read."""
        steps = [step for one in self.rounds for step in one.steps if step.kind == phase]
        return {f"{part}_s": sum(step.wall_s(part) for step in steps) for part in (ENQUEUE, WAIT, READ)}


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
    interpreter: Interpreter | None = None  # while the cases were measured
    memory: tuple[MemoryBlock, ...] = ()  # of the start and of each case's phases

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
        return judge(
            Evidence(
                kernels=profile.kernels,
                step_s=profile.step_s,
                roofline=roofline,
                context=main.num_prompt_tokens + main.case.num_output // 2,
                turns=[_turn(step, overlaps=self.max_in_flight > 1) for step in phases[DECODE]],
                prefill_s=sum(step.device_s for step in phases[PREFILL]),
                decode_s=sum(step.device_s for step in phases[DECODE]),
                interpreter=self.interpreter,
                profiled_s=profile.timed_inside_s,
                served_s=main.token_s,
                doubt="" if main.trust is None else main.trust.doubt,
            )
        )


def _turn(step: StepTimes, *, overlaps: bool) -> Turn:
    """An instrumented step as a turn. overlaps: when serving, the host works on the next step at the same time."""
    device_s = step.device_s
    host_s = sum(took.wall_s for took in step.parts.values()) - device_s
    return Turn(max(host_s, device_s) if overlaps else host_s + device_s, device_s)


def sum_stages(cases: Sequence[CaseResult]) -> list[StageTimes]:
    """The stages of several cases together, in the order in which a request passes them."""
    wall_s = sum(case.wall_s for case in cases)
    pooled: dict[str, list[Took]] = {name: [] for name in STAGES}
    for case in cases:
        for name, values in case.samples.items():
            pooled[name] += values
    out = []
    for name, values in pooled.items():
        components: dict[str, float] = {}
        if name in (PREFILL, DECODE):
            each = [case.components(name) for case in cases]
            components = {key: sum(one[key] for one in each) for key in each[0]}
        total_s = sum(value.wall_s for value in values)
        spread = Spread.of([value.wall_s for value in values]) if values else None
        has_cpu = values and name not in DEVICE_STAGES
        cpu = Spread.of([value.cpu_s for value in values]) if has_cpu else None
        share = total_s / wall_s
        out.append(StageTimes(name=name, spread=spread, total_s=total_s, share=share, cpu=cpu, components=components))
    return out


def time_per_token(request: RequestTimes) -> float:
    """Seconds of each token after the first."""
    return (request.token_s[-1] - request.token_s[0]) / (len(request.token_s) - 1)


def residual_share(cases: Sequence[CaseResult]) -> float:
    """Share of the wall time that no stage accounts for."""
    return 1 - sum(stage.share for stage in sum_stages(cases))
