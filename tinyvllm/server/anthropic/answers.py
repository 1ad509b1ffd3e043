"""Converts a model's output to the content blocks and the stop reason of a message."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic_core import from_json

from tinyvllm.server.anthropic.protocol import (
    MessageAnswer,
    OutputTokensDetails,
    StopReason,
    TextBlock,
    ThinkingBlock,
    ToolUseBlock,
    Usage,
)
from tinyvllm.server.anthropic.signatures import Signature
from tinyvllm.text.tools.events import CallArguments, CallBegin, Event, Reasoning, Text

if TYPE_CHECKING:
    from tinyvllm.engine.output import Delta
    from tinyvllm.server.message import MessageParser, OutputFormat


@dataclass(frozen=True)
class Form:
    """What the events and blocks of one answer depend on besides the output."""

    id: str
    model: str
    format: OutputFormat
    stop_sequences: Sequence[str]
    num_prompt_tokens: int
    is_clamped: bool = False  # the context ends before max_tokens
    is_empty: bool = False  # max_tokens is 0: only the prompt was computed
    omits_thoughts: bool = False  # thinking blocks have no text, but a signature that carries it

    def usage(self, delta: Delta, parser: MessageParser) -> Usage:
        """The usage after the last delta."""
        thinking = self.format.count_reasoning([parser])
        return Usage(
            input_tokens=delta.num_prompt_tokens - delta.num_cached_tokens,
            cache_read_input_tokens=delta.num_cached_tokens,
            output_tokens=0 if self.is_empty else delta.num_output_tokens,
            output_tokens_details=None if thinking is None else OutputTokensDetails(thinking_tokens=thinking),
        )

    def stop_reason(self, delta: Delta, parser: MessageParser) -> tuple[StopReason, str | None]:
        """stop_reason and stop_sequence after the last delta."""
        if self.is_empty:
            return "max_tokens", None
        match parser.finish_reason(delta.finish_reason or "stop"):
            case "length":
                return "model_context_window_exceeded" if self.is_clamped else "max_tokens", None
            case "tool_calls":
                return "tool_use", None
            case _ if isinstance(delta.stop_reason, str) and delta.stop_reason in self.stop_sequences:
                return "stop_sequence", delta.stop_reason
            case _:
                return "end_turn", None

    def make_call_id(self) -> str:
        """An id in the form that the model's template takes, with Anthropic's prefix unless the format forbids it."""
        assert self.format.tools is not None
        call_id = self.format.tools.make_id()
        return "toolu_" + call_id.removeprefix("call_") if call_id.startswith("call_") else call_id


class AnswerBuilder:
    """Gathers the deltas of a whole answer."""

    def __init__(self, form: Form) -> None:
        self._form = form
        self._parser = form.format.parser()
        self._pieces: list[Event] = []
        self._last: Delta | None = None

    def add(self, delta: Delta) -> None:
        self._pieces += self._parser.push(delta.text, len(delta.token_ids))
        self._last = delta

    def finish(self) -> MessageAnswer:
        """The answer, after the last delta."""
        form, last = self._form, self._last
        assert last is not None, "a generation has at least one delta"
        pieces = [] if form.is_empty else [*self._pieces, *self._parser.flush()]
        reason, sequence = form.stop_reason(last, self._parser)
        return MessageAnswer(
            id=form.id,
            model=form.model,
            content=[block.build() for block in _blocks(pieces, form)],
            stop_reason=reason,
            stop_sequence=sequence,
            usage=form.usage(last, self._parser),
        )


class _TextBuilder:
    def __init__(self) -> None:
        self.texts: list[str] = []

    def build(self) -> TextBlock:
        return TextBlock(text="".join(self.texts))


class _ThinkingBuilder:
    def __init__(self, *, is_omitted: bool) -> None:
        self.texts: list[str] = []
        self._is_omitted = is_omitted

    def build(self) -> ThinkingBlock:
        text, signature = "".join(self.texts), Signature(carries_text=self._is_omitted)
        signature.add(text)
        return ThinkingBlock(thinking="" if self._is_omitted else text, signature=str(signature))


class _ToolUseBuilder:
    def __init__(self, call_id: str, name: str) -> None:
        self.texts: list[str] = []
        self._id = call_id
        self._name = name

    def build(self) -> ToolUseBlock:
        return ToolUseBlock(id=self._id, name=self._name, input=_input("".join(self.texts)))


_Builder = _TextBuilder | _ThinkingBuilder | _ToolUseBuilder


def _blocks(pieces: Sequence[Event], form: Form) -> list[_Builder]:
    """One block for each run of pieces of the same kind."""
    blocks: list[_Builder] = []
    for piece in pieces:
        last = blocks[-1] if blocks else None
        match piece:
            case CallBegin():
                blocks.append(_ToolUseBuilder(form.make_call_id(), piece.name))
                continue
            case Text() if not isinstance(last, _TextBuilder):
                blocks.append(_TextBuilder())
            case Reasoning() if not isinstance(last, _ThinkingBuilder):
                blocks.append(_ThinkingBuilder(is_omitted=form.omits_thoughts))
            case CallArguments():
                assert isinstance(last, _ToolUseBuilder), "arguments follow their call"
        blocks[-1].texts.append(piece.text)
    return blocks


def _input(arguments: str) -> dict[str, Any]:
    """A call's arguments as an object, parsed as far as they go if the output was cut, as Anthropic's SDKs do with the
    events of a stream. Empty if the model did not write an object."""
    try:
        value = from_json(arguments, allow_partial=True)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
