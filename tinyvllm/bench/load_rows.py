"""The figures of a level of load.

The metrics are vLLM's: TTFT is the time to the first piece of text, TPOT the remaining time divided by the number of
tokens after the first, ITL every gap between two pieces of text, and E2E the time to the last piece. Two more show how
smooth the stream is: the pieces of text per answer, which are fewer than its tokens if the server merges them, and the
gaps between network reads that carried text, which are longer than ITL if it sends events in lumps.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from tinyvllm.bench.estimate import Estimate
from tinyvllm.bench.load import Load, LoadWork, Target
from tinyvllm.bench.load_answers import Answer, Share
from tinyvllm.bench.spread import Spread
from tinyvllm.bench.trust import ConditionsWatch, Trust
from tinyvllm.errors import TinyvllmError


def summarize(
    target: Target, work: LoadWork, load: Load, shares: Sequence[Share], watch: ConditionsWatch | None = None
) -> dict[str, Any]:
    """The row of one level, which each share's process sent a part of. `watch`: has watched the machine meanwhile.

    Raises TinyvllmError if no request succeeded."""
    answers = [answer for share in shares for answer in share.answers]
    good = [answer for answer in answers if answer.error is None]
    errors = Counter(answer.error for answer in answers if answer.error is not None)
    if not good:
        raise TinyvllmError(f"all {len(answers)} requests to {target.url} failed: {errors.most_common(1)[0][0]}")
    duration_s = max(answer.text_s[-1] for answer in good) - min(answer.sent_s for answer in answers)
    num_input = sum(answer.num_input or 0 for answer in good)
    num_output = sum(answer.num_tokens for answer in good)
    num_kept = sum(answer.keeps(work.slo_ms) for answer in good) if work.slo_ms else None
    return {
        "kind": "load",
        "url": target.url,
        "api": target.api,
        "model": target.model,
        "rate": load.rate,
        "concurrency": load.concurrency,
        "requests": len(answers),
        "errors": dict(errors),
        "duration_s": duration_s,
        "request_s": len(good) / duration_s,
        "input_tokens": num_input,
        "output_tokens": num_output,
        "output_tok_s": num_output / duration_s,
        "total_tok_s": (num_input + num_output) / duration_s,
        "slo_ms": work.slo_ms,
        "goodput_request_s": None if num_kept is None else num_kept / duration_s,
        "goodput_share": None if num_kept is None else num_kept / len(answers),
        "ttft_ms": spread_of([answer.ttft_ms for answer in good]),
        "tpot_ms": spread_of([answer.tpot_ms for answer in good if answer.tpot_ms is not None]),
        "e2e_ms": spread_of([answer.e2e_ms for answer in good]),
        "server_ms": _server_parts(good),
        **_stream_figures(good, duration_s),
        **_generator_figures(shares, duration_s),
        "trust": None if watch is None else _trust(watch, good).as_json(),
    }


def _trust(watch: ConditionsWatch, good: Sequence[Answer]) -> Trust:
    """The trust in the time per token, or in the whole time if answers have one token. The server is another process,
    so the work of other processes does not lower the grade."""
    values = [answer.tpot_ms for answer in good if answer.tpot_ms is not None] or [answer.e2e_ms for answer in good]
    return watch.trust(Estimate.of_values(values), counts_others=False)


def _server_parts(good: Sequence[Answer]) -> dict[str, Any] | None:
    """Where the time went according to the server, by part, over all answers that report it. None if none does."""
    told = [answer.server_ms for answer in good if answer.server_ms]
    names = dict.fromkeys(name for one in told for name in one)
    return {name: spread_of([one.get(name, 0.0) for one in told]) for name in names} or None


def _stream_figures(good: Sequence[Answer], duration_s: float) -> dict[str, Any]:
    """Gaps and numbers of pieces of text."""
    num_events = [len(answer.text_s) for answer in good]
    times = [np.asarray(answer.text_s) for answer in good]
    return {
        "itl_ms": spread_of(np.concatenate([np.diff(one) for one in times]) * 1e3),
        "read_gap_ms": spread_of(np.concatenate([np.diff(np.unique(one)) for one in times]) * 1e3),
        "events": sum(num_events),
        "event_s": sum(num_events) / duration_s,
        "events_per_answer": spread_of(num_events),
    }


def _generator_figures(shares: Sequence[Share], duration_s: float) -> dict[str, Any]:
    """What the load itself cost: if a process was busy all the time, it has measured itself."""
    late_ms = np.concatenate([np.asarray(share.late_s) for share in shares]) * 1e3
    return {
        "load_processes": len(shares),
        "load_cpu_s": sum(share.cpu_s for share in shares),
        "load_busy_share": max(share.cpu_s for share in shares) / duration_s,  # of the busiest process
        "load_late_ms": spread_of(late_ms),  # open loop: how late requests were sent
    }


def spread_of(values: ArrayLike) -> dict[str, Any] | None:
    """A Spread as JSON values, computed with NumPy, because there may be millions of events. None without values."""
    array = np.asarray(values, dtype=np.float64)
    if not array.size:
        return None
    median, p95, p99 = np.percentile(array, [50, 95, 99])
    spread = Spread(
        count=array.size,
        mean=float(array.mean()),
        std=float(array.std(ddof=1)) if array.size > 1 else 0.0,
        median=float(median),
        min=float(array.min()),
        p95=float(p95),
        p99=float(p99),
    )
    return dataclasses.asdict(spread)
