"""Continue a streamed answer from a second run of its request, when whoever computed the first has died.

Both runs generate the same text, since sampling with a seed does not depend on the batch. But their events may divide
it differently, so the second run is cut by text: what the client has received is compared and left out.
"""

from __future__ import annotations

import json
from typing import Any

from tinyvllm.errors import TinyvllmError

_TEXTS = ("text", "content", "reasoning_content")  # fields of a choice or of its delta
_STAMPS = ("id", "created")  # of an event: the client's remain


class ResumeError(TinyvllmError):
    """The second run differs from what was sent, or has a form that cannot be cut."""


class Resumption:
    """What of a second run the client has not received yet. sent: all bytes that it has, from the body's start."""

    def __init__(self, sent: bytes) -> None:
        self._sent = sent
        self._is_stream = sent.startswith((b"data:", b":"))
        self._missing: dict[
            tuple[int, str], str
        ] = {}  # text that the second run has still to repeat, by choice and field
        self._finished: set[int] = set()
        self._stamps: dict[str, Any] = {}
        for event in _events(sent) if self._is_stream else ():
            self._note(event)

    def cut(self, part: bytes) -> bytes:
        """The part without what was sent. Parts come in order and contain whole events. Raises ResumeError."""
        if not self._is_stream:
            known = self._sent[: len(part)]
            if not part.startswith(known):
                raise ResumeError("the second run of the request has another answer: send it again")
            self._sent = self._sent[len(known) :]
            return part[len(known) :]
        return b"".join(self._cut_event(event) for event in _events(part))

    def _note(self, event: Any) -> None:
        if event is None:
            return
        self._stamps = self._stamps or {name: event[name] for name in _STAMPS if name in event}
        for choice in _choices(event):
            for name, text in _texts(choice):
                key = choice["index"], name
                self._missing[key] = self._missing.get(key, "") + text
            if choice.get("finish_reason") is not None:
                self._finished.add(choice["index"])

    def _cut_event(self, event: Any) -> bytes:
        if event is None:
            return b"data: [DONE]\n\n"
        choices = _choices(event)
        if any([self._cut_choice(choice) for choice in choices]) or not choices:
            return b"data: " + json.dumps({**event, **self._stamps}, ensure_ascii=False).encode() + b"\n\n"
        return b""

    def _cut_choice(self, choice: dict[str, Any]) -> bool:
        """Shorten a choice's texts in place. Whether anything is left."""
        is_news = choice.get("finish_reason") is not None and choice["index"] not in self._finished
        holder = choice.get("delta", choice)
        for name, text in _texts(choice):
            missing = self._missing.get((choice["index"], name), "")
            num_known = min(len(missing), len(text))
            if text[:num_known] != missing[:num_known]:
                raise ResumeError("the second run of the request has another answer: send it again")
            self._missing[choice["index"], name] = missing[num_known:]
            holder[name] = text[num_known:]
            is_news = is_news or bool(holder[name])
        return is_news


def _events(part: bytes) -> list[Any]:
    """The events of a part as JSON, None for the last one, [DONE]. Comments are left out."""
    events = []
    for block in part.split(b"\n\n"):
        if block.startswith(b"data: "):
            events.append(None if block == b"data: [DONE]" else json.loads(block[6:]))
        elif block and not block.startswith(b":"):
            raise ResumeError("a stream with named events cannot be continued: send the request again")
    return events


def _choices(event: Any) -> list[dict[str, Any]]:
    """An event's choices. Raises ResumeError if they hold more than text."""
    if "choices" not in event:
        raise ResumeError("the stream contains an error: send the request again")
    for choice in event["choices"]:
        if choice.get("logprobs") or choice.get("delta", {}).get("tool_calls"):
            raise ResumeError("a stream with log-probabilities or tool calls cannot be continued: send it again")
    return list(event["choices"])


def _texts(choice: dict[str, Any]) -> list[tuple[str, str]]:
    holder = choice.get("delta", choice)
    return [(name, holder[name]) for name in _TEXTS if isinstance(holder.get(name), str)]
