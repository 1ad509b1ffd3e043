"""Where one HTTP request's time goes, from its head to the end of its answer: always on, from a few timestamps.

Before and after the engine, the server takes the timestamps itself. In between, the engine reports what its thread did
(`engine/step_clock.py`). The stages follow each other without gaps, so they add up to the request's whole time. Of
several choices, the one whose last token came last is followed. `Server-Timing`, `timings` in a body and `tinyvllm why`
all come from here.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tinyvllm.profiling.measure import (
    ADMISSION,
    CAPTURE,
    COMMIT,
    DETOKENIZE,
    DRAFT,
    HOP_BACK,
    PACK,
    QUEUE,
    SCHEDULE,
    SEND,
    TEMPLATE,
    TOKENIZE,
    TOKENS,
)
from tinyvllm.profiling.request_stages import DECODE, HOP, LOOP, OTHERS, PARSE, PREFILL

if TYPE_CHECKING:
    from tinyvllm.engine.output import Delta, Timing
    from tinyvllm.engine.step_clock import Parts

RELAY, ENGINE = "relay", "engine"
# The phases of a request. `RUN`: a request that the engine did not divide, such as an embedding.
ARRIVAL, WAITING, FIRST, REST, RUN, DELIVERY = "arrival", "queue", "first token", "further tokens", "run", "delivery"
_WORK = (DRAFT, SCHEDULE, PACK, PREFILL, OTHERS, DECODE, TOKENS, COMMIT, CAPTURE, LOOP)  # the fields of Parts
# Every stage, in the order of time; within a phase of the engine the stages take turns.
STAGES: tuple[tuple[str, str], ...] = (
    *((ARRIVAL, stage) for stage in (RELAY, PARSE, TEMPLATE, TOKENIZE, ADMISSION, HOP)),
    *((WAITING, stage) for stage in (QUEUE, *_WORK)),  # the first if the engine has not told what it did
    *((FIRST, stage) for stage in _WORK),
    *((REST, stage) for stage in _WORK),
    (RUN, ENGINE),
    *((DELIVERY, stage) for stage in (HOP_BACK, DETOKENIZE, SEND)),
)
_PLACE = {stage: place for place, stage in enumerate(STAGES)}
_HOST = frozenset((SCHEDULE, PACK, COMMIT, LOOP))


@dataclass(slots=True)
class RequestTimes:
    """Timestamps of one request, by time.perf_counter, and durations in seconds."""

    head_s: float = field(default_factory=time.perf_counter)
    relayed_s: float | None = None  # it was passed on to another server of ours, which measures the rest
    body_s: float | None = None  # the body is a checked object
    template_s: float = 0.0
    tokenize_s: float = 0.0
    engine_s: float | None = None  # the engine was asked
    result_s: float | None = None  # it has answered a question that has no tokens
    taken_s: float = 0.0  # the latest output, as text
    timing: Timing | None = None  # of the choice that is followed
    call_ids: list[str] = field(default_factory=list)  # the engine's ids of its calls
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0  # of all choices
    num_drafted: int = 0  # draft tokens that were verified, of all choices that have ended
    num_accepted: int = 0  # of these, those that were accepted
    finish_reason: str | None = None

    @property
    def has_call(self) -> bool:
        """Whether the engine was asked."""
        return self.engine_s is not None

    def begin(self, body_s: float) -> None:
        """The engine is asked next; the body was read at `body_s`."""
        if self.engine_s is None:
            self.body_s, self.engine_s = max(self.head_s, body_s), time.perf_counter()

    def add(self, name: str, seconds: float) -> None:
        """Note the duration of a part of the request's reading."""
        if name == TEMPLATE:
            self.template_s += seconds
        elif name == TOKENIZE:
            self.tokenize_s += seconds

    def note(self, delta: Delta, now_s: float) -> None:
        """Take the first or the last output of a choice."""
        timing = delta.timing
        if timing is None:
            return
        is_first = delta.num_output_tokens <= len(delta.token_ids)
        if is_first and delta.index == 0:  # the choices of a prompt share it
            self.num_prompt_tokens += delta.num_prompt_tokens
            self.num_cached_tokens += delta.num_cached_tokens
        if delta.finish_reason is not None:
            self.num_output_tokens += delta.num_output_tokens
            self.num_drafted += timing.num_drafted
            self.num_accepted += timing.num_accepted
            self.finish_reason = delta.finish_reason
        if self.timing is None or timing.last_token_s >= self.timing.last_token_s:
            self.timing, self.taken_s = timing, now_s

    def divide(self, now_s: float) -> array[float]:
        """The seconds of each of STAGES, from the head until now. All are at least 0, and add up to the whole time."""
        divider = _Divider(self.head_s)
        if self.relayed_s is not None:
            divider.until(ARRIVAL, RELAY, self.relayed_s)
            return divider.seconds
        divider.until(ARRIVAL, PARSE, now_s if self.body_s is None else self.body_s)
        if self.engine_s is not None:
            submitted_s = self.engine_s if self.timing is None else self.timing.submitted_s
            divider.take(ARRIVAL, TEMPLATE, self.template_s, submitted_s)
            divider.take(ARRIVAL, TOKENIZE, self.tokenize_s, submitted_s)
            divider.until(ARRIVAL, ADMISSION, submitted_s)
            if self.timing is not None:
                self._divide_engine(divider, self.timing)
            else:
                divider.until(RUN, ENGINE, now_s if self.result_s is None else self.result_s)
        divider.until(DELIVERY, SEND, now_s)
        return divider.seconds

    def _divide_engine(self, divider: _Divider, timing: Timing) -> None:
        divider.until(ARRIVAL, HOP, timing.queued_s)
        first_s, last_s = timing.first_token_s, timing.last_token_s
        scheduled_s = min(timing.scheduled_s, first_s)
        if timing.queue is not None:
            scheduled_s = timing.queued_s + timing.queue.total_s
        divider.work(WAITING, QUEUE, timing.queue, scheduled_s)
        divider.work(FIRST, PREFILL, timing.prefill, first_s)
        divider.work(REST, DECODE, timing.decode, last_s)
        if timing.received_s:
            divider.until(DELIVERY, HOP_BACK, timing.received_s)
        divider.until(DELIVERY, DETOKENIZE, self.taken_s)


class _Divider:
    """Assigns the time since `place_s` to stages, one after another."""

    def __init__(self, place_s: float) -> None:
        self.seconds = array("d", bytes(8 * len(STAGES)))
        self._place_s = place_s

    def until(self, phase: str, stage: str, end_s: float) -> None:
        """Assign the time until `end_s` to the stage; nothing if `end_s` is in the past."""
        if end_s > self._place_s:
            self.seconds[_PLACE[phase, stage]] += end_s - self._place_s
            self._place_s = end_s

    def take(self, phase: str, stage: str, seconds: float, limit_s: float) -> None:
        """Assign the next `seconds` to the stage, but only until `limit_s`."""
        self.until(phase, stage, min(self._place_s + seconds, limit_s))

    def work(self, phase: str, whole: str, parts: Parts | None, end_s: float) -> None:
        """Divide the time until `end_s` as the engine reported; without parts, assign it to the stage `whole`."""
        passed_s = end_s - self._place_s
        total_s = 0.0 if parts is None else parts.total_s
        if parts is None or total_s <= 0.0 or passed_s <= 0.0:
            self.until(phase, whole, end_s)
            return
        scale = passed_s / total_s  # 1, except for rounding of the clocks
        for stage, name in zip(_WORK, parts.__struct_fields__, strict=True):
            self.seconds[_PLACE[phase, stage]] += getattr(parts, name) * scale
        self._place_s = end_s


def summarize(seconds: Sequence[float]) -> dict[str, float]:
    """The seconds of each stage that is not empty, by name, in order of time. Phases are merged: all time in the queue
    is `queue`, and the engine's work around steps is `host`."""
    sums: dict[str, float] = {}
    for (phase, stage), spent_s in zip(STAGES, seconds, strict=True):
        if spent_s > 0.0:
            name = QUEUE if phase == WAITING else "host" if stage in _HOST else stage
            sums[name] = sums.get(name, 0.0) + spent_s
    return sums


def server_timing(times: RequestTimes, now_s: float) -> str:
    """The value of a `Server-Timing` field (https://www.w3.org/TR/server-timing/): the stages so far, and their total,
    in ms."""
    stages = summarize(times.divide(now_s))
    if times.relayed_s is None:
        stages["total"] = now_s - times.head_s
    return ", ".join(f"{name.replace(' ', '-')};dur={spent_s * 1e3:.3f}" for name, spent_s in stages.items())
