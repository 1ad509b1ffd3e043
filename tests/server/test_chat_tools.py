"""Custom tools, allowed tools and OpenAI's old functions in chats, and messages that servers emit taken back."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from tests.server.client import CHAT, chat, events
from tests.server.fake_engine import FakeEngine, serving
from tests.server.hermes import CALL, hermes

WEATHER: Any = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}
GRAMMAR: Any = {"type": "grammar", "grammar": {"syntax": "regex", "definition": "[a-z ]+"}}
SQL: Any = {"type": "custom", "custom": {"name": "sql", "description": "Runs SQL.", "format": GRAMMAR}}
SQL_CALL = '<tool_call>\n{"name": "sql", "arguments": {"input": "select \\"a\\";\\n"}}\n</tool_call>'
TEXT = 'select "a";\n'


def template_messages(engine: FakeEngine) -> list[dict[str, Any]]:
    assert engine.chat_template is not None
    return engine.chat_template.messages


async def test_a_custom_tool_is_called_with_text() -> None:
    engine = hermes("First. " + CALL + SQL_CALL)
    message = (await chat(engine, tools=[WEATHER, SQL]))["choices"][0]["message"]
    weather, sql = message["tool_calls"]
    assert weather["type"] == "function" and sql.pop("id").startswith("call_")
    assert sql == {"type": "custom", "custom": {"name": "sql", "input": TEXT}}
    assert engine.chat_template is not None
    shown = engine.chat_template.tools[1]["function"]
    assert "[a-z ]+" in shown["description"] and list(shown["parameters"]["properties"]) == ["input"]


async def test_a_streamed_custom_call_adds_up_to_the_whole_one() -> None:
    chunks = await events(hermes(CALL + SQL_CALL), "/v1/chat/completions", {**CHAT, "tools": [WEATHER, SQL]})
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    calls = [call for delta in deltas for call in delta.get("tool_calls", []) if call["index"] == 1]
    assert (calls[0]["type"], calls[0]["custom"]) == ("custom", {"name": "sql", "input": ""})
    assert "".join(call["custom"]["input"] for call in calls) == TEXT and len(calls) > 3
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


async def test_tool_choice_takes_custom_and_allowed_tools() -> None:
    engine = hermes(SQL_CALL)
    await chat(engine, tools=[WEATHER, SQL], tool_choice={"type": "custom", "custom": {"name": "sql"}})
    grammar = engine.calls[-1].params.grammar
    assert grammar is not None and "sql" in grammar.text and "get_weather" not in grammar.text
    named = {"type": "function", "function": {"name": "get_weather"}}
    allowed = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [named]}}
    await chat(engine, tools=[WEATHER, SQL], tool_choice=allowed)
    grammar = engine.calls[-1].params.grammar
    assert grammar is not None and "get_weather" in grammar.text and "sql" not in grammar.text


@pytest.mark.parametrize("stream", [False, True])
async def test_functions_are_called_in_their_old_form(stream: bool) -> None:
    engine = hermes(CALL + CALL)
    body: dict[str, Any] = {"functions": [WEATHER["function"]], "function_call": "auto"}
    if stream:
        chunks = [chunk["choices"][0] for chunk in await events(engine, "/v1/chat/completions", {**CHAT, **body})]
        pieces = [chunk["delta"]["function_call"] for chunk in chunks if "function_call" in chunk["delta"]]
        call = {"name": pieces[0]["name"], "arguments": "".join(piece["arguments"] for piece in pieces)}
        reason = chunks[-1]["finish_reason"]
    else:
        choice = (await chat(engine, **body))["choices"][0]
        call, reason = choice["message"]["function_call"], choice["finish_reason"]
        assert "tool_calls" not in choice["message"]
    assert call["name"] == "get_weather" and json.loads(call["arguments"]) == {"city": "Köln"}
    assert reason == "function_call"
    named = {"functions": [WEATHER["function"]], "function_call": {"name": "get_weather"}}
    await chat(engine, **named)
    assert engine.calls[-1].params.grammar is not None


async def test_what_servers_emit_is_taken_back() -> None:
    engine = FakeEngine()
    called = {"id": "1", "type": "custom", "custom": {"name": "sql", "input": TEXT}, "index": 0}
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "a", "name": "Ann"},
        {"role": "assistant", "content": None, "refusal": None, "annotations": [], "audio": None, "function_call": None,
         "tool_calls": [], "reasoning": "Hm.", "reasoning_content": None},
        {"role": "assistant", "content": [], "refusal": "No."},
        {"role": "assistant", "content": "", "reasoning_content": "So.", "tool_calls": [called]},
        {"role": "tool", "tool_call_id": "1", "content": None},
        {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}},
        {"role": "function", "name": "f", "content": "2"},
    ]  # fmt: skip
    await chat(engine, messages=messages)
    assert template_messages(engine) == [
        {"role": "user", "content": "a", "name": "Ann"},
        {"role": "assistant", "content": "", "reasoning_content": "Hm."},
        {"role": "assistant", "content": "No."},
        {"role": "assistant", "content": "", "reasoning_content": "So.", "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "sql", "arguments": {"input": TEXT}}}]},
        {"role": "tool", "tool_call_id": "1", "content": ""},
        {"role": "assistant", "content": "", "tool_calls": [
            {"type": "function", "function": {"name": "f", "arguments": {}}}]},
        {"role": "tool", "name": "f", "content": "2"},
    ]  # fmt: skip


async def test_an_image_in_a_result_is_replaced_by_a_note() -> None:
    engine = FakeEngine()
    parts = [{"type": "text", "text": "a.png:"}, {"type": "image_url", "image_url": {"url": "data:,"}}]
    await chat(engine, messages=[*CHAT["messages"], {"role": "tool", "tool_call_id": "1", "content": parts}])
    assert template_messages(engine)[-1]["content"].startswith("a.png:\n(an image, which this model cannot read")


def test_the_client_reads_a_custom_call() -> None:
    engine = hermes(SQL_CALL)
    with serving(engine) as url, openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0) as client:
        question: Any = {"role": "user", "content": "a"}
        answer = client.chat.completions.create(model="tiny", messages=[question], tools=[SQL])
        [call] = answer.choices[0].message.tool_calls or []
        assert call.type == "custom" and call.custom.input == TEXT
        said: Any = answer.choices[0].message
        result: Any = {"role": "tool", "tool_call_id": call.id, "content": "[]"}
        client.chat.completions.create(model="tiny", messages=[question, said, result], tools=[SQL])
        assert template_messages(engine)[1]["tool_calls"][0]["function"]["arguments"] == {"input": TEXT}
