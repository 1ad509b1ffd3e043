"""The fields that the door reads of a body are those that a whole parse would find."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from tinyvllm.door.fields import LARGE_BYTES, BodyFields, read_fields, search_fields

SCALARS = st.one_of(st.none(), st.booleans(), st.integers(-(10**6), 10**6), st.text(max_size=12))
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["model", "a", '"', "\\"]), inner),
    max_leaves=12,
)
BODIES = st.dictionaries(st.sampled_from(["messages", "model ", "x", "prompt", "\\model"]), VALUES, max_size=5)


def shown(fields: BodyFields) -> tuple[Any, ...]:
    return fields.model, fields.stream, fields.keep_alive, fields.previous_response_id


@settings(max_examples=60, deadline=None)
@given(BODIES, st.dictionaries(st.sampled_from(["model", "stream", "keep_alive"]), SCALARS), st.booleans())
def test_a_search_finds_what_a_parse_finds(body: dict[str, Any], fields: dict[str, Any], is_pretty: bool) -> None:
    text = json.dumps({**body, **fields}, indent=2 if is_pretty else None, ensure_ascii=is_pretty)
    expected = tuple(fields.get(name) for name in ("model", "stream", "keep_alive", "previous_response_id"))
    assert shown(search_fields(text.encode("utf-8", "surrogatepass"))) == expected


async def test_small_and_large_bodies_are_read_alike() -> None:
    for size in (0, LARGE_BYTES):
        body = {"messages": [{"content": 'a "model": "no" \\' + "x" * size}], "model": "yes", "stream": True}
        assert shown(await read_fields(json.dumps(body).encode())) == ("yes", True, None, None)
        broken = json.dumps(body).encode()[: size // 2 + 20]
        assert (await read_fields(broken)).model is None
    assert not (await read_fields(b'{"model": "a", "keep_alive": 0}')).has_input
    assert (await read_fields(b'{"model": "a", "prompt": "x"}')).has_input
    assert (await read_fields(b"[1]")).model is None
