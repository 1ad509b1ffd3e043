"""Time one step of a model kernel by kernel: a synthetic plan, passed directly to the runner, over a filled pool."""

from __future__ import annotations

import dataclasses
import statistics
import time

from tinyvllm.bench.environment import describe_environment
from tinyvllm.bench.latency import Case, LatencyWork, make_requests, prefill_plans
from tinyvllm.bench.subject import Subject
from tinyvllm.execution.inspector import RunnerInspector
from tinyvllm.execution.runner import ModelRunner
from tinyvllm.profiling import measure
from tinyvllm.profiling.chips import Chip, guess_chip, measured_chip
from tinyvllm.profiling.profile_report import ProfileReport
from tinyvllm.profiling.roofline import Roofline
from tinyvllm.profiling.verdict import Evidence, judge
from tinyvllm.scheduling.plan import Scheduled, StepPlan


def find_hardware(inspector: RunnerInspector, given: Chip | None) -> Chip:
    """The given chip, else the one in the device's name, else one with rates measured now."""
    hardware = inspector.hardware
    if chip := given or guess_chip(hardware):
        return chip
    kind = inspector.runner.device.split(":")[0]
    return measured_chip(hardware, inspector.measure_bandwidth(), inspector.measure_flops(), kind)


def profile_case(inspector: RunnerInspector, subject: Subject, work: LatencyWork, chip: Chip | None) -> ProfileReport:
    """Time the single case of `work`: its kernels, the step as served, and the step with the host's work.

    If a prompt takes several steps, the last one is profiled."""
    (case,), runner = work.cases, inspector.runner
    inspector.fill_pool(1 + work.num_blocks(case, runner.capacity.block_size), work.seed)
    plan = _plan(runner, work, case)
    turns_s, packs_s = [], []
    for number in range(work.num_warmup + work.num_repeats):
        start = time.perf_counter()
        with measure.span(measure.STEP, kind=case.phase):
            output = runner.execute(plan)
        if number >= work.num_warmup:
            turns_s.append(time.perf_counter() - start)
            packs_s.append(output.pack_s)
    profile = inspector.profile(plan, repeats=work.num_repeats, warmup=work.num_warmup)
    cost = inspector.cost(plan, profile.experts)
    flops = sum(kernel.flops or 0 for kernel in profile.kernels)
    roofline = Roofline(find_hardware(inspector, chip), cost.nbytes, flops, profile.step_s)
    turn_s = statistics.median(turns_s)
    context = max(entry.start for entry in plan.entries)
    findings = judge(Evidence(profile.kernels, profile.step_s, roofline, context, turn_s, profile.between_s))
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
        turn_s=turn_s,
        pack_s=statistics.median(packs_s),
        moved_bytes=cost.moved_bytes,
        num_repeats=work.num_repeats,
        environment=describe_environment(work.seed),
    )


def _plan(runner: ModelRunner, work: LatencyWork, case: Case) -> StepPlan:
    requests = make_requests(runner, work, case)
    if case.phase == "decode":
        return StepPlan(tuple(Scheduled(request, request.num_tokens - 1, 1) for request in requests))
    return prefill_plans(requests, runner.capacity.max_num_batched_tokens)[-1]


def one_case(case: Case, *, repeats: int, warmup: int, seed: int) -> LatencyWork:
    """The work of one case, with room in the pool for the step that is repeated."""
    return dataclasses.replace(LatencyWork((case,)), num_decoded=1, num_repeats=repeats, num_warmup=warmup, seed=seed)
