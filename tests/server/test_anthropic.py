"""/v1/messages, with a fake engine."""

from __future__ import annotations

import json
from typing import Any

import httpx

from tests.server.client import client_of, post
from tests.server.fake_engine import FakeEngine, TagTemplate
from tests.server.hermes import CALL, THINKING

URL = "/v1/messages"
USER = {"role": "user", "content": "hi"}
TOOL = {"name": "get_weather", "description": "Weather.", "input_schema": {"type": "object", "properties": {}}}


def reasoning(reply: str, **settings: Any) -> FakeEngine:
    """An engine that replies `reply`, with the template of a model that reasons and calls tools."""
    return FakeEngine(reply=reply, chat_template=TagTemplate(THINKING), **settings)


async def ask(engine: FakeEngine, **body: Any) -> dict[str, Any]:
    response = await post(engine, URL, {"model": "tiny", "max_tokens": 500, "messages": [USER], **body})
    assert response.status_code == 200, response.text
    return dict(response.json())


def events_of(response: httpx.Response) -> list[dict[str, Any]]:
    """The events of a stream, after a check that each is named by its type."""
    assert response.headers["content-type"].startswith("text/event-stream")
    *frames, rest = response.text.split("\n\n")
    assert rest == ""
    events = []
    for frame in frames:
        name, _, data = frame.partition("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    return events


async def stream(engine: FakeEngine, **body: Any) -> list[dict[str, Any]]:
    body = {"model": "tiny", "max_tokens": 500, "messages": [USER], "stream": True, **body}
    response = await post(engine, URL, body)
    assert response.status_code == 200, response.text
    return events_of(response)


async def test_a_streamed_answer_has_every_event_in_order() -> None:
    engine = reasoning(f"<think>hm</think>Sure.{CALL}")
    async with client_of(engine) as client:
        body = {"max_tokens": 500, "messages": [USER], "tools": [TOOL], "stream": True}
        response = await client.post(f"{URL}?beta=true", json=body, headers={"anthropic-version": "2023-06-01"})
    kinds = [event["type"] for event in events_of(response)]
    assert kinds[:3] == ["message_start", "ping", "content_block_start"]
    assert kinds.count("content_block_start") == kinds.count("content_block_stop") == 3
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    calls = [event for event in events_of(response) if event.get("index") == 2]
    assert calls[0]["content_block"]["input"] == {} and calls[1]["delta"]["partial_json"] == ""
    assert json.loads("".join(event["delta"]["partial_json"] for event in calls[1:-1])) == {"city": "Köln"}


async def test_a_whole_answer_has_its_blocks_and_its_usage() -> None:
    answer = await ask(reasoning(f"<think>hm</think>Sure.{CALL}"), tools=[TOOL])
    thinking, text, call = answer["content"]
    assert thinking["thinking"] == "hm" and thinking["signature"]
    assert text == {"type": "text", "text": "Sure."}
    assert call["name"] == "get_weather" and call["input"] == {"city": "Köln"} and call["id"].startswith("toolu_")
    assert answer["stop_reason"] == "tool_use"
    usage = answer["usage"]
    assert usage["cache_read_input_tokens"] == 4 and usage["cache_creation_input_tokens"] == 0
    assert usage["input_tokens"] + 4 == len("<user>hi\n<assistant>") and usage["output_tokens"] > 0
