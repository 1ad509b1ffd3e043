"""A breakdown as JSON values. docs/PROFILING.md describes the fields."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from tinyvllm.bench.breakdown import Breakdown, CaseResult, residual_share, sum_stages
from tinyvllm.bench.rows import Machine
from tinyvllm.bench.spread import Spread
from tinyvllm.bench.stages import DECODE, PREFILL
from tinyvllm.profiling.kernels import tabulate

SCHEMA = 2  # of the JSON: raised when a field changes its name or meaning


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
        "experts": {phase: [load.as_json() for load in one.experts] for phase, one in result.profiles.items()},
    }


def _spread_json(spread: Spread) -> dict[str, Any]:
    return dataclasses.asdict(spread)
