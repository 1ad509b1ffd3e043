"""Converts deltas to the items of a response, and the events that report them as they grow."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from tinyvllm.server.error_bodies import ErrorDetail
from tinyvllm.server.events import TextEvent
from tinyvllm.server.message import OutputFormat
from tinyvllm.server.openai.chat_answers import chat_logprobs
from tinyvllm.server.openai.protocol.chat import ChatTokenLogprob
from tinyvllm.server.openai.protocol.response_items import seal
from tinyvllm.server.openai.protocol.responses import (
    CustomCallItem,
    FunctionCallItem,
    IncompleteDetails,
    InputTokensDetails,
    MessageItem,
    OutputItem,
    OutputText,
    OutputTokensDetails,
    ReasoningItem,
    ReasoningText,
    ResponseAnswer,
    ResponseUsage,
    Status,
    SummaryText,
    ToolSearchCallItem,
)
from tinyvllm.server.openai.protocol.tools import NO_TOOLS, Toolbox
from tinyvllm.text.messages import parse_object
from tinyvllm.text.tools.custom import InputReader
from tinyvllm.text.tools.events import CallArguments, CallBegin, Reasoning, Text
from tinyvllm.text.tools.events import Event as Piece

if TYPE_CHECKING:
    from tinyvllm.engine.output import Delta

Event = dict[str, Any]
# OpenAI's codes for a response's error, by our error types
_FAILURES = {"invalid_request_error": "invalid_prompt", "rate_limit_error": "rate_limit_exceeded"}
_TEXT_DELTA = "response.output_text.delta"


class ResponseWriter:
    """Writes one response. Owns its items, of which the last may still grow, and the events' sequence numbers."""

    def __init__(
        self,
        answer: ResponseAnswer,
        format: OutputFormat,
        toolbox: Toolbox = NO_TOOLS,
        *,
        summarizes: bool = False,
        seals_reasoning: bool = False,
    ) -> None:
        """answer: in progress, without output. summarizes: reasoning is the item's summary instead of its content.
        seals_reasoning: it is also `encrypted_content`."""
        self.answer = answer
        self._format = format
        self._toolbox = toolbox
        self._summarizes = summarizes
        self._seals_reasoning = seals_reasoning
        self._input: InputReader | None = None  # while the last item is a custom tool's call
        self._parser = format.parser()
        self._number = 0
        self._is_open = False
        self._logprobs: list[ChatTokenLogprob] = []  # of tokens whose text has not been written yet
        self._texts: list[str] = []  # of the last item's part, until it is closed
        self._text_event: _TextEvent | None = None  # while the last item is a message

    NUM_QUEUED_EVENTS = 2  # that `begin` writes for a background response

    def begin(self, *, is_queued: bool = False) -> Iterator[Event]:
        """is_queued: for a background response; `progress` follows once there is output."""
        self.answer.status = "queued" if is_queued else "in_progress"
        for kind in ("response.created", f"response.{self.answer.status}"):
            yield self._event(kind, response=_dump(self.answer))

    def progress(self) -> Iterator[Event]:
        self.answer.status = "in_progress"
        yield self._event("response.in_progress", response=_dump(self.answer))

    def frame_text(self, delta: Delta) -> bytes | None:
        """The event of a delta that only adds text to an open message: what `push` returns, as bytes, in a fraction of
        the time. None for other deltas.
        """
        event = self._text_event
        if event is None or not delta.text or delta.logprobs or self._logprobs or delta.finish_reason is not None:
            return None
        self._texts.append(delta.text)
        number = self._number
        self._number += 1
        return event.frame(number, delta.text)

    def push(self, delta: Delta) -> Iterator[Event]:
        """The events of a delta. After the last delta the answer is complete."""
        pieces = self._parser.push(delta.text, len(delta.token_ids))
        self._logprobs += chat_logprobs(delta.logprobs).content
        if delta.finish_reason is not None:
            pieces += self._parser.flush()
        for piece in pieces:
            yield from self._write(piece)
        if delta.finish_reason is not None:
            yield from self._end(delta)

    def _write(self, piece: Piece) -> Iterator[Event]:
        match piece:
            case Reasoning():
                if not self._is_last(ReasoningItem):
                    yield from self._open(ReasoningItem(id=new_item_id("reasoning"), content=[], status="in_progress"))
                    yield from self._add_part(SummaryText(text="") if self._summarizes else ReasoningText(text=""))
                kind = "reasoning_summary_text" if self._summarizes else "reasoning_text"
                yield from self._grow_text(f"response.{kind}.delta", piece.text)
            case Text():
                if not self._is_last(MessageItem):
                    yield from self._open(MessageItem(id=new_item_id("message"), content=[], status="in_progress"))
                    yield from self._add_part(OutputText(text=""))
                    if self._parser.is_plain:
                        self._text_event = _TextEvent(self._make_text_event(TextEvent.MARK, 0))
                logprobs, self._logprobs = self._logprobs, []
                self._parts[0].logprobs += logprobs
                shown = [entry.model_dump() for entry in logprobs]
                yield from self._grow_text(_TEXT_DELTA, piece.text, logprobs=shown)
            case CallBegin():
                yield from self._open(self._make_call(piece.name))
            case CallArguments():
                yield from self._grow_call(piece.text)

    def _make_call(self, name: str) -> FunctionCallItem | CustomCallItem | ToolSearchCallItem:
        """The item of a call, under the name that the client knows."""
        assert self._format.tools is not None
        offer = self._toolbox.find(name)
        call_id = self._format.tools.make_id()
        if offer is not None and offer.kind == "tool_search":
            item_id = new_item_id("tool_search_call")
            return ToolSearchCallItem(id=item_id, call_id=call_id, arguments={}, status="in_progress")
        name, namespace = (name, None) if offer is None else (offer.name, offer.namespace)
        known: dict[str, Any] = {"call_id": call_id, "name": name, "namespace": namespace, "status": "in_progress"}
        if offer is not None and offer.is_custom:
            return CustomCallItem(id=new_item_id("custom_tool_call"), input="", **known)
        return FunctionCallItem(id=new_item_id("function_call"), arguments="", **known)

    def _grow_call(self, arguments: str) -> Iterator[Event]:
        call = self.answer.output[-1]
        if isinstance(call, FunctionCallItem):
            call.arguments += arguments
            yield self._item_event("response.function_call_arguments.delta", delta=arguments)
        elif self._input is not None:
            yield from self._grow_input(self._input.push(arguments))
        else:  # a search for tools, whose arguments are an object
            self._texts.append(arguments)

    def _grow_input(self, text: str) -> Iterator[Event]:
        call = self.answer.output[-1]
        assert isinstance(call, CustomCallItem)
        if text:
            call.input += text
            yield self._item_event("response.custom_tool_call_input.delta", delta=text)

    @property
    def _parts(self) -> list[Any]:
        item = self.answer.output[-1]
        assert isinstance(item, MessageItem | ReasoningItem)
        return item.summary if isinstance(item, ReasoningItem) and self._summarizes else item.content

    def _is_last(self, kind: type[BaseModel]) -> bool:
        return self._is_open and isinstance(self.answer.output[-1], kind)

    def _open(self, item: OutputItem) -> Iterator[Event]:
        yield from self._close("completed")
        self.answer.output.append(item)
        self._input = InputReader() if isinstance(item, CustomCallItem) else None
        self._is_open = True
        yield self._event(
            "response.output_item.added", output_index=len(self.answer.output) - 1, item=item.model_dump()
        )

    def _add_part(self, part: OutputText | ReasoningText | SummaryText) -> Iterator[Event]:
        self._parts.append(part)
        kind = "reasoning_summary_part" if isinstance(part, SummaryText) else "content_part"
        yield self._item_event(f"response.{kind}.added", **self._index, part=part.model_dump())

    def _grow_text(self, kind: str, text: str, **more: Any) -> Iterator[Event]:
        self._texts.append(text)
        yield self._item_event(kind, **self._index, delta=text, **more)

    @property
    def _index(self) -> dict[str, int]:
        """Where the text of the last item is: its only part."""
        is_summary = self._summarizes and isinstance(self.answer.output[-1], ReasoningItem)
        return {"summary_index" if is_summary else "content_index": 0}

    def _make_text_event(self, text: str, number: int) -> Event:
        """The event of a text in the last item, without counting it."""
        event = self._item_event(_TEXT_DELTA, content_index=0, delta=text, logprobs=[])
        self._number -= 1
        return event | {"sequence_number": number}

    def _close(self, status: Status) -> Iterator[Event]:
        if not self._is_open:
            return
        self._is_open = False
        self._text_event = None
        item = self.answer.output[-1]
        if self._input is not None:
            yield from self._grow_input(self._input.flush())
        item.status = status
        text, self._texts = "".join(self._texts), []
        if isinstance(item, MessageItem | ReasoningItem):
            self._parts[0].text = text
        elif isinstance(item, ToolSearchCallItem):
            item.arguments = parse_object(text)
        yield from self._end_item(item)
        yield self._event("response.output_item.done", output_index=len(self.answer.output) - 1, item=item.model_dump())

    def _end_item(self, item: OutputItem) -> Iterator[Event]:
        """The events with an item's final content."""
        match item:
            case FunctionCallItem():
                yield self._item_event(
                    "response.function_call_arguments.done", name=item.name, arguments=item.arguments
                )
            case CustomCallItem():
                yield self._item_event("response.custom_tool_call_input.done", input=item.input)
            case MessageItem():
                part = item.content[0]
                shown = [entry.model_dump() for entry in part.logprobs]
                yield self._item_event("response.output_text.done", content_index=0, text=part.text, logprobs=shown)
                yield self._item_event("response.content_part.done", content_index=0, part=part.model_dump())
            case ReasoningItem():
                thought = self._parts[0]
                if self._seals_reasoning:
                    item.encrypted_content = seal(thought.text)
                kinds = ("reasoning_text", "content_part")
                if self._summarizes:
                    kinds = ("reasoning_summary_text", "reasoning_summary_part")
                yield self._item_event(f"response.{kinds[0]}.done", **self._index, text=thought.text)
                yield self._item_event(f"response.{kinds[1]}.done", **self._index, part=thought.model_dump())

    def _end(self, delta: Delta) -> Iterator[Event]:
        is_cut = delta.finish_reason == "length"
        if not self.answer.output:  # no output: an empty message, as from OpenAI
            yield from self._write(Text(""))
        yield from self._close("incomplete" if is_cut else "completed")
        answer = self.answer
        answer.status = "incomplete" if is_cut else "completed"
        answer.completed_at = int(time.time())
        if is_cut:
            answer.incomplete_details = IncompleteDetails(reason="max_output_tokens")
        answer.usage = ResponseUsage(
            input_tokens=delta.num_prompt_tokens,
            input_tokens_details=InputTokensDetails(cached_tokens=delta.num_cached_tokens),
            output_tokens=delta.num_output_tokens,
            output_tokens_details=OutputTokensDetails(reasoning_tokens=self._parser.num_reasoning_tokens),
            total_tokens=delta.num_prompt_tokens + delta.num_output_tokens,
        )
        yield self._event(f"response.{answer.status}", response=_dump(answer))

    def _item_event(self, kind: str, **more: Any) -> Event:
        """An event about the last item."""
        index = len(self.answer.output) - 1
        return self._event(kind, item_id=self.answer.output[index].id, output_index=index, **more)

    def _event(self, kind: str, **more: Any) -> Event:
        event = {"type": kind, "sequence_number": self._number, **more}
        self._number += 1
        return event

    def fail(self, error: ErrorDetail) -> Iterator[Event]:
        """The last events of a response that fails: for clients that read the response (Codex), and for those that read
        the error (OpenAI's)."""
        yield from self._close("incomplete")
        self.answer.status = "failed"
        self.answer.error = {"code": _FAILURES.get(error.type, "server_error"), "message": error.message}
        yield self._event("response.failed", response=_dump(self.answer))
        shown = error.model_dump()
        yield self._event("error", error=shown, **{name: shown[name] for name in ("code", "message", "param")})

    def cancel(self) -> Iterator[Event]:
        """The last events of a cancelled response. OpenAI documents no event for it; clients skip it."""
        yield from self._close("incomplete")
        self.answer.status = "cancelled"
        yield self._event("response.cancelled", response=_dump(self.answer))


class _TextEvent:
    """The event of a text in one message, whose bytes around the sequence number and the text are made once."""

    def __init__(self, example: Event) -> None:
        """example: with the number 0 and the text MARK."""
        event = TextEvent(frame_event(example))
        self._head, number, self._middle = event.head.partition(b'"sequence_number": 0')
        assert number, "an event begins with its type and its number"
        self._tail = event.tail

    def frame(self, number: int, text: str) -> bytes:
        quoted = json.encoder.encode_basestring_ascii(text).encode()  # as json.dumps
        return b'%b"sequence_number": %d%b%b%b' % (self._head, number, self._middle, quoted, self._tail)


def frame_event(event: Event) -> bytes:
    """One server-sent event, named by its type."""
    return f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode()


def _dump(answer: ResponseAnswer) -> dict[str, Any]:
    return answer.model_dump(mode="json", by_alias=True)


_ID_PREFIXES = {
    "message": "msg",
    "reasoning": "rs",
    "function_call": "fc",
    "custom_tool_call": "ctc",
    "tool_search_call": "tsc",
}


def new_item_id(kind: str) -> str:
    """An id for an item of this type."""
    return f"{_ID_PREFIXES.get(kind, 'item')}_{uuid.uuid4().hex}"
