"""Time one step of a model kernel by kernel: a synthetic plan, passed directly to the runner, over a filled pool."""

from __future__ import annotations

import dataclasses
import statistics
import threading
import time
from collections.abc import Sequence

from tinyvllm.bench.counts import limits_of_a_step
from tinyvllm.bench.environment import describe_environment
from tinyvllm.bench.estimate import Estimate
from tinyvllm.bench.latency import Case, LatencyWork, make_requests, prefill_plans
from tinyvllm.bench.subject import Subject
from tinyvllm.bench.trust import ConditionsWatch
from tinyvllm.execution.inspector import RunnerInspector
from tinyvllm.execution.runner import ModelRunner
from tinyvllm.profiling import measure
from tinyvllm.profiling.chips import Chip, guess_chip, measured_chip
from tinyvllm.profiling.interpreter import RARE_PROBES_S, Interpreter, Watch
from tinyvllm.profiling.kernels import join_steps
from tinyvllm.profiling.profile_report import ProfileReport
from tinyvllm.profiling.roofline import Roofline, raise_roof
from tinyvllm.profiling.verdict import Evidence, Turn, judge
from tinyvllm.scheduling.plan import Scheduled, StepPlan

PROMPT = 32  # tokens of the prompt from which two backends generate


def find_hardware(inspector: RunnerInspector, given: Chip | None) -> Chip:
    """The given chip, else the one in the device's name, else one with rates measured now."""
    hardware = inspector.hardware
    if chip := given or guess_chip(hardware, inspector.gpu_cores):
        return chip
    kind = inspector.runner.device.split(":")[0]
    return measured_chip(hardware, inspector.measure_bandwidth(), inspector.measure_flops(), kind)


def find_bandwidth(inspector: RunnerInspector) -> float:
    """GB/s of the memory of the chip in the device's name, else as measured now."""
    chip = guess_chip(inspector.hardware, inspector.gpu_cores)
    return inspector.measure_bandwidth() / 1e9 if chip is None else chip.bandwidth_gbps


def profile_case(inspector: RunnerInspector, subject: Subject, work: LatencyWork, chip: Chip | None) -> ProfileReport:
    """Time the single case of `work`: its kernels, the step as served, and the step with the host's work.

    Of a prompt that takes several steps, all are profiled and added up."""
    (case,), runner = work.cases, inspector.runner
    inspector.fill_pool(1 + work.num_blocks(case, runner.capacity.block_size), work.seed)
    plans, conditions = _plans(runner, work, case), ConditionsWatch()
    with conditions:
        turned = _run_turns(runner, plans, work)
    counts = _counts(inspector, plans)
    with conditions:
        steps = [inspector.profile(plan, repeats=work.num_repeats, warmup=work.num_warmup) for plan in plans]
    costs = [inspector.cost(plan, step.experts) for plan, step in zip(plans, steps, strict=True)]
    profile, nbytes = join_steps(steps), sum(cost.nbytes for cost in costs)
    trust = conditions.trust(Estimate.of_values(profile.steps_s))
    flops = sum(kernel.flops or 0 for kernel in profile.kernels)
    found = raise_roof(find_hardware(inspector, chip), profile.kernels)
    roofline = Roofline(found, nbytes, flops, profile.step_s)
    context = max(entry.start for entry in plans[0].entries)
    findings = judge(
        Evidence(
            kernels=profile.kernels,
            step_s=profile.step_s,
            roofline=roofline,
            context=context,
            turns=turned.turns,
            between_s=profile.between_s,
            interpreter=turned.interpreter,
            engine_thread=threading.current_thread().name,
            profiled_s=profile.timed_inside_s,
            doubt=trust.doubt,
        )
    )
    return ProfileReport(
        model=subject.name,
        dtype=inspector.weights.dtype,
        hardware=inspector.hardware,
        phase=case.phase,
        batch=case.batch,
        context=context,
        profile=profile,
        roofline=roofline,
        findings=tuple(findings),
        turn_s=statistics.median(turn.whole_s for turn in turned.turns),
        host_s=statistics.median(turn.host_s for turn in turned.turns),
        pack_s=statistics.median(turned.packs_s),
        moved_bytes=sum(cost.moved_bytes for cost in costs),
        num_repeats=work.num_repeats,
        counts=counts,
        limits=limits_of_a_step(
            counts["kernels"], num_layers=runner.model_config.num_layers, num_cores=inspector.num_cores
        ),
        program_limits=_program_limits(inspector),
        trust=trust.as_json(),
        environment=describe_environment(work.seed),
    )


@dataclasses.dataclass(frozen=True)
class _Turns:
    """Steps with the host's work, the seconds of packing in each, and who held the interpreter lock meanwhile."""

    turns: list[Turn]
    packs_s: list[float]
    interpreter: Interpreter


def _run_turns(runner: ModelRunner, plans: Sequence[StepPlan], work: LatencyWork) -> _Turns:
    turns, packs_s, watch = [], [], Watch(RARE_PROBES_S)
    for number in range(work.num_warmup + work.num_repeats):
        start = time.perf_counter()
        with measure.span(measure.STEP, kind=work.cases[0].phase):
            outputs = [runner.execute(plan) for plan in plans]
        if number >= work.num_warmup:
            whole_s = time.perf_counter() - start
            turns.append(Turn(whole_s=whole_s, device_s=sum(output.device_s for output in outputs)))
            packs_s.append(sum(output.pack_s for output in outputs))
    return _Turns(turns, packs_s, watch.stop())


def greedy_tokens(runner: ModelRunner, num_tokens: int, seed: int) -> list[int]:
    """At most `num_tokens` tokens that the runner generates from a prompt of random ids, which depends on the seed."""
    room = runner.capacity.max_model_len
    num_tokens = max(1, min(num_tokens, room // 2))
    case = Case("decode", 1, max(1, min(PROMPT, room - num_tokens - 1)))
    work = dataclasses.replace(LatencyWork((case,)), num_decoded=num_tokens, seed=seed)
    (request,) = make_requests(runner, work, case)
    for plan in prefill_plans([request], runner.capacity.max_num_batched_tokens):
        tokens = runner.execute(plan).token_ids
    request.output_ids.append(tokens[0])
    while len(request.output_ids) < num_tokens:
        plan = StepPlan((Scheduled(request, request.num_tokens - 1, 1),))
        request.output_ids.append(runner.execute(plan).token_ids[0])
    return list(request.output_ids)


def _counts(inspector: RunnerInspector, plans: Sequence[StepPlan]) -> dict[str, int]:
    """The counts of a step; of several steps, the maximum of each."""
    found = []
    with inspector.account() as account:
        for plan in plans:
            account.take()
            inspector.runner.execute(plan)
            found.append(account.take().numbers)
    return {name: max(counts[name] for counts in found) for name in found[0]}


def _program_limits(inspector: RunnerInspector) -> list[str]:
    """How much of the device's limits the largest programs use, in one line; [] of a device without such limits."""
    device = inspector.runner.device
    limits, programs = inspector.program_limits, inspector.programs()
    if limits is None or not programs:
        return []
    return [
        f"{device.split(':')[0]}'s limits of a program: at most {max(one.arguments for one in programs)} of "
        f"{limits.arguments} arguments, {max(one.threads for one in programs):,} of {limits.threads:,} threads, "
        f"{max(one.shared_bytes for one in programs):,} of {limits.shared_bytes:,} bytes of threadgroup memory"
    ]


def _plans(runner: ModelRunner, work: LatencyWork, case: Case) -> list[StepPlan]:
    """One decode step, or the steps of a prompt."""
    requests = make_requests(runner, work, case)
    if case.phase == "decode":
        return [StepPlan(tuple(Scheduled(request, request.num_tokens - 1, 1) for request in requests))]
    return list(prefill_plans(requests, runner.capacity.max_num_batched_tokens))


def one_case(case: Case, *, repeats: int, warmup: int, seed: int) -> LatencyWork:
    """The work of one case, with room in the pool for the step that is repeated."""
    return dataclasses.replace(LatencyWork((case,)), num_decoded=1, num_repeats=repeats, num_warmup=warmup, seed=seed)
