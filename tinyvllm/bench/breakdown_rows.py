"""A breakdown as rows under llama-bench's names."""

from __future__ import annotations

from tinyvllm.bench.breakdown import Breakdown, CaseResult
from tinyvllm.bench.rows import Row
from tinyvllm.bench.spread import Spread
from tinyvllm.execution.buckets import Bucket
from tinyvllm.profiling.request_stages import DECODE, PREFILL


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
    whole = Bucket.decode(result.case.batch).name  # or the same for short contexts
    is_whole = phase == DECODE and cost is not None and f"{cost.bucket} ".startswith(f"{whole} ")
    return Row(
        test=name,
        phase=phase,
        batch=result.case.batch,
        context=result.num_prompt_tokens if phase == DECODE else 0,
        num_tokens=result.case.num_output if phase == DECODE else result.num_prompt_tokens,
        machine=breakdown.machine,
        tok_s=Spread.of(rates),
        step_ms=Spread.of(steps_ms),
        trust=result.trust,
        bucket=None if cost is None else cost.bucket,
        kernels=None if counts is None else counts.kernels,
        nbytes=cost.nbytes if cost is not None and is_whole else None,
        moved_bytes=cost.moved_bytes if cost is not None and is_whole else None,
    )
