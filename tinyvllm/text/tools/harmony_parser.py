"""Read harmony messages, `<|start|>{header}<|message|>{content}<|end|>`, as gpt-oss writes them.

A header names a role, a channel and perhaps a recipient and a content type, in the forms that OpenAI's own parser
accepts: https://github.com/openai/harmony/blob/f573ab5f5299fa339eac413808492d186d22d2df/src/encoding.rs

What becomes of a message:

- addressed to `functions.NAME`, or to a tool of the request by its bare name: a call, if the request has tools;
- in the channel `final`: content;
- of another role than the assistant's, in the channel `analysis`, or addressed to a built-in tool: reasoning;
- everything else (`commentary` without a recipient, other channels or none): content.

Messages of one kind are separated by a blank line. What is not a message (no `<|message|>` after a header) is content,
or belongs to the message that it interrupts; only roles, channels, recipients and types are dropped.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from tinyvllm.text.tools.events import CallArguments, CallBegin, Event, Reasoning, Text, ToolParser, joined
from tinyvllm.text.tools.marks import MarkFinder

START, CHANNEL, CONSTRAIN, MESSAGE = "<|start|>", "<|channel|>", "<|constrain|>", "<|message|>"
ENDS = ("<|end|>", "<|call|>", "<|return|>")
FUNCTIONS = "functions."
_TO_NOBODY = ("assistant", "all", "user")  # recipients that are not tools
_MAX_HEADER = 256  # characters; the longest names of functions have 64

Kind = Literal["reasoning", "text", "call"]


_ROLE = re.compile(
    r"\s*(?:(assistant|user|system|developer|tool)(?::[^\s<]*)?(?=[\s<]|$)|(functions\.[^\s<]+)(?=\s+to=))"
)
_FIELD = re.compile(
    r"\s*(?:<\|channel\|>(?P<channel>[^\s<]*)|<\|constrain\|>[^\s<]*|(?:json|code|text|assistant)(?=[\s<]|$)"
    r"|(?:to=|(?=functions\.))(?P<recipient>[^\s<]+))"
)
_BARE_RECIPIENT = re.compile(r"\s*([^\s<]+)\s*(?:<\|constrain\|>[^\s<]*|json|code|text)?\s*$")


@dataclass(frozen=True)
class Header:
    """The fields of a message's header, and the text from the first word on that is none of them."""

    role: str = "assistant"
    channel: str = ""
    recipient: str = ""
    rest: str = ""

    @classmethod
    def parse(cls, text: str, *, is_complete: bool = True) -> Header:
        """`text`: what follows `<|start|>`; the assistant's role may be missing. is_complete: `<|message|>` follows, so
        that a single unknown word is a recipient."""
        role = _ROLE.match(text)
        position = role.end() if role is not None else 0
        found, rest = {"channel": "", "recipient": ""}, ""
        while position < len(text):
            if field := _FIELD.match(text, position):
                position = field.end()
                found |= {name: value for name, value in field.groupdict().items() if value and not found[name]}
                continue
            channel = text.find(CHANNEL, position)  # what precedes it is unknown
            end = len(text) if channel < 0 else channel
            rest, position = rest + text[position:end], end
        bare = _BARE_RECIPIENT.fullmatch(rest) if is_complete and not found["recipient"] else None
        if bare is not None:
            found["recipient"], rest = bare[1], ""
        rest = rest.lstrip().replace(CONSTRAIN, "")
        return cls("assistant" if role is None else role[1] or role[2], rest=rest, **found)

    def function(self, names: Collection[str] | None) -> str:
        """The function that the message calls; "" if it is not a call. names: the request's tools, None without."""
        if names is None or self.role != "assistant":
            return ""
        if self.recipient in names:
            return self.recipient
        return self.recipient.removeprefix(FUNCTIONS) if self.recipient.startswith(FUNCTIONS) else ""

    @property
    def kind(self) -> Kind:
        """Where the content of a message that is not a call belongs."""
        if self.role == "assistant" and self.channel == "final":
            return "text"
        is_to_tool = self.recipient not in ("", *_TO_NOBODY) and not self.recipient.startswith(FUNCTIONS)
        is_inner = self.role != "assistant" or self.channel == "analysis" or is_to_tool
        return "reasoning" if is_inner else "text"


class HarmonyParser(ToolParser):
    """Splits one completion, which may have several messages, into reasoning, text and calls. Whitespace is kept.

    Owns the characters that may be part of a mark, and the header of a message until it is complete.
    """

    def __init__(
        self,
        names: Collection[str] | None = None,
        opening: str = "assistant",
        mark: str = "",
        *,
        is_chat: bool = True,
        splits_reasoning: bool = True,
    ) -> None:
        """names: the request's tools; None: it has none, so calls are text. opening: what the prompt ends with, after
        its last `<|start|>`. mark: the character before the text of special tokens, see Detokenizer. is_chat: the
        answer has one text and one reasoning, so two messages of a kind are separated even if others are between.
        splits_reasoning: False: it is text."""
        super().__init__()
        self._names = names
        self._mark = mark
        self._is_chat = is_chat
        self._splits_reasoning = splits_reasoning
        self._marks = MarkFinder(*(mark + text for text in (START, CHANNEL, CONSTRAIN, MESSAGE, *ENDS)))
        self._header: str | None = opening  # None: the content of a message is being read
        self._raw = ""  # the header as it was written; not what the prompt contains
        self._has_marks = False  # in the header, after the prompt
        self._interrupts = False  # the header began inside the content of a message
        self._kind: Kind = "text"
        self._has_arguments = False  # of the call that is being read
        self._separated: set[Kind] = set()  # kinds whose next text is preceded by a blank line
        self._seen: set[Kind] = set()
        if MESSAGE in opening:
            header, _, _ = opening.partition(MESSAGE)
            self._header, self._kind = None, self._kind_of(Header.parse(header))

    def push(self, text: str) -> list[Event]:
        events: list[Event] = []
        first = self._mark or "<"
        position = 0
        while position < len(text):
            if not self._marks.held:  # everything up to the next mark at once
                end = text.find(first, position)
                if end != position:
                    end = len(text) if end < 0 else end
                    events += self._take(text[position:end])
                    position = end
                    continue
            events += self._read(text[position])
            position += 1
        return joined(events)

    def _read(self, character: str) -> list[Event]:
        mark = self._marks.held + character
        text, is_found = self._marks.read(character)
        if is_found:
            return self._take_mark(mark.removeprefix(self._mark))
        return self._take(text) if text else []

    def flush(self) -> list[Event]:
        events = self._take(self._marks.held) if self._marks.held else []
        self._marks.held = ""
        if self._header is not None:
            events += self._end_header()
        return joined(events + self._end_message())

    def _take(self, text: str) -> list[Event]:
        """Text between marks."""
        if self._mark:
            text = text.replace(self._mark, "")
        for position, character in enumerate(text):
            if self._header is None:
                return self._write(text[position:])
            self._header += character
            self._raw += character
            if not self._may_be_header():
                return self._end_header() + self._write(text[position + 1 :])
        return []

    def _may_be_header(self) -> bool:
        if len(self._raw) > _MAX_HEADER or "\n" in self._raw.strip():
            return False
        words = self._raw.lstrip()  # after the role, which the prompt has written
        starts = ("to=", FUNCTIONS, "assistant")
        return self._has_marks or any(words.startswith(start[: len(words)]) for start in starts)

    def _take_mark(self, mark: str) -> list[Event]:
        if self._header is None:
            if mark in ENDS:
                return self._end_message()
            if mark not in (START, CHANNEL):
                return self._write(mark)
            self._begin_header(mark, interrupts=True)
            return []
        if mark == MESSAGE:
            return self._begin_message(Header.parse(self._header, is_complete=not self._interrupts))
        if mark in ENDS:
            return self._end_header() + self._end_message()
        if mark == START:
            interrupts = self._interrupts
            events = self._end_header() if self._header.strip() else []
            self._begin_header(mark, interrupts=interrupts)
            return events
        self._header += mark
        self._raw += mark
        self._has_marks = True
        return []

    def _kind_of(self, header: Header) -> Kind:
        return header.kind if self._splits_reasoning else "text"

    def _begin_header(self, mark: str, *, interrupts: bool) -> None:
        self._header, self._raw = ("" if mark == START else mark), mark
        self._has_marks, self._interrupts = True, interrupts

    def _begin_message(self, header: Header) -> list[Event]:
        if self._interrupts and header.rest:  # words, so the mark was part of the message's text
            return self._end_header() + self._write(MESSAGE)
        events = self._end_message() if self._interrupts else []
        name = header.function(self._names)
        self._header, self._kind = None, "call" if name else self._kind_of(header)
        self._has_arguments = False
        self._begin_text()
        if name:
            self._seen = self._seen if self._is_chat else set()
            return events + self._called([CallBegin(self.num_calls, name)])
        return events + self._write(f"{header.rest.rstrip()} " if header.rest else "")

    def _end_message(self) -> list[Event]:
        """The end of a message; a header follows."""
        events: list[Event] = []
        if self._kind == "call" and not self._has_arguments:
            events = [CallArguments(self.num_calls - 1, "{}")]
        self._header, self._raw, self._has_marks, self._interrupts = "", "", False, False
        self._kind = "text"
        return events

    def _end_header(self) -> list[Event]:
        """Give up a header without a message. Inside a message, or without any marks, it was text; otherwise only those
        of its words are text that are none of its fields."""
        assert self._header is not None
        header, self._header = Header.parse(self._header, is_complete=False), None
        if self._interrupts:
            self._interrupts = False
            return self._write(self._raw)
        self._kind = self._kind_of(header) if self._has_marks else "text"
        self._begin_text()
        return self._write(header.rest if self._has_marks else self._raw)

    def _begin_text(self) -> None:
        if self._kind in self._seen:
            self._separated.add(self._kind)

    def _write(self, text: str) -> list[Event]:
        """The next piece of the message's content."""
        if not text:
            return []
        if self._kind == "call":
            self._has_arguments = True
            return [CallArguments(self.num_calls - 1, text)]
        if self._kind in self._separated:
            text = f"\n\n{text}"
        self._separated.discard(self._kind)
        self._seen = {*self._seen, self._kind} if self._is_chat else {self._kind}
        return [Reasoning(text) if self._kind == "reasoning" else Text(text)]
