"""Every field of OpenAI's and vLLM's documents is taken, ignored or refused by name, as tests/server/openai_fields.py
says."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from openai.types.chat.completion_create_params import CompletionCreateParamsBase
from openai.types.responses.response_create_params import ResponseCreateParamsBase

from tests.server.client import CHAT as CHAT_BODY
from tests.server.client import client_of, error_of
from tests.server.fake_engine import FakeEngine
from tests.server.openai_fields import CHAT, RESPONSES, VLLM_CHAT, VLLM_RESPONSES

# With what else a field is sent, where it needs it.
WITH: dict[str, Any] = {
    "function_call": {"functions": [{"name": "f"}]},
    "previous_response_id": {},
}


def test_the_tables_have_every_field() -> None:
    assert {*CompletionCreateParamsBase.__annotations__, *VLLM_CHAT} <= CHAT.keys()
    assert {*ResponseCreateParamsBase.__annotations__, *VLLM_RESPONSES} <= RESPONSES.keys()


@pytest.mark.parametrize(
    ("path", "body", "table"),
    [("/v1/chat/completions", CHAT_BODY, CHAT), ("/v1/responses", {"input": "a"}, RESPONSES)],
)
async def test_a_field_is_taken_or_ignored_or_refused(
    path: str, body: dict[str, Any], table: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    async with client_of(FakeEngine()) as client:
        for name, (fate, value) in table.items():
            with caplog.at_level(logging.WARNING):
                response = await client.post(path, json={**body, **WITH.get(name, {}), name: value})
            if fate == "refused":
                assert response.status_code == 400 and error_of(response)["param"] == name, (name, response.text)
            else:
                assert response.status_code == 200, (name, response.text)
            assert fate != "taken" or f"field '{name}' is unknown" not in caplog.text
            nothing = await client.post(path, json={**body, name: None})
            assert nothing.status_code == 200 or name in ("messages", "input"), (name, nothing.text)


async def test_other_names_of_an_effort_reach_the_template() -> None:
    engine = FakeEngine()
    assert engine.chat_template is not None
    off = {"enable_thinking": False}
    for path, body in (("/v1/chat/completions", CHAT_BODY), ("/v1/responses", {"input": "a"})):
        async with client_of(engine) as client:
            for asked in ({"thinking": {"type": "disabled"}}, off, {"reasoning": {"effort": "none"}}):
                await client.post(path, json={**body, **asked})
                assert engine.chat_template.kwargs.items() >= off.items(), asked
