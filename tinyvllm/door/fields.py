"""The few fields of a request's body that the door reads, without parsing the rest.

msgspec takes 15 to 45 ms to skip 16 MiB and holds the interpreter meanwhile, which would stall every stream. So large
bodies are searched on a thread, in many short steps that let other threads run.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator

import msgspec

LARGE_BYTES = 256 * 2**10
MAX_VALUE_BYTES = 4096  # of a field in a large body; a longer one is not a name

_STRUCTURE = re.compile(rb"\s*[:,]?\s*")
_SCALAR = re.compile(rb"[^\s,}\]]{1,64}")


class BodyFields(msgspec.Struct):
    """What the door reads. Wrong types are left to the route, which names the field."""

    model: object = None
    stream: object = None
    keep_alive: object = None
    previous_response_id: object = None
    lora_name: object = None
    prompt: msgspec.Raw = msgspec.Raw()
    messages: msgspec.Raw = msgspec.Raw()

    @property
    def has_input(self) -> bool:
        """Whether an Ollama request does more than load or unload its model."""
        return any(bytes(raw) not in (b"", b'""', b"[]", b"null") for raw in (self.prompt, self.messages))


async def read_fields(body: bytes) -> BodyFields:
    """The fields that the door reads. All are missing if the body is not a JSON object."""
    if len(body) > LARGE_BYTES:
        return await asyncio.to_thread(search_fields, body)
    try:
        return msgspec.json.decode(body, type=BodyFields)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return BodyFields()


def search_fields(body: bytes) -> BodyFields:
    """The same, found by skipping from string to string. The values of other fields are not checked."""
    found: dict[str, object] = {}
    for key, start in _top_level_keys(body):
        if key not in (b"model", b"stream", b"keep_alive", b"previous_response_id"):
            if key in (b"prompt", b"messages"):
                found[key.decode()] = msgspec.Raw(b"?")
            continue
        if body[start : start + 1] == b'"':
            value = body[start : _string_end(body, start, start + MAX_VALUE_BYTES)]
        else:
            scalar = _SCALAR.match(body, start)
            value = b"" if scalar is None else scalar[0]
        try:
            found[key.decode()] = msgspec.json.decode(value)
        except (msgspec.DecodeError, UnicodeDecodeError):
            found[key.decode()] = None
    return BodyFields(**found)  # type: ignore[arg-type]


def _top_level_keys(body: bytes) -> Iterator[tuple[bytes, int]]:
    """(key, where its value begins) for each key of the outermost object."""
    depth = position = 0
    while (quote := body.find(b'"', position)) >= 0:
        depth += _depth_change(body, position, quote)
        end = _string_end(body, quote, len(body))
        if end < 0:
            return
        position = end
        if depth == 1:
            between = _STRUCTURE.match(body, end)
            assert between is not None
            if b":" in between[0]:
                yield body[quote + 1 : end - 1][:64], between.end()


def _depth_change(body: bytes, start: int, end: int) -> int:
    opened = body.count(b"{", start, end) + body.count(b"[", start, end)
    return opened - body.count(b"}", start, end) - body.count(b"]", start, end)


def _string_end(body: bytes, quote: int, limit: int) -> int:
    """The position after the string that begins at `quote`; -1 if it does not end before `limit`."""
    position = quote + 1
    while (end := body.find(b'"', position, limit)) >= 0:
        backslashes = 0
        while body[end - 1 - backslashes] == 0x5C:
            backslashes += 1
        if backslashes % 2 == 0:
            return end + 1
        position = end + 1
    return -1
