"""From deltas to answers of /api/chat and /api/generate, whole and as lines of JSON."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec

from tinyvllm.server.answers import collect, finite
from tinyvllm.server.events import NDJSON, TextEvent, json_string
from tinyvllm.server.failures import failure_of
from tinyvllm.server.generation import Item, Job
from tinyvllm.server.message import OutputFormat, ParsedCall
from tinyvllm.server.ollama.protocol import (
    Answer,
    AnswerMessage,
    CalledFunction,
    ChatAnswer,
    GenerateAnswer,
    TokenScore,
    TokenScores,
    ToolCall,
)
from tinyvllm.server.ollama.wire import now
from tinyvllm.text.tools.events import CallArguments, CallBegin, Event, Reasoning, Text

if TYPE_CHECKING:
    from tinyvllm.engine.output import Delta, Timing, TokenLogprob
    from tinyvllm.server.state import ServerState

_TIME_MARK = "2000-01-01T00:00:00.000000Z"  # stands for the time of a line


@dataclass
class Piece:
    """A part of a message."""

    content: str = ""
    thinking: str = ""
    calls: list[ToolCall] = field(default_factory=list)

    def add(self, later: Piece) -> None:
        self.content += later.content
        self.thinking += later.thinking
        self.calls += later.calls


@dataclass(frozen=True)
class AnswerForm:
    """What the lines of one answer depend on besides the output."""

    model: str  # as the request names it
    format: OutputFormat
    arrival_s: float  # perf_counter() when the request arrived
    is_chat: bool  # False: /api/generate
    context: tuple[int, ...] | None = None  # the prompt's ids, if the answer returns those of prompt and output

    def body(self, piece: Piece, **fields: Any) -> Answer:
        heading: dict[str, Any] = {"model": self.model, "created_at": now(), **fields}
        thinking = piece.thinking or None
        if not self.is_chat:
            return GenerateAnswer(response=piece.content, thinking=thinking, **heading)
        message = AnswerMessage(content=piece.content, thinking=thinking, tool_calls=piece.calls or None)
        return ChatAnswer(message=message, **heading)

    def without_output(self, reason: str) -> Answer:
        """The answer to a request that only loads or unloads the model."""
        return self.body(Piece(), done=True, done_reason=reason)

    def final_fields(self, last: Delta, output_ids: list[int]) -> dict[str, Any]:
        """The fields at the end of an answer."""
        fields: dict[str, Any] = {
            "done": True,
            "done_reason": last.finish_reason,
            "prompt_eval_count": last.num_prompt_tokens,
            "eval_count": last.num_output_tokens,
            **durations(last.timing, time.perf_counter() - self.arrival_s, self.arrival_s),
        }
        if self.context is not None:
            fields["context"] = [*self.context, *output_ids]
        return fields


def durations(timing: Timing | None, total_s: float, arrival_s: float) -> dict[str, int]:
    """Ollama's durations in ns, none of which is negative; the total is at least the sum of the others.

    Loading is everything before the prompt is computed: reading the request, and its wait in the queue."""
    if timing is None:
        return {"total_duration": _ns(total_s)}
    prompt_ns = _ns(timing.first_token_s - timing.scheduled_s)
    output_ns = _ns(timing.last_token_s - timing.first_token_s)
    total_ns = max(_ns(total_s), prompt_ns + output_ns)
    load_ns = min(_ns(timing.scheduled_s - arrival_s), total_ns - prompt_ns - output_ns)
    return {
        "total_duration": total_ns,
        "load_duration": load_ns,
        "prompt_eval_duration": prompt_ns,
        "eval_duration": output_ns,
    }


def _ns(seconds: float) -> int:
    return max(0, round(seconds * 1e9))


class MessageReader:
    """Extracts the pieces of one message from deltas. Calls are held back until they are complete."""

    def __init__(self, format: OutputFormat) -> None:
        self._format = format
        self._parser = format.parser()
        self._call: ParsedCall | None = None
        self._num_calls = 0

    @property
    def is_plain(self) -> bool:
        """Whether all text is content, unchanged."""
        return self._parser.is_plain

    def read(self, delta: Delta) -> Piece:
        """The parts of the message that are now final."""
        events = self._parser.push(delta.text, len(delta.token_ids))
        if delta.finish_reason is not None:
            events += self._parser.flush()
        piece = Piece()
        for event in events:
            self._add(event, piece)
        if delta.finish_reason is not None:
            self._end_call(piece)
        return piece

    def _add(self, event: Event, piece: Piece) -> None:
        if isinstance(event, CallArguments):
            assert self._call is not None
            self._call.arguments += event.text
            return
        self._end_call(piece)
        match event:
            case Reasoning():
                piece.thinking += event.text
            case Text():
                piece.content += event.text
            case CallBegin():
                assert self._format.tools is not None
                self._call = ParsedCall(self._format.tools.make_id(), event.name)

    def _end_call(self, piece: Piece) -> None:
        call, self._call = self._call, None
        if call is None:
            return
        arguments = _object_of(call.arguments)
        if arguments is None:  # cut short or malformed: returned as text
            piece.content += f"{call.name}({call.arguments})"
            return
        function = CalledFunction(index=self._num_calls, name=call.name, arguments=arguments)
        piece.calls.append(ToolCall(id=call.id, function=function))
        self._num_calls += 1


def _object_of(text: str) -> dict[str, Any] | None:
    """The text as a JSON object; {} if it is empty, None if it is anything else."""
    if not text.strip():
        return {}
    try:
        value = msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


async def whole_answer(state: ServerState, job: Job, form: AnswerForm) -> Answer:
    reader, message = MessageReader(form.format), Piece()
    output_ids: list[int] = []
    scores: list[TokenLogprob] = []
    last: list[Delta] = []

    def add(item: Item) -> None:
        output_ids.extend(item.delta.token_ids)
        scores.extend(item.delta.logprobs)
        message.add(reader.read(item.delta))
        last[:] = [item.delta]

    await collect(state, job, add)
    return form.body(message, logprobs=token_scores(scores) or None, **form.final_fields(last[0], output_ids))


class AnswerLines:
    """An answer as lines of JSON: pieces of the message, each when it is final; at the end, counts and durations.

    Lines of plain text reuse bytes that were serialized once."""

    media_type = NDJSON

    def __init__(self, form: AnswerForm) -> None:
        self._form = form
        self._reader = MessageReader(form.format)
        self._output_ids: list[int] = []
        self._content = _PlainLine(form, Piece(content=TextEvent.MARK))
        self._thinking = _PlainLine(form, Piece(thinking=TextEvent.MARK))
        self._is_plain = self._reader.is_plain

    def keepalive(self) -> bytes:
        return self._content.with_text("")  # clients append each line's text, and some fail on a blank line

    def begin(self) -> bytes:
        return b""

    def take(self, item: Item) -> bytes:
        delta = item.delta
        self._output_ids += delta.token_ids
        if not self._is_plain or delta.finish_reason is not None or delta.logprobs:
            return self._write(delta)
        return self._content.with_text(delta.text) if delta.text else b""

    def end(self) -> bytes:
        return b""

    def fail(self, error: BaseException) -> bytes:
        return failure_of(error).event("/api/chat")

    def _write(self, delta: Delta) -> bytes:
        """The lines of a delta that has more than plain content."""
        piece = self._reader.read(delta)
        lines = b""
        if delta.logprobs:  # with the piece that is now final, which may be empty
            lines = _line(self._form.body(piece, logprobs=token_scores(delta.logprobs)))
        elif piece.calls or (piece.thinking and piece.content):
            lines = _line(self._form.body(piece))
        elif piece.thinking:
            lines = self._thinking.with_text(piece.thinking)
        elif piece.content:
            lines = self._content.with_text(piece.content)
        if delta.finish_reason is not None:
            lines += _line(self._form.body(Piece(), **self._form.final_fields(delta, self._output_ids)))
        return lines


class _PlainLine:
    """A line of which only the time and one text vary."""

    def __init__(self, form: AnswerForm, example: Piece) -> None:
        body = form.body(example).model_copy(update={"created_at": _TIME_MARK})
        event = TextEvent(_line(body))
        self._before_time, self._after_time = event.head.split(_TIME_MARK.encode())
        self._tail = event.tail

    def with_text(self, text: str) -> bytes:
        return self._before_time + now().encode() + self._after_time + json_string(text) + self._tail


def _line(answer: Answer) -> bytes:
    return answer.model_dump_json().encode() + b"\n"


def token_scores(logprobs: Iterable[TokenLogprob]) -> list[TokenScores]:
    return [
        TokenScores(
            token=entry.token,
            logprob=finite(entry.logprob),
            bytes=list(entry.bytes),
            top_logprobs=[
                TokenScore(token=top.token, logprob=finite(top.logprob), bytes=list(top.bytes)) for top in entry.top
            ]
            or None,
        )
        for entry in logprobs
    ]
