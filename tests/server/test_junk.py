"""Junk bodies never break the server, and every refusal has OpenAI's shape."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from tests.server.client import client_of
from tests.server.fake_engine import FakeEngine
from tests.server.request_fields import BOTH, CHAT_ONLY, COMPLETION_ONLY, NEUTRAL
from tests.sweeps import examples

NAMES = sorted(
    {name for body, _ in BOTH + CHAT_ONLY + COMPLETION_ONLY for name in body} | set(NEUTRAL) | {"model", "x"}
)

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([0, 1, 2, 2**63, 2**70, -1])
    | st.floats()
    | st.text(st.characters(exclude_categories=()), max_size=5)  # including lone surrogates
    | st.sampled_from(["user", "assistant", "tiny", "text", "none", "auto"])
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "type", "text", "include_usage", "function"]), inner, max_size=4
        )
    ),
    max_leaves=8,
)
message = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "system", "tool", "assistant"]), "content": values},
    optional={"tool_calls": values, "name": values},
)
bodies = st.fixed_dictionaries(
    {"prompt": st.just("a") | values, "messages": st.lists(message, min_size=1, max_size=2) | values},
    optional={name: values for name in NAMES if name not in ("prompt", "messages")},
)


async def check(path: str, content: bytes) -> None:
    async with client_of(FakeEngine(reply="ab")) as client:
        response = await client.post(path, content=content, headers={"content-type": "application/json"})
    assert response.status_code in (200, 400, 404), response.text
    if response.status_code != 200:
        error: dict[str, Any] = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["message"] and error["type"] == "invalid_request_error"


@examples(40, 150)
@given(path=st.sampled_from(["/v1/completions", "/v1/chat/completions"]), body=bodies | values)
def test_junk_fields_are_answered_or_refused(path: str, body: Any) -> None:
    asyncio.run(check(path, json.dumps(body).encode()))


@examples(15, 50)
@given(path=st.sampled_from(["/v1/completions", "/v1/chat/completions"]), content=st.binary(max_size=40))
def test_junk_bytes_are_refused(path: str, content: bytes) -> None:
    asyncio.run(check(path, content))


async def test_what_is_too_deep_or_too_short_is_refused_in_words_of_ours() -> None:
    stop = {"max_tokens": 1, "messages": [{"role": "user", "content": "x"}], "stop_sequences": [""]}
    for content, words in (
        (b'{"messages": ' + b"[" * 15_000 + b"]" * 15_000 + b"}", "nested too deeply"),
        (json.dumps(stop).encode(), "stop_sequences.0 is '': it must have at least 1 character"),
    ):
        async with client_of(FakeEngine()) as client:
            response = await client.post("/v1/messages", content=content, headers={"content-type": "application/json"})
        assert response.status_code == 400 and words in response.json()["error"]["message"]
