"""Time one step of a model kernel by kernel: a synthetic plan, passed directly to the runner, over a filled pool."""

from __future__ import annotations

import dataclasses
import statistics
import threading
import time

from tinyvllm.bench.environment import describe_environment
from tinyvllm.bench.latency import Case, LatencyWork, make_requests, prefill_plans
from tinyvllm.bench.subject import Subject
from tinyvllm.execution.inspector import RunnerInspector
from tinyvllm.execution.runner import ModelRunner
from tinyvllm.profiling import measure
from tinyvllm.profiling.chips import Chip, guess_chip, measured_chip
from tinyvllm.profiling.interpreter import RARE_PROBES_S, Watch
from tinyvllm.profiling.profile_report import ProfileReport
from tinyvllm.profiling.roofline import Roofline
from tinyvllm.profiling.verdict import Evidence, Turn, judge
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
    turns, packs_s, watch = [], [], Watch(RARE_PROBES_S)
    for number in range(work.num_warmup + work.num_repeats):
        start = time.perf_counter()
        with measure.span(measure.STEP, kind=case.phase):
            output = runner.execute(plan)
        if number >= work.num_warmup:
            turns.append(Turn(whole_s=time.perf_counter() - start, device_s=output.device_s))
            packs_s.append(output.pack_s)
    interpreter = watch.stop()
    profile = inspector.profile(plan, repeats=work.num_repeats, warmup=work.num_warmup)
    cost = inspector.cost(plan, profile.experts)
    flops = sum(kernel.flops or 0 for kernel in profile.kernels)
    roofline = Roofline(find_hardware(inspector, chip), cost.nbytes, flops, profile.step_s)
    context = max(entry.start for entry in plan.entries)
    findings = judge(
        Evidence(
            kernels=profile.kernels,
            step_s=profile.step_s,
            roofline=roofline,
            context=context,
            turns=turns,
            between_s=profile.between_s,
            interpreter=interpreter,
            engine_thread=threading.current_thread().name,
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
        turn_s=statistics.median(turn.whole_s for turn in turns),
        host_s=statistics.median(turn.host_s for turn in turns),
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
