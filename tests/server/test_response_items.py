"""The tools and items of /v1/responses: what a model is offered, what it calls, and what is taken back."""

from __future__ import annotations

import json
import logging
from typing import Any, get_args, get_type_hints

import pytest
from openai.types.responses import ResponseStreamEvent, response_input_item_param
from pydantic import TypeAdapter

from tests.server.client import client_of, error_of, post
from tests.server.fake_engine import FakeEngine, TagTemplate
from tests.server.hermes import CALL, THINKING, hermes
from tests.server.test_responses import WEATHER, events_of, respond
from tinyvllm.server.openai.protocol.response_items import ItemType, seal, unseal

PATCH: Any = {"type": "custom", "name": "apply_patch", "description": "Edit files."}
HOSTED: Any = [
    {"type": "web_search", "external_web_access": False},
    {"type": "local_shell"},
    {"type": "image_generation", "output_format": "png"},
    {"type": "tool_search"},
    {"type": "mcp", "server_label": "x", "server_url": "https://x", "require_approval": "never", "tools": [{"a": 1}]},
    {"type": "file_search", "vector_store_ids": ["v"], "name": 5},
    {"type": "code_interpreter", "container": {"type": "auto"}},
    {"type": "computer_use_preview", "display_width": 1, "display_height": 1, "environment": "linux"},
    {"type": "apply_patch"},
    {"type": "shell", "environment": {"type": "local"}},
]


def call_of(name: str, arguments: Any) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def messages_of(engine: FakeEngine) -> list[dict[str, Any]]:
    assert engine.chat_template is not None
    return engine.chat_template.messages


def names_of(engine: FakeEngine) -> list[str]:
    """The tools that the template was given."""
    assert engine.chat_template is not None
    return [tool["function"]["name"] for tool in engine.chat_template.tools or []]


# ---- Tools ----


async def test_tools_that_only_a_hosted_service_runs_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    engine = hermes(CALL)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            answer = await respond(engine, tools=[WEATHER, *HOSTED])
    assert names_of(engine) == ["get_weather"] and answer["output"][0]["name"] == "get_weather"
    assert [tool["type"] for tool in answer["tools"]] == ["function", *(tool["type"] for tool in HOSTED)]
    lines = [record.message for record in caplog.records if "left out" in record.message]
    assert len(lines) == len(set(lines)) <= len(HOSTED)
    assert (await respond(FakeEngine(), tools=HOSTED))["output"][0]["type"] == "message"


async def test_a_custom_tool_is_called_with_text() -> None:
    text = '*** Begin Patch\n+"é"\\ 😀\n*** End Patch'
    engine = hermes("Now. " + call_of("apply_patch", {"input": text}))
    events = await events_of(engine, tools=[WEATHER, PATCH])
    [message, call] = events[-1]["response"]["output"]
    assert message["content"][0]["text"] == "Now."
    assert {**call, "id": "", "call_id": ""} == {
        "type": "custom_tool_call", "id": "", "call_id": "", "name": "apply_patch", "input": text, "status": "completed"
    }  # fmt: skip
    deltas = [event["delta"] for event in events if event["type"] == "response.custom_tool_call_input.delta"]
    assert "".join(deltas) == text and len(deltas) > 5
    [done] = [event for event in events if event["type"] == "response.custom_tool_call_input.done"]
    assert done["input"] == text and done["item_id"] == call["id"]
    engine.reply = "Done."
    result = {"type": "custom_tool_call_output", "call_id": call["call_id"], "output": "ok"}
    await respond(engine, tools=[PATCH], input=[{"role": "user", "content": "Edit."}, message, call, result])
    _, assistant, tool = messages_of(engine)
    assert assistant["tool_calls"][0]["function"] == {"name": "apply_patch", "arguments": {"input": text}}
    assert tool == {"role": "tool", "tool_call_id": call["call_id"], "content": "ok"}


@pytest.mark.parametrize(
    ("arguments", "text"),
    [({"patch": "a"}, "a"), ({"input": 5}, '{"input": 5}'), ({}, ""), ({"a": 1, "b": 2}, '{"a": 1, "b": 2}')],
)
async def test_other_arguments_of_a_custom_tool_are_its_text(arguments: Any, text: str) -> None:
    answer = await respond(hermes(call_of("apply_patch", arguments)), tools=[PATCH])
    assert answer["output"][0]["input"] == text


async def test_the_tools_of_a_namespace_are_offered_and_called_by_it() -> None:
    space = {"type": "namespace", "name": "mcp__files", "description": "d", "tools": [WEATHER, PATCH, {"type": "mcp"}]}
    engine = hermes(
        call_of("mcp__files__get_weather", {"city": "Rom"}) + call_of("mcp__files__apply_patch", {"input": "x"})
    )
    answer = await respond(engine, tools=[WEATHER, space])
    assert names_of(engine) == ["get_weather", "mcp__files__get_weather", "mcp__files__apply_patch"]
    function, custom = answer["output"]
    assert (function["name"], function["namespace"]) == ("get_weather", "mcp__files")
    assert (custom["name"], custom["namespace"], custom["input"]) == ("apply_patch", "mcp__files", "x")
    await respond(engine, tools=[space], input=answer["output"])
    calls = messages_of(engine)[0]["tool_calls"]
    assert [call["function"]["name"] for call in calls] == names_of(engine)


async def test_a_grammar_that_cannot_be_enforced_is_only_shown(caplog: pytest.LogCaptureFixture) -> None:
    engine = hermes("Hello.")
    recursive = {"type": "grammar", "syntax": "lark", "definition": 'start: "(" start? ")"'}
    tools = [{**PATCH, "format": recursive}]
    with caplog.at_level(logging.WARNING):
        await respond(engine, tools=tools)
    assert engine.calls[-1].params.grammar is None and "cannot be enforced" in caplog.text
    for choice in ("required", {"type": "custom", "name": "apply_patch"}):
        refused = await post(engine, "/v1/responses", {"input": "a", "tools": tools, "tool_choice": choice})
        assert error_of(refused)["param"] == "tools.0.format" and "recursive" in error_of(refused)["message"]
    tools[0]["format"] = {"type": "grammar", "syntax": "regex", "definition": "[a-z]+"}
    await respond(engine, tools=tools)
    grammar = engine.calls[-1].params.grammar
    assert grammar is not None and "^(?:[a-z]+)$" in grammar.text


async def test_a_search_that_the_client_runs_is_called() -> None:
    """Codex lets models search for the tools of MCP servers."""
    engine = hermes("First. " + call_of("tool_search", {"query": "weather", "limit": 3}))
    schema = {"type": "object", "properties": {"query": {"type": "string"}, "limit": {"type": "number"}}}
    search = {"type": "tool_search", "execution": "client", "description": "Finds tools.", "parameters": schema}
    events = await events_of(engine, tools=[search])
    assert names_of(engine) == ["tool_search"]
    [_, call] = events[-1]["response"]["output"]
    assert {**call, "id": "", "call_id": ""} == {
        "type": "tool_search_call", "id": "", "call_id": "", "execution": "client", "status": "completed",
        "arguments": {"query": "weather", "limit": 3},
    }  # fmt: skip
    space = {"type": "namespace", "name": "mcp", "tools": [WEATHER], "description": ""}
    found = {"type": "tool_search_output", "call_id": call["call_id"], "execution": "client", "tools": [space]}
    engine.reply = "Done."
    await respond(engine, tools=[search], input=[{"role": "user", "content": "a"}, call, found, call, found])
    assert names_of(engine) == ["tool_search", "mcp__get_weather"]
    _, assistant, result, *_ = messages_of(engine)
    assert assistant["tool_calls"][0]["function"]["arguments"] == {"query": "weather", "limit": 3}
    assert "get_weather" in result["content"]


async def test_items_add_tools_to_those_of_the_request() -> None:
    engine = hermes(call_of("mcp__files__get_weather", {"city": "Rom"}))
    space = {"type": "namespace", "name": "mcp__files", "tools": [WEATHER], "description": ""}
    items: list[Any] = [
        {"type": "additional_tools", "role": "developer", "tools": [PATCH]},
        {"type": "tool_search_call", "call_id": "1", "execution": "client", "arguments": {"query": "weather"}},
        {"type": "tool_search_output", "call_id": "1", "execution": "client", "tools": [space]},
        {"role": "user", "content": "a"},
    ]
    answer = await respond(engine, tools=[WEATHER], input=items)
    assert names_of(engine) == ["get_weather", "apply_patch", "mcp__files__get_weather"]
    assert answer["output"][0]["namespace"] == "mcp__files" and len(messages_of(engine)) == 3
    items[0]["tools"] = [{"type": "function"}]
    refused = await post(engine, "/v1/responses", {"input": items})
    assert error_of(refused)["param"] == "input.0.tools.0.name"


async def test_tool_choice_takes_custom_and_allowed_tools() -> None:
    engine = hermes(CALL)
    answer = await respond(engine, tools=[WEATHER, PATCH], tool_choice={"type": "custom", "name": "apply_patch"})
    assert answer["tool_choice"] == {"type": "custom", "name": "apply_patch"}
    grammar = engine.calls[-1].params.grammar
    assert grammar is not None and "apply_patch" in grammar.text and "get_weather" not in grammar.text
    allowed = {"type": "allowed_tools", "mode": "auto", "tools": [WEATHER, {"type": "web_search"}]}
    answer = await respond(engine, tools=[WEATHER, PATCH, *HOSTED], tool_choice=allowed)
    assert names_of(engine) == ["get_weather"] and answer["tool_choice"]["mode"] == "auto"
    space = {"type": "namespace", "name": "n", "description": "d", "tools": [PATCH]}
    allowed = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "namespace", "name": "n"}]}
    answer = await respond(engine, tools=[WEATHER, space], tool_choice=allowed)
    assert names_of(engine) == ["n__apply_patch"] and answer["tool_choice"] == allowed
    for tools, mode in ((["f"], "auto"), ([], "required")):
        choice = {
            "type": "allowed_tools",
            "mode": mode,
            "tools": [{"type": "function", "name": name} for name in tools],
        }
        refused = await post(engine, "/v1/responses", {"input": "a", "tools": [WEATHER], "tool_choice": choice})
        assert error_of(refused)["param"] == "tool_choice"


# ---- Items ----


def test_every_type_of_openai_s_document_is_known() -> None:
    known = set(get_args(ItemType))
    for member in get_args(response_input_item_param.ResponseInputItemParam):
        kinds = get_args(get_args(get_type_hints(member)["type"])[0]) or get_args(get_type_hints(member)["type"])
        assert {kind for kind in kinds if isinstance(kind, str)} <= known, member


HISTORY: Any = [
    {"role": "user", "content": [{"type": "input_text", "text": "Go."}]},
    {"type": "reasoning", "id": "rs_1", "encrypted_content": None,
     "summary": [{"type": "summary_text", "text": "Sum."}]},
    {"type": "local_shell_call", "id": "l", "call_id": "1", "status": "completed",
     "action": {"type": "exec", "command": ["ls"], "env": {}}},
    {"type": "local_shell_call_output", "id": "1", "output": "a.py"},
    {"type": "shell_call", "call_id": "2", "action": {"commands": ["pwd"]}},
    {"type": "shell_call_output", "call_id": "2",
     "output": [{"stdout": "/", "stderr": "", "outcome": {"type": "exit", "exit_code": 0}}]},
    {"type": "apply_patch_call", "call_id": "3", "status": "completed",
     "operation": {"type": "delete_file", "path": "a.py"}},
    {"type": "apply_patch_call_output", "call_id": "3", "status": "completed"},
    {"type": "mcp_call", "id": "4", "server_label": "docs", "name": "read", "output": "Text.",
     "arguments": '{"page": 1}'},
    {"type": "code_interpreter_call", "id": "5", "container_id": "c", "code": "print(1)", "status": "completed",
     "outputs": [{"type": "logs", "logs": "1"}, {"type": "image", "url": "u"}]},
    {"type": "file_search_call", "id": "6", "queries": ["q"], "status": "completed", "results": [{"text": "found"}]},
    {"type": "function_call", "call_id": "7", "name": "look", "arguments": "not JSON", "status": "completed"},
    {"type": "function_call_output", "call_id": "7", "output": [{"type": "input_image", "image_url": "data:,"}]},
]  # fmt: skip
SKIPPED: Any = [
    {"type": "web_search_call", "id": "w", "status": "completed", "action": {"type": "search", "query": "q"}},
    {"type": "file_search_call", "id": "f", "queries": ["q"], "status": "completed"},
    {"type": "image_generation_call", "id": "i", "status": "completed", "result": "aGk="},
    {"type": "computer_call", "id": "c", "call_id": "c", "status": "completed", "pending_safety_checks": []},
    {"type": "computer_call_output", "call_id": "c", "output": {"type": "computer_screenshot"}},
    {"type": "mcp_list_tools", "id": "m", "server_label": "s", "tools": []},
    {"type": "mcp_approval_request", "id": "m", "server_label": "s", "name": "n", "arguments": "{}"},
    {"type": "mcp_approval_response", "approval_request_id": "m", "approve": True},
    {"type": "compaction", "encrypted_content": "x"},
    {"type": "configuration_update", "id": "u"},
]


async def test_items_of_other_services_are_rendered_or_skipped() -> None:
    engine = FakeEngine()
    await respond(engine, input=[*HISTORY, *SKIPPED, {"role": "user", "content": "Next."}])
    user, *middle, last = messages_of(engine)
    assert (user["content"], last["content"]) == ("Go.", "Next.")
    assert middle[0]["reasoning_content"] == "Sum."
    calls = [call["function"] for message in middle for call in message.get("tool_calls", [])]
    assert calls == [
        {"name": "local_shell", "arguments": {"type": "exec", "command": ["ls"], "env": {}}},
        {"name": "shell", "arguments": {"commands": ["pwd"]}},
        {"name": "apply_patch", "arguments": {"type": "delete_file", "path": "a.py"}},
        {"name": "docs__read", "arguments": {"page": 1}},
        {"name": "code_interpreter", "arguments": {"code": "print(1)"}},
        {"name": "file_search", "arguments": {"queries": ["q"]}},
        {"name": "look", "arguments": "not JSON"},
    ]
    results = [message["content"] for message in middle if message["role"] == "tool"]
    assert results[0] == "a.py" and '"stdout": "/"' in results[1]
    assert results[2:5] == ["completed", "Text.", "1"] and "found" in results[5] and "an image" in results[6]
    assert [message["role"] for message in middle] == ["assistant", "tool"] * 7


async def test_reasoning_is_the_summary_if_one_is_asked_for() -> None:
    engine = FakeEngine(reply="<think>Hm.</think>Hello.", chat_template=TagTemplate(THINKING))
    events = await events_of(engine, reasoning={"summary": "auto"})
    deltas = [event for event in events if event["type"] == "response.reasoning_summary_text.delta"]
    assert "".join(event["delta"] for event in deltas) == "Hm." and deltas[0]["summary_index"] == 0
    [thought, _] = events[-1]["response"]["output"]
    assert thought["summary"] == [{"type": "summary_text", "text": "Hm."}] and thought["content"] == []
    thoughts = [{**thought, "id": "a"}, {**thought, "id": "b"}]
    await respond(engine, input=[{"role": "user", "content": "a"}, *thoughts, {"role": "assistant", "content": "b"}])
    assert messages_of(engine)[1] == {"role": "assistant", "content": "b", "reasoning_content": "Hm.\nHm."}


async def test_an_incomplete_message_at_the_end_is_continued() -> None:
    engine = FakeEngine(reply=", world")
    said = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Hello"}]}
    await respond(engine, input=[{"role": "user", "content": "a"}, {**said, "status": "incomplete"}])
    assert engine.calls[-1].prompt.endswith("<assistant>Hello")
    await respond(engine, input=[{"role": "user", "content": "a"}, {**said, "status": "completed"}])
    assert engine.calls[-1].prompt.endswith("<assistant>Hello\n<assistant>")


async def test_a_reference_stands_for_the_item_of_a_stored_response() -> None:
    engine = FakeEngine(reply="Earlier.")
    async with client_of(engine) as client:
        first = (await client.post("/v1/responses", json={"input": "a"})).json()
        reference = {"type": "item_reference", "id": first["output"][0]["id"]}
        for item in (reference, {"id": reference["id"]}):
            answer = await client.post("/v1/responses", json={"input": [item, {"role": "user", "content": "b"}]})
            assert answer.status_code == 200 and messages_of(engine)[0] == {"role": "assistant", "content": "Earlier."}
        missing = await client.post("/v1/responses", json={"input": [reference, {"id": "msg_x"}]})
    assert missing.status_code == 404 and error_of(missing)["param"] == "input.1.id"


REPLIES = [
    "Hello.",
    "",
    "<think>Hm.</think>Hello.",
    f"<think>Hm.</think>Wait. {CALL}{CALL}",
    f"<think>Hm.</think>{call_of('apply_patch', {'input': 'x'})}",
    CALL + "After.",
]


@pytest.mark.parametrize("reply", REPLIES)
@pytest.mark.parametrize("include", [[], ["reasoning.encrypted_content"]])
@pytest.mark.parametrize("summary", [None, "auto"])
async def test_the_output_is_taken_back_as_input(reply: str, include: list[str], summary: str | None) -> None:
    """The next prompt is the same by previous_response_id, by the whole output, and by what clients keep of it."""
    engine = FakeEngine(reply=reply, chat_template=TagTemplate(THINKING))
    more = {"role": "user", "content": "More."}
    async with client_of(engine) as client:

        async def ask(**body: Any) -> dict[str, Any]:
            fixed = {"tools": [WEATHER, PATCH], "include": include, "reasoning": {"summary": summary}}
            response = await client.post("/v1/responses", json={**fixed, **body})
            assert response.status_code == 200, response.text
            return dict(response.json())

        first = await ask(input="a")
        results = [
            {"type": item["type"] + "_output", "call_id": item["call_id"], "output": "r"}
            for item in first["output"]
            if "call_id" in item
        ]
        await ask(input=[*results, more], previous_response_id=first["id"])
        continued = messages_of(engine)
        question = {"role": "user", "content": "a"}
        await ask(input=[question, *first["output"], *results, more], store=False)
        assert messages_of(engine) == continued
        kept = [
            {name: value for name, value in item.items() if name not in ("id", "status")} for item in first["output"]
        ]
        if include:
            for item in kept:
                if item["type"] == "reasoning":
                    assert item.pop("content") or item.pop("summary")
        await ask(input=[question, *kept, *results, more], store=False)
        assert messages_of(engine) == continued
    assert len([message for message in continued if "tool_calls" in message]) == bool(results)


async def test_events_are_as_openai_s_document_says() -> None:
    reply = f"<think>Hm.</think>Wait. {CALL}{call_of('apply_patch', {'input': 'x'})}"
    engine = FakeEngine(reply=reply, chat_template=TagTemplate(THINKING))
    known: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
    tools = [WEATHER, PATCH, {"type": "namespace", "name": "n", "description": "d", "tools": [PATCH]}, *HOSTED[:3]]
    logprobs = {"include": ["message.output_text.logprobs", "reasoning.encrypted_content"]}
    kinds: set[str] = set()
    summary = {"reasoning": {"summary": "auto"}}
    for body in ({}, {"max_output_tokens": 20}, logprobs, summary, {"instructions": "Fail."}):
        engine.fail_after = 30 if "instructions" in body else None
        for event in await events_of(engine, tools=tools, **body):
            kinds.add(event["type"])
            known.validate_python(event)
    assert {"response.completed", "response.incomplete", "response.failed", "error"} <= kinds and len(kinds) == 22, (
        kinds
    )


def test_what_others_have_encrypted_is_not_read() -> None:
    assert unseal(seal("Hm. é")) == "Hm. é"
    assert [unseal(text) for text in ("gAAAA", "tinyvllm:", "tinyvllm:!", "tinyvllm:aGk=", None, 5)] == [""] * 6
