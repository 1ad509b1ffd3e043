"""/v1/responses: items, events, tools, stored responses, and the openai client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from openai.types.responses import ResponseCompletedEvent, ResponseFunctionToolCall
from pydantic import BaseModel

from tests.server.client import chat, client_of, error_of, post
from tests.server.fake_engine import FakeEngine, TagTemplate, serving
from tests.server.hermes import CALL, THINKING, hermes
from tinyvllm.server.openai import response_store
from tinyvllm.server.openai.response_store import ResponseStore

WEATHER: Any = {
    "type": "function",
    "name": "get_weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}


async def respond(engine: FakeEngine, **body: Any) -> dict[str, Any]:
    response = await post(engine, "/v1/responses", {"input": "hi", **body})
    assert response.status_code == 200, response.text
    return dict(response.json())


async def events_of(engine: FakeEngine, **body: Any) -> list[dict[str, Any]]:
    response = await post(engine, "/v1/responses", {"input": "hi", "stream": True, **body})
    assert response.status_code == 200, response.text
    events = []
    for frame in response.text.removesuffix("\n\n").split("\n\n"):
        name, data = frame.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


async def test_response_has_every_field_of_the_format() -> None:
    answer = await respond(FakeEngine(), metadata={"a": "b"}, instructions="Be brief.")
    assert answer.pop("id").startswith("resp_") and answer.pop("created_at") and answer.pop("completed_at")
    [item] = answer.pop("output")
    assert item.pop("id").startswith("msg_")
    assert item == {
        "type": "message",
        "role": "assistant",
        "status": "completed",
        "content": [{"type": "output_text", "text": "Hello, wörld!", "annotations": [], "logprobs": []}],
    }
    assert answer.pop("usage") == {
        "input_tokens": 38,
        "input_tokens_details": {"cached_tokens": 4, "cache_write_tokens": 0},
        "output_tokens": 13,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 51,
    }
    assert answer == {
        "object": "response", "status": "completed", "background": False, "error": None, "incomplete_details": None,
        "instructions": "Be brief.", "max_output_tokens": None, "model": "tiny", "parallel_tool_calls": True,
        "previous_response_id": None, "reasoning": {"effort": None, "summary": None}, "store": True,
        "temperature": 1.0, "text": {"format": {"type": "text"}}, "tool_choice": "auto", "tools": [],
        "top_logprobs": 0, "top_p": 1.0, "truncation": "disabled", "user": None, "metadata": {"a": "b"},
    }  # fmt: skip


async def test_events_add_up_to_the_answer() -> None:
    events = await events_of(FakeEngine(reply="Hey"))
    assert [event["type"] for event in events] == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
        *["response.output_text.delta"] * 3, "response.output_text.done", "response.content_part.done",
        "response.output_item.done", "response.completed",
    ]  # fmt: skip
    assert "".join(event["delta"] for event in events if event["type"].endswith("text.delta")) == "Hey"
    assert events[0]["response"]["status"] == "in_progress" and events[0]["response"]["output"] == []
    assert events[-1]["response"]["output"][0]["content"][0]["text"] == "Hey"
    assert events[-1]["response"]["usage"]["output_tokens"] == 3


async def test_reasoning_text_and_calls_are_items_of_their_own() -> None:
    reply = f"<think>Hm.</think>Wait. {CALL}{CALL}"
    for stream in (False, True):
        engine = FakeEngine(reply=reply, chat_template=TagTemplate(THINKING))
        if stream:
            events = await events_of(engine, tools=[WEATHER])
            answer = events[-1]["response"]
            added = [event["item"]["id"] for event in events if event["type"] == "response.output_item.added"]
            assert added == [item["id"] for item in answer["output"]]
            for event in events:
                if "item_id" in event:
                    assert event["item_id"] == answer["output"][event["output_index"]]["id"]
        else:
            answer = await respond(engine, tools=[WEATHER])
        reasoning, message, *calls = answer["output"]
        assert reasoning["type"] == "reasoning" and reasoning["content"][0]["text"] == "Hm."
        assert message["content"][0]["text"] == "Wait."
        assert [call["arguments"] for call in calls] == ['{"city": "Köln"}'] * 2
        assert calls[0]["call_id"] != calls[1]["call_id"] and calls[0]["name"] == "get_weather"
        assert answer["usage"]["output_tokens_details"]["reasoning_tokens"] > 0


async def test_a_response_that_is_cut_off_says_so() -> None:
    answer = await respond(FakeEngine(), max_output_tokens=3)
    assert answer["status"] == "incomplete" and answer["incomplete_details"] == {"reason": "max_output_tokens"}
    assert answer["output"][0]["status"] == "incomplete" and answer["output"][0]["content"][0]["text"] == "Hel"
    assert (await events_of(FakeEngine(), max_output_tokens=3))[-1]["type"] == "response.incomplete"


async def test_input_items_become_messages() -> None:
    engine = FakeEngine()
    items = [
        {"role": "developer", "content": "Be brief."},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Weather?"}]},
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]},
        {"type": "function_call", "call_id": "1", "name": "get_weather", "arguments": '{"city": "Rom"}'},
        {"type": "function_call", "call_id": "2", "name": "get_weather", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "1", "output": "sunny"},
        {"type": "function_call_output", "call_id": "2", "output": [{"type": "input_text", "text": "rain"}]},
        {"role": "assistant", "content": [{"type": "output_text", "text": "Sun and rain.", "annotations": []}]},
        {"role": "user", "content": "Thanks."},
    ]
    await respond(engine, input=items, instructions="Speak English.")
    assert engine.chat_template is not None
    messages = engine.chat_template.messages
    assert [message["role"] for message in messages] == [
        "system", "system", "user", "assistant", "tool", "tool", "assistant", "user"
    ]  # fmt: skip
    assert messages[3]["reasoning_content"] == "Hm."
    assert [call["function"]["arguments"] for call in messages[3]["tool_calls"]] == [{"city": "Rom"}, {}]
    assert messages[5] == {"role": "tool", "tool_call_id": "2", "content": "rain"}


async def test_a_response_continues_an_earlier_one() -> None:
    engine = hermes(CALL)
    async with client_of(engine) as client:

        async def ask(**body: Any) -> dict[str, Any]:
            return dict((await client.post("/v1/responses", json={"tools": [WEATHER], **body})).json())

        first = await ask(input="Weather?", instructions="Be brief.")
        call_id = first["output"][0]["call_id"]
        engine.reply = "Sunny."
        result = {"type": "function_call_output", "call_id": call_id, "output": "sun"}
        second = await ask(input=[result], previous_response_id=first["id"])
        assert engine.chat_template is not None
        roles = [message["role"] for message in engine.chat_template.messages]
        assert roles == ["user", "assistant", "tool"], "instructions are of one response"
        assert engine.chat_template.messages[1]["tool_calls"][0]["id"] == call_id
        await ask(input="Thanks.", previous_response_id=second["id"])
        assert [message["content"] for message in engine.chat_template.messages[3:]] == ["Sunny.", "Thanks."]
        got = (await client.get(f"/v1/responses/{second['id']}")).json()
        assert got == second
        assert (await client.delete(f"/v1/responses/{second['id']}")).json()["deleted"] is True
        gone = await client.post("/v1/responses", json={"input": "a", "previous_response_id": second["id"]})
        assert gone.status_code == 404 and error_of(gone)["param"] == "previous_response_id"
        unkept = await ask(input="a", store=False)
        assert (await client.get(f"/v1/responses/{unkept['id']}")).status_code == 404


async def test_a_streamed_response_is_stored_too() -> None:
    async with client_of(FakeEngine()) as client:
        text = (await client.post("/v1/responses", json={"input": "a", "stream": True})).text
        last = json.loads(text.strip().split("\n")[-1].removeprefix("data: "))
        assert (await client.get(f"/v1/responses/{last['response']['id']}")).json() == last["response"]


async def test_only_the_latest_responses_are_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    async with client_of(FakeEngine()) as client:
        client._transport.app.state.responses = ResponseStore(max_responses=2)  # type: ignore[attr-defined]
        ids = [(await client.post("/v1/responses", json={"input": "a"})).json()["id"] for _ in range(3)]
        statuses = [(await client.get(f"/v1/responses/{response_id}")).status_code for response_id in ids]
        assert statuses == [404, 200, 200]
        client._transport.app.state.responses = ResponseStore(max_chars=100)  # type: ignore[attr-defined]
        big = (await client.post("/v1/responses", json={"input": "a" * 200})).json()["id"]
        assert (await client.get(f"/v1/responses/{big}")).status_code == 404
    assert response_store.MAX_RESPONSES * 100 < response_store.MAX_CHARS


async def test_structured_text_reaches_the_engine() -> None:
    engine = FakeEngine(reply="{}")
    form = {"type": "json_schema", "name": "n", "strict": True, "schema": {"type": "null"}}
    answer = await respond(engine, text={"format": form, "verbosity": "low"})
    grammar = engine.calls[0].params.grammar
    assert grammar is not None and (grammar.kind, grammar.text) == ("json_schema", '{"type": "null"}')
    assert answer["text"]["format"] == form


@pytest.mark.parametrize("kind", ["json_object", "json_schema"])
async def test_a_schema_is_enforced_wherever_it_is_given(kind: str) -> None:
    """llama.cpp takes a schema next to the type, also with json_object."""
    engine, form = FakeEngine(reply="{}"), {"type": kind, "schema": {"type": "object", "required": ["zz"]}}
    await respond(engine, text={"format": form})
    await chat(engine, response_format=form)
    grammars = [call.params.grammar for call in engine.calls]
    assert [grammar and (grammar.kind, grammar.text) for grammar in grammars] == [
        ("json_schema", '{"type": "object", "required": ["zz"]}')
    ] * 2


async def test_logprobs_come_with_the_text() -> None:
    answer = await respond(FakeEngine(reply="ab"), include=["message.output_text.logprobs"], top_logprobs=2)
    logprobs = answer["output"][0]["content"][0]["logprobs"]
    assert [entry["token"] for entry in logprobs] == ["a", "b"] and len(logprobs[0]["top_logprobs"]) == 2


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input.0.id"),
        ({"input": [{"type": "wizardry"}]}, "input.0.type"),
        ({"input": [{"type": "mcp_list_tools"}]}, "input"),
        ({"input": [{"type": "compaction_trigger"}]}, "input.0"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input.0.content"),
        ({"input": [{"role": "user"}]}, "input.0.content"),
        ({"input": [{"type": "function_call", "call_id": "1"}]}, "input.0.name"),
        ({"input": [{"type": "function_call_output", "output": "x"}]}, "input.0.call_id"),
        ({"background": True, "store": False}, "store"),
        ({"truncation": "middle"}, "truncation"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"moderation": {"model": "m"}}, "moderation"),
        ({"max_tool_calls": 0}, "max_tool_calls"),
        ({"stream_options": {"include_obfuscation": False}}, "stream_options"),
        ({"conversation": "c"}, "conversation"),
        ({"max_tokens": 5}, "max_tokens"),
        ({"n": 2}, "n"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"include": ["everything"]}, "include.0"),
        ({"tools": [{"type": 5}]}, "tools.0.type"),
        ({"tools": [{"type": "custom"}]}, "tools.0.name"),
        ({"tools": [{"type": "web_search"}], "tool_choice": {"type": "web_search"}}, "tool_choice"),
        ({"tools": [{"type": "web_search"}], "tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "name": "f"}}, "tool_choice"),
        ({"text": {"format": {"type": "json_schema", "name": "n"}}}, "text.format.schema"),
        ({"previous_response_id": "resp_x"}, "previous_response_id"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_output_tokens": 10**6}, "max_output_tokens"),
    ],
)
async def test_bad_field_is_refused_by_name(body: dict[str, Any], param: str) -> None:
    response = await post(FakeEngine(), "/v1/responses", {"input": "hi", **body})
    assert response.status_code in (400, 404) and error_of(response)["param"] == param


async def test_failure_inside_a_stream_is_an_event() -> None:
    events = await events_of(FakeEngine(fail_after=3))
    assert events[-2]["type"] == "response.failed" and events[-2]["response"]["status"] == "failed"
    assert events[-1]["type"] == "error" and "not finite" in events[-1]["message"]
    response = await post(FakeEngine(fail_after=3), "/v1/responses", {"input": "hi"})
    assert response.status_code == 500


# ---- The client ----


@pytest.fixture
def client_and_engine() -> Iterator[tuple[openai.OpenAI, FakeEngine]]:
    engine = hermes("Hello")
    with serving(engine) as url, openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0) as client:
        yield client, engine


def test_client_reads_text_and_events(client_and_engine: tuple[openai.OpenAI, FakeEngine]) -> None:
    client, _ = client_and_engine
    answer = client.responses.create(model="tiny", input="hi")
    assert answer.output_text == "Hello" and answer.usage is not None and answer.usage.output_tokens == 5
    with client.responses.stream(model="tiny", input="hi") as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert final.output_text == "Hello" and kinds[-1] == "response.completed"
    last = list(client.responses.create(model="tiny", input="hi", stream=True))[-1]
    assert isinstance(last, ResponseCompletedEvent)
    assert client.responses.retrieve(last.response.id).output_text == "Hello"


def test_client_reads_calls_and_parsed_text(client_and_engine: tuple[openai.OpenAI, FakeEngine]) -> None:
    class City(BaseModel):
        city: str

    client, engine = client_and_engine
    engine.reply = CALL
    with client.responses.stream(model="tiny", input="hi", tools=[WEATHER]) as stream:
        [item] = stream.get_final_response().output
    assert isinstance(item, ResponseFunctionToolCall) and json.loads(item.arguments) == {"city": "Köln"}
    engine.reply = '{"city": "Rom"}'
    parsed = client.responses.parse(model="tiny", input="hi", text_format=City)
    assert parsed.output_parsed == City(city="Rom")


def test_client_raises_what_fails_in_a_stream(client_and_engine: tuple[openai.OpenAI, FakeEngine]) -> None:
    client, engine = client_and_engine
    engine.fail_after = 2
    with pytest.raises(openai.APIError, match="not finite"):
        list(client.responses.create(model="tiny", input="hi", stream=True))


async def test_a_client_that_leaves_cancels_the_response() -> None:
    engine = FakeEngine(hang_after=3)
    with serving(engine) as url:
        body = {"input": "hi", "stream": True}
        async with (
            httpx.AsyncClient(base_url=url) as client,
            client.stream("POST", "/v1/responses", json=body) as answer,
        ):
            await anext(answer.aiter_lines())
        engine.wait_until(lambda: len(engine.closed) == 1)
