"""The latest requests and where their time went: a ring that is always on, for `tinyvllm why` and GET /requests."""

from __future__ import annotations

import heapq
import time
from array import array
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from msgspec import Struct
from pydantic import BaseModel

from tinyvllm.profiling.measure import CAPTURE, COMMIT, DRAFT, PACK, SCHEDULE, TOKENS
from tinyvllm.profiling.request_stages import DECODE, LOOP, OTHERS, PREFILL
from tinyvllm.server.request_times import (
    ARRIVAL,
    DELIVERY,
    FIRST,
    RELAY,
    REST,
    RUN,
    STAGES,
    WAITING,
    RequestTimes,
)

MAX_RECORDS = 1024  # about a kilobyte each
MAX_IDS = 4  # kept for one request, of the ids of its calls to the engine
MAX_LISTED = 1000
_HOST = (SCHEDULE, PACK, TOKENS, COMMIT, LOOP)


class RequestStage(BaseModel):
    phase: str
    stage: str
    ms: float


class RequestVerdict(BaseModel):
    """The largest part of a request's time."""

    name: str
    share: float
    because: str


class RequestSummary(BaseModel):
    id: str  # the header x-request-id
    call_ids: list[str]  # the answer's id, with the number of a prompt if there are several
    route: str
    status: int
    started_at: float  # seconds since 1970
    total_ms: float
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int  # of all choices
    finish_reason: str | None
    verdict: RequestVerdict


class RequestWaterfall(RequestSummary):
    """One request's time by stage, in order of time; within a phase of the engine, stages alternate. They add up to the
    total."""

    process: str | None  # the front-end that answered
    chunks: int  # steps that computed a part of the prompt
    preemptions: int
    draft_tokens: int  # that were verified
    accepted_tokens: int  # of these
    stages: list[RequestStage]


class RequestList(BaseModel):
    requests: list[RequestSummary]


class RequestRecord(Struct, gc=False):
    """One answered request. `seconds`: of each of STAGES, as bytes of an array of doubles."""

    http_id: str
    call_ids: tuple[str, ...]
    route: str
    status: int
    started_at: float
    total_s: float
    seconds: bytes
    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int
    finish_reason: str | None
    num_chunks: int
    num_preemptions: int
    num_drafted: int
    num_accepted: int

    def stages(self) -> Iterator[tuple[str, str, float]]:
        """Phase, stage and seconds of all stages that are not empty."""
        for (phase, stage), seconds in zip(STAGES, array("d", self.seconds), strict=True):
            if seconds > 0.0:
                yield phase, stage, seconds

    def is_called(self, name: str) -> bool:
        """Whether `name` is the request's id, or that of its answer."""
        return name == self.http_id or any(one == name or one.startswith(f"{name}-") for one in self.call_ids)

    def summary(self) -> dict[str, Any]:
        return {
            "id": self.http_id,
            "call_ids": list(self.call_ids),
            "route": self.route,
            "status": self.status,
            "started_at": self.started_at,
            "total_ms": self.total_s * 1e3,
            "prompt_tokens": self.num_prompt_tokens,
            "cached_tokens": self.num_cached_tokens,
            "output_tokens": self.num_output_tokens,
            "finish_reason": self.finish_reason,
            "verdict": judge_request(list(self.stages()), self.total_s).model_dump(),
        }

    def waterfall(self, process: str | None) -> dict[str, Any]:
        stages = [{"phase": phase, "stage": stage, "ms": seconds * 1e3} for phase, stage, seconds in self.stages()]
        return self.summary() | {
            "process": process,
            "chunks": self.num_chunks,
            "preemptions": self.num_preemptions,
            "draft_tokens": self.num_drafted,
            "accepted_tokens": self.num_accepted,
            "stages": stages,
        }


class RequestLog:
    """Owns the records of one front-end."""

    def __init__(self, max_records: int = MAX_RECORDS) -> None:
        self._records: deque[RequestRecord] = deque(maxlen=max_records)

    def __len__(self) -> int:
        return len(self._records)

    def add(self, http_id: str, times: RequestTimes, route: str, status: int) -> None:
        """Keep a request that has just been answered."""
        now_s, timing = time.perf_counter(), times.timing
        total_s = now_s - times.head_s
        record = RequestRecord(
            http_id=http_id,
            call_ids=tuple(times.call_ids[:MAX_IDS]),
            route=route,
            status=status,
            started_at=time.time() - total_s,
            total_s=total_s,
            seconds=times.divide(now_s).tobytes(),
            num_prompt_tokens=times.num_prompt_tokens,
            num_cached_tokens=times.num_cached_tokens,
            num_output_tokens=times.num_output_tokens,
            finish_reason=times.finish_reason,
            num_chunks=0 if timing is None else timing.num_chunks,
            num_preemptions=0 if timing is None else timing.num_preemptions,
            num_drafted=times.num_drafted,
            num_accepted=times.num_accepted,
        )
        self._records.append(record)

    def find(self, name: str) -> RequestRecord | None:
        """The latest request of that name."""
        return next((record for record in reversed(self._records) if record.is_called(name)), None)

    def select(self, num: int, *, slowest: bool) -> list[dict[str, Any]]:
        """Summaries of the latest or the slowest requests, the latest or slowest first."""
        if slowest:
            chosen = heapq.nlargest(num, self._records, key=lambda record: record.total_s)
        else:
            chosen = [record for _, record in zip(range(num), reversed(self._records), strict=False)]
        return [record.summary() for record in chosen]


def merge(lists: Iterable[Sequence[dict[str, Any]]], num: int, *, slowest: bool) -> list[dict[str, Any]]:
    """The selections of several processes as one."""
    key = "total_ms" if slowest else "started_at"
    return heapq.nlargest(num, (one for each in lists for one in each), key=lambda summary: float(summary[key]))


def judge_request(stages: Sequence[tuple[str, str, float]], total_s: float) -> RequestVerdict:
    """What most of the time went to."""

    def spent_s(phases: Iterable[str], names: Iterable[str] | None = None) -> float:
        phases, names = set(phases), None if names is None else set(names)
        return sum(s for phase, stage, s in stages if phase in phases and (names is None or stage in names))

    work = (FIRST, REST)
    in_queue = ", ".join(f"{stage} {_ms(s)}" for phase, stage, s in stages if phase == WAITING and s > 0.01 * total_s)
    causes = {
        "waiting for the model": (spent_s([ARRIVAL], [RELAY]), "until the request was passed on to the model's server"),
        "reading the request": (
            spent_s([ARRIVAL]) - spent_s([ARRIVAL], [RELAY]),
            "until the engine had it: " + _longest(stages, ARRIVAL),
        ),
        "queue": (spent_s([WAITING]), f"it waited for a place in a step, while the engine did: {in_queue}"),
        "other prompts": (spent_s(work, [OTHERS]), "steps for prompts of other requests came between its own"),
        "own prompt": (spent_s(work, [PREFILL]), "steps that computed its own prompt"),
        "decoding": (spent_s(work, [DECODE]), "steps that only decode, on the device"),
        "drafting": (spent_s(work, [DRAFT]), "the engine guessed tokens for its steps to verify"),
        "capturing graphs": (spent_s(work, [CAPTURE]), "the engine traced and captured graphs between steps"),
        "host": (spent_s(work, _HOST), "the engine's own work around the steps: " + _longest(stages, *work)),
        "engine": (spent_s([RUN]), "the engine computed it"),
        "delivery": (spent_s([DELIVERY]), "after its last token: " + _longest(stages, DELIVERY)),
    }
    name, (seconds, why) = max(causes.items(), key=lambda cause: cause[1][0])
    share = seconds / total_s if total_s > 0.0 else 0.0
    return RequestVerdict(name=name, share=share, because=f"{_ms(seconds)} of {_ms(total_s)}: {why}")


def _longest(stages: Sequence[tuple[str, str, float]], *phases: str) -> str:
    """The longest stage of some phases outside the device, in words."""
    found = [
        (s, stage) for phase, stage, s in stages if phase in phases and stage not in (PREFILL, DECODE, OTHERS, RELAY)
    ]
    seconds, stage = max(found, default=(0.0, "nothing"))
    return f"mostly {stage}, {_ms(seconds)}"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.1f} ms"
