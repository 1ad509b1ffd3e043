"""Parse a streamed answer from the bytes of a connection: HTTP/1.1 framing and server-sent events. No I/O.

Written for speed: a network read that carries one token costs a few microseconds, one that carries many costs about two
microseconds a token. Every piece of text gets the arrival time of the read that completed its event.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, Protocol

import msgspec

from tinyvllm.bench.load_answers import Answer

MAX_HEAD = 1 << 16  # bytes of a response's status line and headers
MAX_ERROR_BODY = 1 << 16  # bytes kept of a body that explains an error


class _Delta(msgspec.Struct):
    """The fields of a chat's delta that carry text. vLLM has used both names for reasoning."""

    content: Any = None
    reasoning_content: Any = None
    reasoning: Any = None
    tool_calls: Any = None


class _Choice(msgspec.Struct):
    text: Any = None
    delta: _Delta | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class _Event(msgspec.Struct):
    """A chunk of /v1/completions or /v1/chat/completions, or an error in place of one."""

    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    error: Any = None


_decode = msgspec.json.Decoder(_Event).decode


class EventStream:
    """Records server-sent events in an answer. Format: WHATWG HTML, section 9.2.6 (lines end in CR, LF or CRLF)."""

    __slots__ = ("_answer", "_data", "_expects_lf", "_tail", "is_done")

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self._tail = b""  # the beginning of a line
        self._data: list[bytes] = []  # the data lines of an event that has not ended
        self._expects_lf = False  # the last line ended in CR: an LF that follows belongs to it
        self.is_done = False  # [DONE] has come

    def take(self, data: bytes, now_s: float) -> None:
        """Take the next bytes, which arrived at `now_s`. Raises ValueError for an event that is not JSON."""
        if not data:
            return
        if self._expects_lf:
            self._expects_lf = False
            data = data.removeprefix(b"\n")
            if not data:
                return
        self._expects_lf = data.endswith(b"\r")
        lines = (self._tail + data).splitlines()
        self._tail = b"" if data[-1] in b"\r\n" else lines.pop()
        for line in lines:
            if line.startswith(b"data:"):
                self._data.append(line[5:])
            elif not line and self._data:
                self._end_event(now_s)

    def finish(self, now_s: float) -> None:
        """The body has ended: an event whose empty line is missing ends too."""
        if self._tail:
            self.take(b"\n", now_s)
        if self._data:
            self._end_event(now_s)

    def _end_event(self, now_s: float) -> None:
        data = self._data[0] if len(self._data) == 1 else b"\n".join(self._data)
        self._data = []
        if data.strip() == b"[DONE]":
            self.is_done = True
            return
        event, answer = _decode(data), self._answer
        for choice in event.choices or ():
            delta = choice.delta
            if choice.text or (
                delta and (delta.content or delta.reasoning_content or delta.reasoning or delta.tool_calls)
            ):
                answer.text_s.append(now_s)
        if event.usage is not None:
            answer.num_input, answer.num_output = event.usage.prompt_tokens, event.usage.completion_tokens
        if event.error:
            answer.error = _message(event.error)


class _Framing(Protocol):
    """Finds a body in the bytes after the headers."""

    is_complete: bool

    def take(self, data: bytes) -> bytes:
        """The bytes of the body in `data`. Raises ValueError if they are malformed."""
        ...


class Chunked:
    """Transfer-Encoding: chunked. RFC 9112, section 7.1."""

    def __init__(self) -> None:
        self.is_complete = False
        self._left = 0  # bytes to come of the current chunk
        self._tail = b""  # the beginning of a chunk's size line, or of a trailer
        self._is_between = False  # the next size line comes after a chunk, whose CRLF is still to come
        self._is_after_last = False
        self.trailers: list[bytes] = []  # the lines after the last chunk

    def take(self, data: bytes) -> bytes:
        if self._tail:
            data, self._tail = self._tail + data, b""
        parts: list[bytes] = []
        place, end = 0, len(data)
        while place < end and not self.is_complete:
            if self._left:
                part = data[place : place + self._left]
                parts.append(part)
                place += len(part)
                self._left -= len(part)
                continue
            start = place + 2 if self._is_between else place
            stop = data.find(b"\r\n", start)
            if stop < 0:
                self._tail = data[place:]
                if len(self._tail) > MAX_HEAD:
                    raise ValueError(f"a chunk's size line is longer than {MAX_HEAD} bytes")
                break
            if self._is_between and data[place:start] != b"\r\n":
                raise ValueError(f"a chunk ends in {data[place:start]!r} instead of CRLF")
            self._take_line(data[start:stop])
            place = stop + 2
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _take_line(self, line: bytes) -> None:
        """A chunk's size, or a trailer; the empty line after the last chunk ends the body."""
        if self._is_after_last:
            self.is_complete = not line
            if line:
                self.trailers.append(line)
            return
        self._left = int(line.partition(b";")[0], 16)
        if self._left < 0:
            raise ValueError(f"a chunk's size is {line!r}")
        self._is_between = self._left > 0
        self._is_after_last = not self._left


class Sized:
    """Content-Length: a body of `size` bytes."""

    def __init__(self, size: int) -> None:
        self._left = size
        self.is_complete = size == 0

    def take(self, data: bytes) -> bytes:
        part = data[: self._left]
        self._left -= len(part)
        self.is_complete = not self._left
        return part


class UntilClosed:
    """Neither length nor chunks: the server closes the connection after the body."""

    is_complete = False

    def take(self, data: bytes) -> bytes:
        return data


class Response:
    """Parses one response and records it in `answer`: the events of a 200, the error of any other status."""

    __slots__ = ("_answer", "_body", "_framing", "_head", "_stream", "is_complete", "keeps_alive", "status")

    def __init__(self, answer: Answer) -> None:
        self.status = 0  # 0 until the headers are complete
        self.keeps_alive = False  # whether another request may follow on the connection
        self.is_complete = False
        self._answer = answer
        self._stream = EventStream(answer)
        self._framing: _Framing = UntilClosed()
        self._head = b""
        self._body = b""  # of an error

    def take(self, data: bytes, now_s: float) -> None:
        """Take the next bytes, which arrived at `now_s`. Raises ValueError unless they are HTTP/1.1 and JSON."""
        if not self.status:
            self._head += data
            data = self._take_head()
            if not self.status:
                return
        body = self._framing.take(data)
        if self.status == 200:
            self._stream.take(body, now_s)
        elif len(self._body) < MAX_ERROR_BODY:
            self._body += body
        if self._framing.is_complete:
            self._finish(now_s)

    def take_end(self, now_s: float) -> None:
        """The server has closed the connection. Raises ValueError if the response is not complete."""
        if self.is_complete:
            return
        if not self.status:
            raise ValueError("the server closed the connection before it answered")
        has_ended = isinstance(self._framing, UntilClosed)
        if has_ended:
            self._finish(now_s)
        if not has_ended or (self.status == 200 and not self._stream.is_done and self._answer.error is None):
            raise ValueError("the server closed the connection in the middle of an answer")

    def _finish(self, now_s: float) -> None:
        self.is_complete = True
        self._answer.end_s = now_s
        if isinstance(self._framing, Chunked):  # of the whole answer, where the head could only tell of its beginning
            self._take_timings(self._framing.trailers)
        if self.status == 200:
            self._stream.finish(now_s)
        else:
            self._answer.error = describe_error(self.status, self._body)

    def _take_head(self) -> bytes:
        """Parse the status line and the headers once they are complete. Returns the bytes of the body so far."""
        while not self.status:
            head, found, rest = self._head.partition(b"\r\n\r\n")
            if not found:
                if len(head) > MAX_HEAD:
                    raise ValueError(f"the response's headers are longer than {MAX_HEAD} bytes")
                return b""
            self._head = rest
            first, *lines = head.split(b"\r\n")
            version, _, status = first.partition(b" ")
            if not version.startswith(b"HTTP/1.") or not status[:3].isdigit():
                raise ValueError(f"the response begins with {first[:80]!r}, which is not HTTP/1.1")
            if status[:1] != b"1":  # 100 Continue and 103 Early Hints come before the response
                self.status = int(status[:3])
                self._take_headers(version, lines)
        return self._head

    def _take_timings(self, lines: Sequence[bytes]) -> None:
        """Where the server's time went, if one of the lines is a `Server-Timing` field."""
        found = dict[str, float]()
        for line in lines:
            name, _, value = line.partition(b":")
            if name.strip().lower() == b"server-timing":
                found |= parse_server_timing(value.decode("latin-1"))
        if found:
            self._answer.server_ms = found

    def _take_headers(self, version: bytes, lines: list[bytes]) -> None:
        headers = {}
        self._take_timings(lines)
        for line in lines:
            name, _, value = line.partition(b":")
            headers[name.lower()] = value.strip().lower()
        if (request_id := headers.get(b"x-request-id")) is not None:
            self._answer.request_id = request_id.decode("latin-1")
        default = b"keep-alive" if version == b"HTTP/1.1" else b"close"
        self.keeps_alive = headers.get(b"connection", default) == b"keep-alive"
        if b"chunked" in headers.get(b"transfer-encoding", b""):
            self._framing = Chunked()
        elif b"content-length" in headers or self.status in (204, 304):
            self._framing = Sized(int(headers.get(b"content-length", b"0")))
        else:
            self.keeps_alive = False


def parse_server_timing(value: str) -> dict[str, float]:
    """The durations of a `Server-Timing` field, in ms: `queue;dur=1.5, total;dur=9;desc="all"`. Metrics without one are
    left out (https://www.w3.org/TR/server-timing/)."""
    durations = {}
    for metric in value.split(","):
        name, *parameters = (part.strip() for part in metric.split(";"))
        for parameter in parameters:
            key, _, number = parameter.partition("=")
            if key.strip().lower() == "dur":
                with contextlib.suppress(ValueError):
                    durations[name] = float(number.strip().strip('"'))
    return durations


def describe_error(status: int, body: bytes) -> str:
    """The status and the server's message."""
    try:
        message = _message(msgspec.json.decode(body)["error"])
    except (ValueError, LookupError, TypeError):
        message = body[:200].decode(errors="replace")
    return f"{status}: {message}" if message else str(status)


def _message(error: Any) -> str:
    """OpenAI's errors are objects with a message; other servers send the text alone."""
    return str(error.get("message", error) if isinstance(error, dict) else error)
