"""/v1/messages, with a fake engine."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.server.client import client_of, get, post
from tests.server.fake_engine import FakeEngine, TagTemplate, serving
from tests.server.hermes import CALL, THINKING, hermes
from tests.server.test_harmony import CALL as HARMONY_CALL
from tests.server.test_harmony import PREAMBLE, THOUGHT, harmony
from tests.sweeps import examples
from tinyvllm.engine.output import Delta
from tinyvllm.server.anthropic.answers import AnswerBuilder, Form
from tinyvllm.server.anthropic.events import PING, MessageEvents
from tinyvllm.server.generation import Item
from tinyvllm.server.message import OutputFormat
from tinyvllm.text.reasoning import FORMATS
from tinyvllm.text.tools import find_tool_format
from tinyvllm.text.tools.base import Tool

URL = "/v1/messages"
USER = {"role": "user", "content": "hi"}
TOOL = {"name": "get_weather", "description": "Weather.", "input_schema": {"type": "object", "properties": {}}}
VERSION = {"anthropic-version": "2023-06-01"}


def reasoning(reply: str, **settings: Any) -> FakeEngine:
    """An engine that replies `reply`, with the template of a model that reasons and calls tools."""
    return FakeEngine(reply=reply, chat_template=TagTemplate(THINKING), **settings)


def body_of(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "max_tokens": 500, "messages": [USER], **fields}


async def ask(engine: FakeEngine, **fields: Any) -> dict[str, Any]:
    response = await post(engine, URL, body_of(**fields))
    assert response.status_code == 200, response.text
    return dict(response.json())


async def stream(engine: FakeEngine, **fields: Any) -> list[dict[str, Any]]:
    response = await post(engine, URL, body_of(stream=True, **fields))
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    return events_of(response.text)


def events_of(text: str) -> list[dict[str, Any]]:
    """The events of a stream, after a check that each is named by its type."""
    *frames, rest = text.split("\n\n")
    assert rest == ""
    events = []
    for frame in frames:
        name, _, data = frame.partition("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    return events


def message_of(events: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The message that the events add up to, as Anthropic's SDKs do it."""
    message: dict[str, Any] = {}
    inputs: dict[int, str] = {}
    for event in events:
        match event["type"]:
            case "message_start":
                message = event["message"]
            case "content_block_start":
                assert event["index"] == len(message["content"])
                message["content"].append(event["content_block"])
            case "content_block_delta":
                block, delta = message["content"][event["index"]], dict(event["delta"])
                kind = delta.pop("type")
                delta.pop("estimated_tokens", None)
                [(name, text)] = delta.items()
                if kind == "input_json_delta":
                    inputs[event["index"]] = inputs.get(event["index"], "") + text
                else:
                    block[name] += text
            case "content_block_stop" if message["content"][event["index"]]["type"] == "tool_use":
                message["content"][event["index"]]["input"] = json.loads(inputs[event["index"]] or "{}")
            case "message_delta":
                message |= event["delta"]
                message["usage"] |= event["usage"]
    assert events[-1]["type"] == "message_stop"
    return message


def without_ids(message: dict[str, Any]) -> dict[str, Any]:
    blocks = [{**block, "id": ""} if "id" in block else block for block in message["content"]]
    return {**message, "id": "", "content": blocks}


def error_of(response: httpx.Response) -> str:
    """The message of an error in Anthropic's form."""
    body = response.json()
    assert set(body) == {"type", "error", "request_id"} and body["type"] == "error"
    assert body["request_id"] == response.headers["request-id"]
    assert set(body["error"]) - {"details"} == {"type", "message"}
    return str(body["error"]["message"])


# ---- Answers ----


async def test_a_streamed_answer_has_every_event_in_order() -> None:
    events = await stream(reasoning(f"<think>hm</think>Sure.{CALL}"), tools=[TOOL])
    kinds = [event["type"] for event in events]
    assert kinds[:3] == ["message_start", "ping", "content_block_start"]
    assert kinds.count("content_block_start") == kinds.count("content_block_stop") == 3
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    deltas = [event["delta"]["type"] for event in events if event["type"] == "content_block_delta"]
    assert deltas[:4] == ["thinking_delta", "thinking_delta", "signature_delta", "text_delta"]
    calls = [event for event in events if event.get("index") == 2]
    assert calls[0]["content_block"]["input"] == {} and calls[1]["delta"]["partial_json"] == ""


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
    assert usage["output_tokens_details"] == {"thinking_tokens": 2}


REPLIES = [
    "Hello, wörld!",
    "",
    f"<think>hm\n</think>\n\nSure.\n{CALL}",
    f"{CALL}\n{CALL}\nDone.",
    "<think>never ends",
    '<tool_call>\n{"name": "get_weather", "arguments": {}}\n</tool_call>',
]


@pytest.mark.parametrize("reply", REPLIES)
@pytest.mark.parametrize("more", [{}, {"tools": [TOOL]}, {"thinking": {"type": "adaptive", "display": "omitted"}}])
async def test_the_events_add_up_to_the_whole_answer(reply: str, more: dict[str, Any]) -> None:
    for make in (FakeEngine, reasoning):
        whole = await ask(make(reply=reply), **more)
        assert without_ids(message_of(await stream(make(reply=reply), **more))) == without_ids(whole)


def form_of(*, has_tools: bool) -> Form:
    tools = find_tool_format("hermes", "") if has_tools else None
    format = OutputFormat(
        reasoning=FORMATS["think"], tools=tools, functions={"get_weather": Tool("get_weather")} if has_tools else {}
    )
    return Form(id="msg_1", model="tiny", format=format, stop_sequences=(), num_prompt_tokens=5)


@examples(20, 60)
@given(st.sampled_from(REPLIES), st.lists(st.integers(1, 9), max_size=40), st.booleans())
def test_any_division_of_the_text_gives_the_same_blocks(reply: str, sizes: list[int], has_tools: bool) -> None:
    texts, start = [], 0
    for size in sizes:
        texts.append(reply[start : start + size])
        start += size
    texts.append(reply[start:])
    counts: dict[str, Any] = {"num_prompt_tokens": 5, "num_cached_tokens": 0, "num_output_tokens": 1}
    deltas = [Delta(index=0, text=text, token_ids=(1,), **counts) for text in texts]
    deltas.append(Delta(index=0, text="", token_ids=(), finish_reason="stop", **counts))
    form = form_of(has_tools=has_tools)
    events, builder, whole = MessageEvents(form), AnswerBuilder(form), AnswerBuilder(form)
    written = events.begin()
    for delta in deltas:
        written += events.take(Item(0, 0, delta))
        builder.add(delta)
    whole.add(Delta(index=0, text=reply, token_ids=(1,), finish_reason="stop", **counts))
    contents = [without_ids(builder.finish().model_dump()), without_ids(whole.finish().model_dump())]
    streamed = without_ids(message_of(events_of((written + events.end()).decode())))
    for content in contents:
        assert content["content"] == streamed["content"]


@pytest.mark.parametrize(
    ("fields", "reason", "sequence"),
    [
        ({}, "end_turn", None),
        ({"max_tokens": 3}, "max_tokens", None),
        ({"stop_sequences": ["wör", "never"]}, "stop_sequence", "wör"),
        ({"max_tokens": 10_000}, "end_turn", None),
    ],
)
async def test_how_an_answer_ends(fields: dict[str, Any], reason: str, sequence: str | None) -> None:
    for answer in (await ask(FakeEngine(), **fields), message_of(await stream(FakeEngine(), **fields))):
        assert (answer["stop_reason"], answer["stop_sequence"]) == (reason, sequence)


async def test_an_answer_that_reaches_the_end_of_the_context_says_so() -> None:
    engine = FakeEngine(reply="x" * 2000)
    answer = await ask(engine, max_tokens=32_000)
    assert answer["stop_reason"] == "model_context_window_exceeded"
    assert engine.calls[0].params.max_tokens == 1000 - len("<user>hi\n<assistant>")
    response = await post(FakeEngine(), URL, body_of(messages=[{"role": "user", "content": "x" * 2000}]))
    # Claude Code shortens the conversation when it reads these words
    assert response.status_code == 400 and "prompt is too long: 2018 tokens > 999 maximum" in error_of(response)


async def test_a_call_that_was_cut_has_the_input_so_far() -> None:
    reply = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Köln", "day": "tod'
    answer = await ask(hermes(reply), tools=[TOOL], max_tokens=len(reply) - 1)
    assert answer["content"][0]["input"] == {"city": "Köln"} and answer["stop_reason"] == "max_tokens"


async def test_no_tokens_are_generated_to_warm_the_cache() -> None:
    engine = FakeEngine()
    for answer in (await ask(engine, max_tokens=0), message_of(await stream(engine, max_tokens=0))):
        assert answer["content"] == [] and answer["stop_reason"] == "max_tokens"
        assert answer["usage"]["output_tokens"] == 0
    assert [call.params.max_tokens for call in engine.calls] == [1, 1]


async def test_a_silent_stream_begins_and_pings() -> None:
    engine = FakeEngine(hang_before=True)
    text = ""
    with serving(engine, keepalive_s=0.05) as url:
        async with httpx.AsyncClient() as client, client.stream("POST", url + URL, json=body_of(stream=True)) as answer:
            async for piece in answer.aiter_text():
                text += piece
                if text.count("event: ping") == 3:
                    break
    start, *pings = events_of(text)
    assert start["type"] == "message_start" and {ping["type"] for ping in pings} == {"ping"}
    assert start["message"]["usage"]["input_tokens"] == len("<user>hi\n<assistant>")
    assert PING == b'event: ping\ndata: {"type":"ping"}\n\n'


async def test_an_error_in_a_stream_is_its_last_event() -> None:
    response = await post(FakeEngine(fail_after=3), URL, body_of(stream=True))
    *_, last = events_of(response.text)
    assert last["type"] == "error" and last["error"]["type"] == "api_error"
    assert last["request_id"] == response.headers["request-id"]


async def test_a_token_of_plain_text_is_made_from_ready_bytes() -> None:
    events = MessageEvents(Form(id="m", model="tiny", format=OutputFormat(), stop_sequences=(), num_prompt_tokens=1))
    counts: dict[str, Any] = {"num_prompt_tokens": 1, "num_cached_tokens": 0, "num_output_tokens": 1}
    deltas = [Delta(index=0, text=text, token_ids=(1,), **counts) for text in ("a", "b")]
    events.take(Item(0, 0, deltas[0]))
    events._write = None  # type: ignore[assignment, method-assign]
    assert b'"text":"b"' in events.take(Item(0, 0, deltas[1]))


# ---- Requests ----


async def messages_for(**fields: Any) -> list[dict[str, Any]]:
    """The messages that the template is given."""
    engine = FakeEngine()
    await ask(engine, **fields)
    assert engine.chat_template is not None
    return engine.chat_template.messages


def text(value: str) -> dict[str, Any]:
    return {"type": "text", "text": value, "cache_control": {"type": "ephemeral"}}


async def test_system_prompts_lose_the_accounting_line_of_claude_code() -> None:
    billing = "x-anthropic-billing-header: cc_version=2.1.37.0d9; cc_entrypoint=cli; cch=fa690;"
    system = {"role": "system", "content": "You help.\nBe brief."}
    assert await messages_for(system=[text(billing), text("You help."), text("Be brief.")]) == [system, USER]
    assert await messages_for(system=f"{billing}\nYou help.\nBe brief.") == [system, USER]
    assert await messages_for(system=billing) == [USER]
    quoted = {"role": "system", "content": f"You are told:\n{billing}"}
    assert await messages_for(system=[text(quoted["content"])]) == [quoted, USER]  # only at the beginning of a block
    later = {"role": "system", "content": [text("Agents: a, b")]}
    assert await messages_for(messages=[USER, later]) == [USER, {"role": "system", "content": "Agents: a, b"}]


async def test_a_history_with_tools_becomes_calls_and_results() -> None:
    use = {"type": "tool_use", "id": "toolu_1", "name": "read", "input": {"path": "a"}}
    thought = {"type": "thinking", "thinking": "hm", "signature": "of another server"}
    results = [
        text("And this?"),
        {"type": "tool_result", "tool_use_id": "toolu_1", "content": [text("one"), text("two")]},
        {"type": "tool_result", "tool_use_id": "toolu_2", "is_error": True, "content": "no such file"},
        {"type": "tool_result", "tool_use_id": "toolu_3"},
    ]
    given = [
        USER,
        {"role": "assistant", "content": [thought, {"type": "redacted_thinking", "data": "x"}, text("Let me."), use]},
        {"role": "user", "content": results},
    ]
    call = {"id": "toolu_1", "type": "function", "function": {"name": "read", "arguments": {"path": "a"}}}
    assert await messages_for(messages=given) == [
        USER,
        {"role": "assistant", "content": "Let me.", "reasoning_content": "hm", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "toolu_1", "content": "one\ntwo"},
        {"role": "tool", "tool_call_id": "toolu_2", "content": "Error: no such file"},
        {"role": "tool", "tool_call_id": "toolu_3", "content": ""},
        {"role": "user", "content": "And this?"},
    ]


IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "aGk="}}


async def test_blocks_that_hold_text_are_read_and_foreign_ones_skipped() -> None:
    plain = {"type": "document", "title": "T", "source": {"type": "text", "media_type": "text/plain", "data": "body"}}
    parts = {"type": "document", "source": {"type": "content", "content": [text("part")]}}
    found = {"type": "search_result", "title": "S", "source": "http://s", "content": [text("said")]}
    foreign = {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {}}
    results = {"type": "web_search_tool_result", "tool_use_id": "s", "content": []}
    pictured = {"type": "tool_result", "tool_use_id": "t", "content": [IMAGE, text("a map")]}
    given = [
        {"role": "user", "content": [plain, parts, found]},
        {"role": "assistant", "content": [foreign, results, text("ok")]},
        {"role": "user", "content": [pictured]},
    ]
    asked, answered, result = await messages_for(messages=given)
    assert asked["content"] == "T\nbody\npart\nS (http://s)\nsaid"
    assert answered == {"role": "assistant", "content": "ok"}
    assert result["content"] == "[image (image/png) left out: this model reads text only]\na map"


async def test_the_last_message_of_an_assistant_is_continued() -> None:
    engine = FakeEngine()
    await ask(engine, messages=[USER, {"role": "assistant", "content": "The answer is ("}])
    await ask(engine, messages=[USER, {"role": "assistant", "content": [text(" ")]}])
    assert [call.prompt for call in engine.calls] == ["<user>hi\n<assistant>The answer is (", "<user>hi\n<assistant>"]


async def test_settings_of_thinking_and_effort_reach_the_template() -> None:
    engine = reasoning("<think>hm</think>yes")
    template = engine.chat_template
    assert template is not None
    answer = await ask(engine)
    assert [block["type"] for block in answer["content"]] == ["thinking", "text"]
    assert "enable_thinking" not in template.kwargs
    answer = await ask(engine, thinking={"type": "disabled"})
    assert [block["type"] for block in answer["content"]] == ["text"]
    assert template.kwargs["enable_thinking"] is False
    answer = await ask(engine, thinking={"type": "adaptive", "display": "updates"})
    assert answer["content"][0]["thinking"]
    await ask(engine, thinking={"type": "enabled", "budget_tokens": 1024}, output_config={"effort": "max"})
    assert template.kwargs["enable_thinking"] is True and template.kwargs["reasoning_effort"] == "high"


async def test_the_channels_of_gpt_oss_are_blocks() -> None:
    engine = harmony(THOUGHT + PREAMBLE + HARMONY_CALL)
    fields = {"tools": [TOOL], "output_config": {"effort": "max"}, "thinking": {"type": "enabled"}}
    answer = await ask(engine, **fields)
    assert [block["type"] for block in answer["content"]] == ["thinking", "text", "tool_use"]
    assert answer["content"][1]["text"] == "I'll look." and answer["stop_reason"] == "tool_use"
    assert without_ids(message_of(await stream(engine, **fields))) == without_ids(answer)
    assert "Reasoning: high" in engine.calls[0].prompt


async def test_omitted_thoughts_come_back_in_their_signature() -> None:
    engine = reasoning(f"<think>{'hm' * 100}</think>yes")
    omitted = {"type": "adaptive", "display": "omitted"}
    events = await stream(engine, thinking=omitted)
    thinking = message_of(events)["content"][0]
    assert thinking["thinking"] == ""
    reports = [event["delta"]["estimated_tokens"] for event in events if "estimated_tokens" in event.get("delta", {})]
    assert len(reports) > 3 and 200 - 40 < sum(reports) <= 200
    history = [USER, {"role": "assistant", "content": [thinking]}, USER]
    assert (await messages_for(messages=history))[1]["reasoning_content"] == "hm" * 100
    damaged = {**thinking, "signature": thinking["signature"] + "!"}
    assert (
        "reasoning_content"
        not in (await messages_for(messages=[USER, {"role": "assistant", "content": [damaged]}, USER]))[1]
    )


async def test_tools_that_a_server_would_run_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    engine = hermes("ok")
    tools = [
        {"type": "custom", **TOOL, "cache_control": {"type": "ephemeral"}},
        {"type": "web_search_20250305", "name": "web_search", "max_uses": 8},
        {"type": "computer_20250124", "name": "computer", "display_width_px": 1, "display_height_px": 1},
        {"type": "bash_20250124", "name": "bash"},
        {"type": "text_editor_20250728", "name": "str_replace_based_edit_tool"},
        {"type": "memory_20250818", "name": "memory"},
    ]
    with caplog.at_level(logging.WARNING, "tinyvllm"):
        await ask(engine, tools=tools)
        await ask(engine, tools=tools)
    assert sum("web_search_20250305" in record.getMessage() for record in caplog.records) <= 1
    assert engine.chat_template is not None
    shown = {tool["function"]["name"]: tool["function"] for tool in engine.chat_template.tools}
    assert list(shown) == ["get_weather", "bash", "str_replace_based_edit_tool", "memory"]
    assert "insert_text" in shown["str_replace_based_edit_tool"]["parameters"]["properties"]


async def test_deferred_tools_are_described_where_they_are_named() -> None:
    """The beginning of the prompt, and with it what the prefix cache holds, stays as it was."""
    deferred = [{**TOOL, "defer_loading": True}, {**TOOL, "name": "unused", "defer_loading": True}]
    search = {**TOOL, "name": "search"}
    inline = {"name": "inline", "input_schema": {"type": "object", "properties": {"a": {"type": "string"}}}}
    found = [{"type": "tool_reference", "tool_name": "get_weather"}]
    added = [
        {"type": "tool_addition", "tool": {"type": "tool_definition", "definition": inline}},
        {"type": "tool_addition", "tool": {"type": "tool_reference", "name": "search"}},
        {"type": "tool_addition", "tool": {"type": "mcp_toolset_reference", "server_name": "s"}},
        {"type": "tool_removal", "tool": {"type": "tool_reference", "name": "unused"}},
    ]
    messages = [
        USER,
        {"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "search", "input": {}}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": found}]},
        {"role": "system", "content": added},
    ]
    engine = hermes(CALL)
    answer = await ask(engine, tools=[*deferred, search], messages=messages)
    assert answer["content"][0]["name"] == "get_weather"
    template = engine.chat_template
    assert template is not None and [tool["function"]["name"] for tool in template.tools] == ["search"]
    *_, result, system = template.messages
    assert json.loads(result["content"].partition(": ")[2])["description"] == "Weather."
    first, second, third = system["content"].split("\n")
    assert json.loads(first.partition(": ")[2]) == {
        "name": "inline", "description": "", "parameters": inline["input_schema"]
    }  # fmt: skip
    assert second == "The tool search is available." and third == "The tool unused is no longer available."
    elsewhere = {"type": "tool_search_tool_bm25_20251119", "name": "tool_search"}
    await ask(engine, tools=[*deferred, search, elsewhere])
    assert [tool["function"]["name"] for tool in template.tools] == ["search", "get_weather", "unused"]
    await ask(engine, tools=deferred)
    assert [tool["function"]["name"] for tool in template.tools] == ["get_weather", "unused"]


async def test_system_messages_may_end_and_change_the_effort() -> None:
    engine = FakeEngine()
    reminder = {"role": "system", "content": "Now be brief.", "clear_at": "next_user_message"}
    effort = {"role": "system", "output_config": {"effort": "low"}}
    await ask(engine, messages=[USER, reminder, effort], output_config={"effort": "high"})
    template = engine.chat_template
    assert template is not None and template.kwargs["reasoning_effort"] == "low"
    assert [message["content"] for message in template.messages] == ["hi", "Now be brief."]
    await ask(engine, messages=[USER, reminder, {"role": "assistant", "content": "ok"}, USER])
    assert [message["content"] for message in template.messages] == ["hi", "ok", "hi"]


async def test_tool_choice_constrains_the_output() -> None:
    engine = hermes(CALL)
    for choice in ({"type": "any"}, {"type": "tool", "name": "get_weather"}):
        await ask(engine, tools=[TOOL], tool_choice=choice)
        assert engine.calls[-1].params.grammar is not None
    await ask(engine, tools=[TOOL], tool_choice={"type": "none"})
    assert engine.calls[-1].params.grammar is None and engine.chat_template is not None
    assert engine.chat_template.tools is None
    engine = hermes(CALL * 2)
    answer = await ask(engine, tools=[TOOL], tool_choice={"type": "auto", "disable_parallel_tool_use": True})
    assert len(answer["content"]) == 1


async def test_an_output_format_is_enforced() -> None:
    engine = FakeEngine()
    format = {"type": "json_schema", "schema": {"type": "object", "properties": {"a": {"type": "integer"}}}}
    for fields in ({"output_config": {"format": format}}, {"output_format": format}):
        await ask(engine, **fields)
        grammar = engine.calls[-1].params.grammar
        assert grammar is not None and grammar.kind == "json_schema"


async def test_fields_without_effect_are_accepted() -> None:
    engine = FakeEngine()
    await ask(engine)
    await ask(
        engine,
        metadata={"user_id": "u"}, service_tier="auto", container="c", mcp_servers=[{"type": "url"}], safeguards=[{}],
        context_management={"edits": [{"type": "clear_tool_uses_20250919"}]}, cache_control={"type": "ephemeral"},
        temperature=None, tools=[], stop_sequences=[], thinking=None,
    )  # fmt: skip
    without, with_fields = [call.params for call in engine.calls]
    assert with_fields == without


async def test_tokens_are_counted_without_generating() -> None:
    engine = FakeEngine()
    response = await post(engine, f"{URL}/count_tokens", body_of(system="Be brief."))
    assert response.json() == {"input_tokens": len("<system>Be brief.\n<user>hi\n<assistant>")}
    assert engine.calls == []


# ---- Refusals ----

PDF = {"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": "aGk="}}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"max_tokens": None}, "max_tokens"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
    ({"messages": [{"role": "user"}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": ["hi"]}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content.0.text"),
    ({"messages": [{"role": "user", "content": [IMAGE]}]}, "messages.0.content.0 is an image with a 'base64' source"),
    ({"messages": [{"role": "user", "content": [PDF]}]}, "messages.0.content.0 is a document with a 'base64' source"),
    ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "messages.0.content.0 is of type 'audio'"),
    ({"messages": [{"role": "system", "content": ""}]}, "messages"),
    ({"messages": [{"role": "assistant", "content": [{"type": "tool_use", "name": "f"}]}]}, "content.0.id"),
    ({"messages": [{"role": "user", "content": [{"type": "tool_result", "content": "x"}]}]}, "content.0.tool_use_id"),
    ({"system": 5}, "system"),
    ({"tools": [{"name": "f"}]}, "tools.0.input_schema"),
    ({"tools": [{"name": "a b", "input_schema": {}}]}, "tools.0.name"),
    ({"tools": [TOOL, TOOL]}, "tools.1"),
    ({"tool_choice": {"type": "any"}}, "tool_choice"),
    ({"tools": [{"type": "web_search_20250305", "name": "w"}], "tool_choice": {"type": "tool", "name": "w"}}, "'w'"),
    ({"tools": [TOOL], "tool_choice": {"type": "tool"}}, "tool_choice.name"),
    ({"thinking": {"type": "often"}}, "thinking.type"),
    ({"output_format": {"type": "xml"}}, "output_format.type"),
    ({"stop_sequences": [""]}, "stop_sequences.0"),
    ({"stop_sequences": ["a"] * 17}, "stop_sequences"),
    ({"temperature": "hot"}, "temperature"),
    ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
    ({"thread": {"type": "create"}}, "thread"),
    ({"compaction": {}}, "compaction"),
]


@pytest.mark.parametrize(("fields", "named"), REFUSED, ids=[name for _, name in REFUSED])
async def test_refusals_name_the_field(fields: dict[str, Any], named: str) -> None:
    response = await post(FakeEngine(), URL, body_of(**fields))
    assert response.status_code == 400, response.text
    assert named in error_of(response)
    assert response.json()["error"]["type"] == "invalid_request_error"


async def test_other_errors_have_anthropics_types() -> None:
    unknown = await post(FakeEngine(), URL, body_of(model="claude"))
    assert unknown.status_code == 404 and "'tiny'" in error_of(unknown)
    batches = await post(FakeEngine(), f"{URL}/batches", {"requests": []})
    assert batches.status_code == 404 and batches.json()["error"]["type"] == "not_found_error"
    loading = await post(FakeEngine(is_ready=False), URL, body_of())
    assert loading.status_code == 503 and loading.json()["error"]["type"] == "overloaded_error"
    assert loading.headers["retry-after"]
    locked = await post(FakeEngine(), URL, body_of(), api_keys=("secret-key",))
    assert locked.status_code == 401 and locked.json()["error"]["type"] == "authentication_error"
    large = await post(FakeEngine(), URL, body_of(system="x" * 2000), max_body_bytes=1024)
    assert large.status_code == 413 and large.json()["error"]["type"] == "request_too_large"


# ---- Models ----


async def test_models_are_listed_for_clients_of_either_api() -> None:
    page = (await get(FakeEngine(), "/v1/models", headers=VERSION)).json()
    assert page["first_id"] == page["last_id"] == "tiny" and page["has_more"] is False
    [model] = page["data"]
    assert model["type"] == "model" and model["created_at"] == "2023-11-14T22:13:20Z"
    assert (await get(FakeEngine(), "/v1/models/tiny", headers=VERSION)).json() == model
    assert (await get(FakeEngine(), "/v1/models")).json()["object"] == "list"
    unknown = await get(FakeEngine(), "/v1/models/huge", headers=VERSION)
    assert unknown.status_code == 404 and "huge" in error_of(unknown)


async def test_models_are_paged() -> None:
    async with client_of(FakeEngine(), model_aliases=("b", "c"), apis=("anthropic",)) as client:

        async def ids(**params: Any) -> tuple[list[str], bool]:
            page = (await client.get("/v1/models", params=params)).json()
            return [model["id"] for model in page["data"]], page["has_more"]

        assert await ids(limit=2) == (["tiny", "b"], True)
        assert await ids(limit=2, after_id="b") == (["c"], False)
        assert await ids(limit=1, before_id="c") == (["b"], True)
