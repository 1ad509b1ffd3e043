"""A breakdown as JSON values. docs/PROFILING.md describes the fields."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from tinyvllm.bench.breakdown import Breakdown, CaseResult, residual_share, sum_stages, time_per_token
from tinyvllm.bench.rows import Machine
from tinyvllm.bench.spread import Spread
from tinyvllm.bench.stages import DEVICE_STAGES, PlainRound, RequestTimes, Round
from tinyvllm.bench.token_table import token_rows
from tinyvllm.profiling.kernels import tabulate
from tinyvllm.profiling.request_stages import DECODE, PREFILL

SCHEMA = 3  # of the JSON: raised when a field changes its name or meaning


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
        "settings": breakdown.machine.settings,
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
        "memory": [block.as_json() for block in breakdown.memory],
        "main_case": breakdown.main.case.name,
        "tokens": [row.as_json() for row in token_rows(breakdown.main)],
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
    return {
        "name": result.case.name,
        "batch": result.case.batch,
        "prompt_tokens": result.num_prompt_tokens,
        "output_tokens": result.case.num_output,
        "wall_s": _spread_json(walls),
        "plain_wall_s": _spread_json(plain),
        "residual_share": residual_share([result]),
        "repeats": len(result.rounds),
        "trust": None if result.trust is None else result.trust.as_json(),
        "ttft_s": _of_requests(result.plain, lambda request: request.token_s[0]),
        "tpot_s": _of_requests(result.plain, time_per_token),
        "queue_wait_s": _of_requests(result.rounds, lambda request: request.waited_s),
        "stages": _stages_json(result),
        "sampling_share": result.sampling_shares,
        "per_step": {phase: counts.as_json() for phase, counts in result.counts.items()},
        "kernels": _kernels_json(breakdown, result, DECODE),
        "prefill_kernels": _kernels_json(breakdown, result, PREFILL),
        "experts": {phase: [load.as_json() for load in one.experts] for phase, one in result.profiles.items()},
    }


def _kernels_json(breakdown: Breakdown, result: CaseResult, phase: str) -> list[dict[str, object]]:
    """The kernels of a phase's largest step by operation, the longest first."""
    profile = result.profiles.get(phase)
    return [] if profile is None else [row.as_json() for row in tabulate(profile.kernels, chip=breakdown.chip)]


def _stages_json(result: CaseResult) -> dict[str, Any]:
    """The stages of one case. `by_repeat`: of each repeat the median, and for a stage of the host the mean of its
    thread's processor time, which varies less."""
    stages = {stage.name: stage.as_json() for stage in sum_stages([result])}
    for one in result.rounds:
        for name, values in result.samples_of(one).items():
            if not values:
                continue
            row = {"median_s": statistics.median(value.wall_s for value in values)}
            if name not in DEVICE_STAGES:
                row["cpu_mean_s"] = statistics.fmean(value.cpu_s for value in values)
            stages[name].setdefault("by_repeat", []).append(row)
    return stages


def _of_requests(
    repeats: Sequence[Round] | Sequence[PlainRound], seconds: Callable[[RequestTimes], float]
) -> dict[str, Any]:
    """The spread over all requests, and the mean of each repeat's."""
    groups = [[seconds(request) for request in one.requests] for one in repeats]
    spread = Spread.of([value for group in groups for value in group])
    return _spread_json(spread) | {"by_repeat": [statistics.fmean(group) for group in groups]}


def _spread_json(spread: Spread) -> dict[str, Any]:
    return dataclasses.asdict(spread)
