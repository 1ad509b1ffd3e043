"""Where the time of served requests went: recordings of all processes, put together to the stages of each request.

A request passes through threads and processes whose clocks are one, so the times that each of them has noted divide its
life into stages that do not overlap:

    accept     from the client's write until the front-end has its head         (only with the client's times)
    parse      its body arrives and becomes a checked object
    template   waits for a worker thread, and messages become text              (chats only)
    tokenize   text becomes ids; for a completion, with the wait for the worker thread
    admission  limits, parameters, a grammar's compilation, and the way back to the event loop
    hop        until the engine's loop takes the message: the engine reads between steps, so this contains the rest of
               the step that it was in
    queue      waits in the scheduler's queue, until a step includes the request
    draft, schedule, pack, prefill, decode, tokens, commit, capture, loop
               what the engine's thread does until the request's last token is known. Draft guesses tokens for a step
               to verify, on the host or with a draft model on the device; prefill is the device's other time until
               the first token, decode that after it; tokens turns sampled rows into token ids and logprobs; capture is
               work on a graph between two steps; loop is the time between the others, such as sending tokens
    hop back   until the front-end takes the message with the last token
    detokenize, serialize, send
               the last token's text and event, and the rest of the response
    transfer   until the client has read the last byte                          (only with the client's times)

Every earlier token also hops back and is detokenized, serialized and sent, but while the engine computes the next one.
That does not make the request longer, and is counted apart (`Delivery`). What no stage covers is the residual.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from tinyvllm.profiling.measure import (
    ADMISSION,
    ANSWER,
    CALL,
    CAPTURE,
    COMMIT,
    DETOKENIZE,
    DRAFT,
    HOP_BACK,
    INBOX,
    LAUNCH,
    PACK,
    QUEUE,
    RECEIVE,
    REPLY,
    REQUEST,
    SCHEDULE,
    SEND,
    SERIALIZE,
    STEP,
    SUBMIT,
    TEMPLATE,
    TOKENIZE,
    TOKENS,
    WAIT,
    Recording,
    Span,
)

ACCEPT, PARSE, HOP = "accept", "parse", "hop"
PREFILL, DECODE, LOOP = "prefill", "decode", "loop"
TRANSFER = "transfer"
OTHERS = "other prompts"  # on the device, steps for prompts of other requests: told apart by the engine's clock alone
STAGES = (
    *(ACCEPT, PARSE, TEMPLATE, TOKENIZE, ADMISSION, HOP, QUEUE),
    *(DRAFT, SCHEDULE, PACK, PREFILL, DECODE, TOKENS, COMMIT, CAPTURE, LOOP),
    *(HOP_BACK, DETOKENIZE, SERIALIZE, SEND, TRANSFER),
)
DEVICE = "device"  # prefill or decode, depending on when
# The engine thread's spans, and the stages that they count as.
_ENGINE_STAGES = {
    DRAFT: DRAFT,
    SCHEDULE: SCHEDULE,
    PACK: PACK,
    LAUNCH: DEVICE,
    WAIT: DEVICE,
    TOKENS: TOKENS,
    COMMIT: COMMIT,
    CAPTURE: CAPTURE,
    STEP: LOOP,
    INBOX: LOOP,
    RECEIVE: LOOP,
    REPLY: LOOP,
}


@dataclass(frozen=True, slots=True)
class Segment:
    """[start_ns, end_ns) of one stage. `cpu_ns`: processor time of the engine's thread in it; of a part of a span,
    its share by duration. None outside the engine's thread."""

    stage: str
    start_ns: int
    end_ns: int
    cpu_ns: int | None = None

    @property
    def duration_ns(self) -> int:
        return self.end_ns - self.start_ns

    def cut(self, stage: str, start_ns: int, end_ns: int) -> Segment:
        """The part in [start_ns, end_ns), under another name."""
        start_ns, end_ns = max(self.start_ns, start_ns), min(self.end_ns, end_ns)
        cpu_ns = None if self.cpu_ns is None else self.cpu_ns * (end_ns - start_ns) // self.duration_ns
        return Segment(stage, start_ns, end_ns, cpu_ns)


@dataclass(frozen=True)
class ClientTimes:
    """What a client saw of a request, by the same clock."""

    sent_ns: int  # the request was written
    first_ns: int  # the first text was read
    end_ns: int  # the response was complete


@dataclass(frozen=True)
class ServedRequest:
    """One request. The segments of each list are in order and do not overlap."""

    http_id: str
    request_id: str  # the engine's
    front_end: str
    engine: str
    start_ns: int
    first_ns: int  # the first output was sent, or read by the client
    end_ns: int  # the same of the last
    first_token_ns: int  # the engine knew it
    last_token_ns: int
    num_tokens: int
    segments: tuple[Segment, ...]  # of the whole
    first_segments: tuple[Segment, ...]  # until the first output
    decode_segments: tuple[Segment, ...]  # the engine's from the first token to the last

    @property
    def wall_ns(self) -> int:
        return self.end_ns - self.start_ns

    @property
    def residual_ns(self) -> int:
        """The part of the wall time that no stage covers."""
        return self.wall_ns - sum(segment.duration_ns for segment in self.segments)


@dataclass(frozen=True)
class Delivery:
    """From the engine to the socket, for all tokens of a recording together. It overlaps with the next step."""

    num_batches: int  # messages of engines
    num_events: int
    hop_back_ns: int  # sum over batches
    detokenize_ns: int  # sums over events
    serialize_ns: int
    send_ns: int


@dataclass(frozen=True)
class Served:
    """The requests whose whole life was recorded."""

    requests: tuple[ServedRequest, ...]
    num_left_out: int  # HTTP requests that called the engine, but not in one recorded stream with one choice
    delivery: Delivery


def assemble(recordings: Sequence[Recording], clients: Mapping[str, ClientTimes] | None = None) -> Served:
    """Follow each streamed request with one choice through the recordings of its processes.

    clients: what clients saw, by the id of the HTTP request; without it a request lasts from its head's arrival to its
    last byte's sending."""
    engines = [_Engine(recording) for recording in recordings if recording.named(RECEIVE)]
    received = {str(span.facts["request"]): (engine, span) for engine in engines for span in engine.received}
    requests, num_calls = [], 0
    for recording in recordings:
        front_end = _FrontEnd(recording)
        num_calls += len(front_end.calls)
        for http_id in front_end.calls:
            client = None if clients is None else clients.get(http_id)
            if clients is None or client is not None:
                request = front_end.follow(http_id, received, client)
                requests += [] if request is None else [request]
    requests.sort(key=lambda request: request.start_ns)
    return Served(tuple(requests), num_calls - len(requests), _delivery(recordings))


class _Engine:
    """What the engine's thread did when."""

    def __init__(self, recording: Recording) -> None:
        self.name = recording.process
        self.received = recording.named(RECEIVE)
        self._queued = _by_fact(recording.named(QUEUE), "request")
        thread = self.received[0].thread
        spans = [span for span in recording.spans if span.thread == thread and span.depth >= 0]
        self._segments = innermost_segments(spans)
        self._ends = [segment.end_ns for segment in self._segments]

    def scheduled_ns(self, request_id: str, facts: Mapping[str, int]) -> int:
        """When a step first included the request. The engine says when it last left the queue: that is later if it was
        preempted, but a second wait after the first token is no part of the queue's stage."""
        queued = self._queued.get(request_id)
        if facts["scheduled_ns"] <= facts["first_token_ns"] or queued is None:
            return min(facts["scheduled_ns"], facts["first_token_ns"])
        return queued.end_ns

    def between(self, start_ns: int, end_ns: int, device: str) -> list[Segment]:
        """The segments of [start_ns, end_ns). device: the stage that the device's time counts as."""
        found = []
        for segment in self._segments[bisect_right(self._ends, start_ns) :]:
            if segment.start_ns >= end_ns:
                break
            stage = device if segment.stage == DEVICE else segment.stage
            found.append(segment.cut(stage, start_ns, end_ns))
        return found


def innermost_segments(spans: Iterable[Span]) -> list[Segment]:
    """One thread's time by its innermost span that belongs to a stage of the engine; in order, without overlap."""
    segments: list[Segment] = []
    stack: list[tuple[str, Span]] = []  # the open spans and their stages
    cursor_ns = 0

    def advance(to_ns: int) -> None:
        """Give the time until `to_ns` to the innermost span."""
        nonlocal cursor_ns
        while stack:
            stage, span = stack[-1]
            until_ns = min(span.end_ns, to_ns)
            if until_ns > cursor_ns:
                cpu_ns = (span.own_cpu_ns or 0) * (until_ns - cursor_ns) // max(1, span.own_ns)
                segments.append(Segment(stage, cursor_ns, until_ns, cpu_ns))
                cursor_ns = until_ns
            if span.end_ns > to_ns:
                return
            stack.pop()

    for span in sorted(spans, key=lambda span: (span.start_ns, -span.end_ns)):
        stage = _ENGINE_STAGES.get(span.name)
        if stage is None:
            continue
        advance(span.start_ns)
        cursor_ns = max(cursor_ns, span.start_ns)
        stack.append((stage, span))
    advance(max((span.end_ns for _, span in stack), default=0))
    return segments


class _FrontEnd:
    """What one front-end noted of its requests."""

    def __init__(self, recording: Recording) -> None:
        self._name = recording.process
        self.calls = _by_fact(recording.named(CALL), "http")
        self._whole = _by_fact(recording.named(REQUEST), "http")
        self._answers = _by_fact(recording.named(ANSWER), "http")
        self._templates = _by_fact(recording.named(TEMPLATE), "http")
        self._tokenized = _by_fact(recording.named(TOKENIZE), "http")
        self._submitted = _by_fact(recording.named(SUBMIT), "request")
        self._batch_starts = sorted(span.start_ns for span in recording.named(DETOKENIZE))

    def follow(
        self, http_id: str, received: Mapping[str, tuple[_Engine, Span]], client: ClientTimes | None
    ) -> ServedRequest | None:
        """None unless all of its times are known."""
        if self.calls[http_id].facts["choices"] != 1:
            return None
        call, whole, answer = self.calls[http_id], self._whole.get(http_id), self._answers.get(http_id)
        request_id = str(call.facts["request"])
        submitted, (engine, taken) = self._submitted.get(request_id), received.get(request_id, (None, None))
        if whole is None or answer is None or submitted is None or engine is None or taken is None:
            return None
        facts = {name: value for name, value in answer.facts.items() if isinstance(value, int)}
        start_ns = whole.start_ns if client is None else client.sent_ns
        first_ns = facts["first_sent_ns"] if client is None else client.first_ns
        end_ns = answer.end_ns if client is None else client.end_ns
        known_ns, last_known_ns = facts["first_token_ns"], facts["last_token_ns"]
        scheduled_ns = engine.scheduled_ns(request_id, facts)
        before = [
            *([] if client is None else [(ACCEPT, whole.start_ns)]),
            *self._prompt_stages(http_id, call),
            (ADMISSION, submitted.start_ns),
            (HOP, taken.start_ns),
            (QUEUE, scheduled_ns),
        ]
        to_prompt = _consecutive(start_ns, before)
        prefill = engine.between(scheduled_ns, known_ns, PREFILL)
        decode = engine.between(known_ns, last_known_ns, DECODE)
        to_first = _consecutive(known_ns, self._way_out(facts, "first", facts["first_sent_ns"], first_ns))
        to_last = _consecutive(last_known_ns, self._way_out(facts, "last", answer.end_ns, end_ns))
        return ServedRequest(
            http_id=http_id,
            request_id=request_id,
            front_end=self._name,
            engine=engine.name,
            start_ns=start_ns,
            first_ns=first_ns,
            end_ns=end_ns,
            first_token_ns=known_ns,
            last_token_ns=last_known_ns,
            num_tokens=facts["num_tokens"],
            segments=(*to_prompt, *prefill, *decode, *to_last),
            first_segments=(*to_prompt, *prefill, *to_first),
            decode_segments=tuple(decode),
        )

    def _prompt_stages(self, http_id: str, call: Span) -> list[tuple[str, int]]:
        stages = [(PARSE, call.start_ns)]
        if (template := self._templates.get(http_id)) is not None:
            stages.append((TEMPLATE, template.end_ns))
        if (tokenized := self._tokenized.get(http_id)) is not None:  # else the client sent ids
            stages.append((TOKENIZE, tokenized.end_ns))
        return stages

    def _way_out(self, facts: Mapping[str, int], which: str, sent_ns: int, read_ns: int) -> list[tuple[str, int]]:
        """From the moment when the engine knows a token, the first or the last, until it has been sent and read."""
        taken_ns = facts[f"{which}_taken_ns"]
        place = bisect_right(self._batch_starts, taken_ns) - 1
        batch_ns = self._batch_starts[place] if place >= 0 else taken_ns
        return [
            (HOP_BACK, batch_ns),
            (DETOKENIZE, taken_ns),
            (SERIALIZE, facts[f"{which}_formatted_ns"]),
            (SEND, min(sent_ns, read_ns)),  # the client may read before the server has looked at its clock again
            (TRANSFER, read_ns),
        ]


def _by_fact(spans: Iterable[Span], fact: str) -> dict[str, Span]:
    """The last span for each value of a fact, of those that have it."""
    return {str(span.facts[fact]): span for span in spans if fact in span.facts}


def _consecutive(start_ns: int, ends: Iterable[tuple[str, int]]) -> list[Segment]:
    """Stages that follow each other, each with its end. One that ends before it starts is left out."""
    segments = []
    for stage, end_ns in ends:
        if end_ns > start_ns:
            segments.append(Segment(stage, start_ns, end_ns))
            start_ns = end_ns
    return segments


def _delivery(recordings: Sequence[Recording]) -> Delivery:
    def total(name: str) -> tuple[int, int]:
        found = [recording.totals[name] for recording in recordings if name in recording.totals]
        return sum(one.count for one in found), sum(one.own_ns for one in found)

    num_batches, hop_back_ns = total(HOP_BACK)
    num_events, serialize_ns = total(SERIALIZE)
    return Delivery(num_batches, num_events, hop_back_ns, total(DETOKENIZE)[1], serialize_ns, total(SEND)[1])
