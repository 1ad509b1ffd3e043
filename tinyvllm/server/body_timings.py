"""`timings` in the body of an answer, in the form of llama.cpp's server, for requests with `timings_per_token`."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from pydantic import BaseModel, Field

if TYPE_CHECKING:
    from tinyvllm.server.request_times import RequestTimes


class Timings(BaseModel):
    """`prompt_*`: from the end of the queue until the first token; `predicted_*`: since then. Times in ms.

    The fields are those of llama.cpp (`tools/server/README.md`), and `queue_ms`. With several choices, those of the one
    that is followed (`request_times.py`); the numbers of tokens are those of all prompts and choices."""

    cache_n: int  # prompt tokens found in the prefix cache
    prompt_n: int  # prompt tokens that were computed
    prompt_ms: float
    prompt_per_token_ms: float
    prompt_per_second: float
    predicted_n: int
    predicted_ms: float
    predicted_per_token_ms: float
    predicted_per_second: float
    queue_ms: float
    # Draft tokens that were verified, and those accepted: in the last timings, and only if there were any. llama.cpp's
    draft_n: int | None = Field(default=None, exclude_if=lambda value: value is None)
    draft_n_accepted: int | None = Field(default=None, exclude_if=lambda value: value is None)


def timings_of(times: RequestTimes, num_predicted: int | None = None) -> Timings | None:
    """The timings so far; None before the first token. num_predicted: output tokens so far, of an unfinished answer."""
    timing = times.timing
    if timing is None:
        return None
    scheduled_s = timing.queued_s + timing.queue.total_s if timing.queue is not None else timing.scheduled_s
    scheduled_s = min(scheduled_s, timing.first_token_s)
    end_s = timing.last_token_s if times.finish_reason is not None else time.monotonic()
    prompt_n = times.num_prompt_tokens - times.num_cached_tokens
    predicted_n = times.num_output_tokens if num_predicted is None else num_predicted
    prompt_ms = (timing.first_token_s - scheduled_s) * 1e3
    predicted_ms = (end_s - timing.first_token_s) * 1e3
    return Timings(
        cache_n=times.num_cached_tokens,
        prompt_n=prompt_n,
        prompt_ms=prompt_ms,
        prompt_per_token_ms=_over(prompt_ms, prompt_n),
        prompt_per_second=_over(1e3 * prompt_n, prompt_ms),
        predicted_n=predicted_n,
        predicted_ms=predicted_ms,
        predicted_per_token_ms=_over(predicted_ms, predicted_n),
        predicted_per_second=_over(1e3 * predicted_n, predicted_ms),
        queue_ms=(scheduled_s - timing.queued_s) * 1e3,
        draft_n=times.num_drafted or None,
        draft_n_accepted=times.num_accepted if times.num_drafted else None,
    )


def _over(value: float, divisor: float) -> float:
    """The ratio, or 0 in place of infinity, which JSON does not have."""
    return value / divisor if divisor > 0 else 0.0
