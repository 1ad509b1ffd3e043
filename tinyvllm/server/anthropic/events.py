"""From deltas to the events of a streamed message: https://docs.anthropic.com/en/docs/build-with-claude/streaming"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from tinyvllm.server.anthropic.answers import Form
from tinyvllm.server.anthropic.protocol import MessageAnswer, TextBlock, ThinkingBlock, ToolUseBlock, Usage
from tinyvllm.server.anthropic.signatures import Signature
from tinyvllm.server.error_bodies import ANTHROPIC_PATH
from tinyvllm.server.events import ServerSentEvents, TextEvent, json_string
from tinyvllm.server.failures import failure_of
from tinyvllm.server.generation import Item
from tinyvllm.text.tools.events import CallArguments, CallBegin, Event, Reasoning, Text

if TYPE_CHECKING:
    from tinyvllm.engine.output import Delta

_encode = msgspec.json.Encoder().encode


def frame(kind: str, **fields: Any) -> bytes:
    """One event, named by its type."""
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), _encode({"type": kind, **fields}))


PING = frame("ping")
REPORT_TOKENS = 32  # of omitted reasoning between the events that report their number


class MessageEvents(ServerSentEvents):
    """The events of one message. Owns its parser and the block that is open."""

    def __init__(self, form: Form) -> None:
        self._form = form
        self._parser = form.format.parser()
        self._has_started = False
        self._index = -1  # of the latest block
        self._block: type[Event] | None = None  # the kind of the open block; CallArguments for a call
        self._text: TextEvent | None = None  # of the open block
        self._direct: TextEvent | None = None  # the same, while deltas only add text to it, unparsed
        self._signature = Signature(carries_text=form.omits_thoughts)  # of the open block, if it is a thinking block
        self._num_reported = 0  # omitted tokens of reasoning that events have reported

    def keepalive(self) -> bytes:
        # what was cached is not known before the first output: message_delta corrects it
        return PING if self._has_started else self._start(0)

    def begin(self) -> bytes:
        return b""  # with the first item, which knows the tokens that were cached

    def take(self, item: Item) -> bytes:
        delta, event = item.delta, self._direct
        if event is None or delta.finish_reason is not None:
            return self._write(delta)
        if not delta.text:
            return b""
        return event.head + json_string(delta.text) + event.tail

    def end(self) -> bytes:
        return b""  # the last item has ended the message

    def fail(self, error: BaseException) -> bytes:
        return failure_of(error).event(ANTHROPIC_PATH)

    def _write(self, delta: Delta) -> bytes:
        out = b"" if self._has_started else self._start(delta.num_cached_tokens)
        pieces = self._parser.push(delta.text, len(delta.token_ids))
        if delta.finish_reason is not None:
            pieces += self._parser.flush()
        if not self._form.is_empty:
            out += b"".join(map(self._piece, pieces))
        if delta.finish_reason is None:
            return out
        return out + self._close() + self._stop(delta)

    def _start(self, num_cached_tokens: int) -> bytes:
        self._has_started = True
        form = self._form
        usage = Usage(
            input_tokens=form.num_prompt_tokens - num_cached_tokens,
            cache_read_input_tokens=num_cached_tokens,
            output_tokens=0,
        )
        message = MessageAnswer(
            id=form.id, model=form.model, content=[], stop_reason=None, stop_sequence=None, usage=usage
        )
        return frame("message_start", message=message.model_dump()) + PING

    def _piece(self, piece: Event) -> bytes:
        kind = CallArguments if isinstance(piece, CallBegin) else type(piece)
        out = b""
        if kind is not self._block or isinstance(piece, CallBegin):
            out = self._close() + self._open(piece)
        if isinstance(piece, CallBegin):
            return out
        if isinstance(piece, Reasoning):
            self._signature.add(piece.text)
            if self._form.omits_thoughts:
                return out + self._report()
        assert self._text is not None, "arguments follow their call"
        return out + self._text.head + json_string(piece.text) + self._text.tail

    def _report(self) -> bytes:
        """An event with the number of new tokens of reasoning, in place of their text, once there are enough."""
        more = self._parser.num_reasoning_tokens - self._num_reported
        if more < REPORT_TOKENS:
            return b""
        self._num_reported += more
        return self._delta(type="thinking_delta", thinking="", estimated_tokens=more)

    def _open(self, piece: Event) -> bytes:
        self._index += 1
        match piece:
            case Reasoning():
                self._block = Reasoning
                self._signature = Signature(carries_text=self._form.omits_thoughts)
                return self._begin_block(ThinkingBlock(), "thinking_delta", "thinking")
            case CallBegin():
                self._block = CallArguments
                block = ToolUseBlock(id=self._form.make_call_id(), name=piece.name)
                begun = self._begin_block(block, "input_json_delta", "partial_json")
                return begun + self._delta(type="input_json_delta", partial_json="")
            case _:
                self._block = Text
                begun = self._begin_block(TextBlock(), "text_delta", "text")
                self._direct = self._text if self._parser.is_plain else None
                return begun

    def _begin_block(self, block: TextBlock | ThinkingBlock | ToolUseBlock, kind: str, field: str) -> bytes:
        """Begin a block whose deltas have this type, and their text in this field."""
        self._text = TextEvent(self._delta(type=kind, **{field: TextEvent.MARK}))
        return frame("content_block_start", index=self._index, content_block=block.model_dump())

    def _close(self) -> bytes:
        """End the open block, if there is one."""
        if self._block is None:
            return b""
        signed = b""
        if self._block is Reasoning:
            signed = self._delta(type="signature_delta", signature=str(self._signature))
        self._block, self._text, self._direct = None, None, None
        return signed + frame("content_block_stop", index=self._index)

    def _stop(self, delta: Delta) -> bytes:
        reason, sequence = self._form.stop_reason(delta, self._parser)
        usage = self._form.usage(delta, self._parser).model_dump(exclude={"service_tier"})
        ended = frame("message_delta", delta={"stop_reason": reason, "stop_sequence": sequence}, usage=usage)
        return ended + frame("message_stop")

    def _delta(self, **delta: str | int) -> bytes:
        return frame("content_block_delta", index=self._index, delta=delta)
