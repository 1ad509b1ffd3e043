"""Every route over ASGI: shapes, defaults, refusals."""

from __future__ import annotations

import json
import logging
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from tests.server.client import CHAT, chat, client_of, complete, error_of, events, get, post
from tests.server.fake_engine import FakeEngine, serving
from tests.server.request_fields import BOTH, CHAT_ONLY, COMPLETION_ONLY, NEUTRAL
from tinyvllm.config import GRAMMAR_TOO_COMPLEX, GenerationDefaults
from tinyvllm.errors import ContextLengthError, EngineDeadError
from tinyvllm.server.failures import Failure

# ---- Completions ----


async def test_completion_has_every_field_of_the_format() -> None:
    answer = await complete(FakeEngine())
    assert answer.pop("id").startswith("cmpl-") and answer.pop("created") > 0
    assert answer == {
        "object": "text_completion",
        "model": "tiny",
        "choices": [
            {"index": 0, "text": "Hello, wörld!", "logprobs": None, "finish_reason": "stop", "stop_reason": None}
        ],
        "usage": {
            "prompt_tokens": 2,
            "completion_tokens": 13,
            "total_tokens": 15,
            "prompt_tokens_details": {"cached_tokens": 1},
        },
        "system_fingerprint": None,
    }


async def test_completion_defaults_to_sixteen_tokens() -> None:
    engine = FakeEngine(reply="x" * 40)
    answer = await complete(engine, max_tokens=None)
    assert answer["choices"][0]["text"] == "x" * 16 and answer["choices"][0]["finish_reason"] == "length"
    assert engine.calls[0].params.max_tokens == 16


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("ab", [b"ab"]),
        (["ab", "c"], [b"ab", b"c"]),
        ([97, 98], [b"ab"]),
        ([[97], [98, 99]], [b"a", b"bc"]),
    ],
)
async def test_prompt_takes_four_forms(prompt: Any, texts: list[bytes]) -> None:
    engine = FakeEngine(reply="x")
    answer = await complete(engine, prompt=prompt)
    assert [bytes(call.prompt_ids) for call in sorted(engine.calls, key=lambda call: call.request_id)] == texts
    assert [choice["index"] for choice in answer["choices"]] == list(range(len(texts)))
    assert answer["usage"]["prompt_tokens"] == sum(map(len, texts))


async def test_choices_of_a_prompt_are_adjacent() -> None:
    answer = await complete(FakeEngine(reply="xy"), prompt=["a", "bb"], n=2, echo=True)
    assert [(choice["index"], choice["text"]) for choice in answer["choices"]] == [
        (0, "axy"), (1, "axy"), (2, "bbxy"), (3, "bbxy")
    ]  # fmt: skip
    assert answer["usage"]["prompt_tokens"] == 3 and answer["usage"]["completion_tokens"] == 8


async def test_echo_shows_the_text_of_token_ids() -> None:
    answer = await complete(FakeEngine(reply="!"), prompt=[104, 105], echo=True)
    assert answer["choices"][0]["text"] == "hi!"


async def test_completion_logprobs_have_the_old_shape() -> None:
    answer = await complete(FakeEngine(reply="öb"), logprobs=2)
    assert answer["choices"][0]["logprobs"] == {
        "tokens": ["ö", "b"],
        "token_logprobs": [-9999.0, -9999.0],
        "top_logprobs": [{"a": -0.5, "b": -1.5, "ö": -9999.0}, {"a": -0.5, "b": -1.5}],
        "text_offset": [0, 1],
    }


async def test_zero_logprobs_name_the_chosen_token_alone() -> None:
    answer = await complete(FakeEngine(reply="x"), logprobs=0)
    assert answer["choices"][0]["logprobs"]["top_logprobs"] == [{"x": -9999.0}]


async def test_streamed_completion_adds_up_to_the_whole_one() -> None:
    body = {"prompt": ["ab", "c"], "n": 2, "max_tokens": 100, "echo": True, "stream_options": {"include_usage": True}}
    chunks = await events(FakeEngine(), "/v1/completions", body)
    texts = ["", "", "", ""]
    for chunk in chunks[:-1]:
        assert chunk["object"] == "text_completion" and chunk["usage"] is None
        (choice,) = chunk["choices"]
        assert choice["text"] or choice["finish_reason"]
        texts[choice["index"]] += choice["text"]
    assert texts == ["abHello, wörld!"] * 2 + ["cHello, wörld!"] * 2
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] == 4 * 13


async def test_offsets_of_streamed_logprobs_continue_across_chunks() -> None:
    chunks = await events(FakeEngine(reply="aöb"), "/v1/completions", {"prompt": "x", "logprobs": 0})
    offsets = [offset for chunk in chunks for offset in chunk["choices"][0]["logprobs"]["text_offset"]]
    assert offsets == [0, 1, 2]
    assert "usage" not in chunks[0]


# ---- Chat ----


async def test_chat_completion_has_every_field_of_the_format() -> None:
    engine = FakeEngine()
    answer = await chat(engine)
    assert answer.pop("id").startswith("chatcmpl-") and answer.pop("created") > 0
    assert answer == {
        "object": "chat.completion",
        "model": "tiny",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Hello, wörld!", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
                "stop_reason": None,
            }
        ],
        "usage": {
            "prompt_tokens": 20,
            "completion_tokens": 13,
            "total_tokens": 33,
            "prompt_tokens_details": {"cached_tokens": 4},
        },
        "system_fingerprint": None,
    }
    assert engine.calls[0].prompt == "<user>hi\n<assistant>"
    assert engine.calls[0].params.max_tokens is None  # as many as fit


async def test_chat_stream_begins_with_roles_and_ends_with_reasons() -> None:
    chunks = await events(FakeEngine(reply="ab"), "/v1/chat/completions", {**CHAT, "n": 2})
    assert len({(chunk["id"], chunk["created"]) for chunk in chunks}) == 1
    for index in range(2):
        mine = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        deltas = [choice["delta"] for choice in mine]
        assert deltas == [{"role": "assistant", "content": ""}, {"content": "a"}, {"content": "b"}, {}]
        assert [choice["finish_reason"] for choice in mine] == [None, None, None, "stop"]
    assert all("usage" not in chunk and chunk["object"] == "chat.completion.chunk" for chunk in chunks)


async def test_chat_stream_ends_with_usage_when_requested() -> None:
    body = {**CHAT, "stream_options": {"include_usage": True}}
    *chunks, last = await events(FakeEngine(reply="ab"), "/v1/chat/completions", body)
    assert all(chunk["usage"] is None and len(chunk["choices"]) == 1 for chunk in chunks)
    assert last["choices"] == [] and last["usage"]["total_tokens"] == 22


@pytest.mark.parametrize("stream", [False, True])
async def test_chat_logprobs_have_their_shape(stream: bool) -> None:
    body = {**CHAT, "logprobs": True, "top_logprobs": 1}
    if stream:
        chunks = await events(FakeEngine(reply="ö"), "/v1/chat/completions", body)
        (logprobs,) = [c["choices"][0]["logprobs"] for c in chunks if c["choices"][0]["logprobs"]]
    else:
        logprobs = (await chat(FakeEngine(reply="ö"), **body))["choices"][0]["logprobs"]
    assert logprobs == {
        "content": [
            {
                "token": "ö",
                "logprob": -9999.0,
                "bytes": [0xC3, 0xB6],
                "top_logprobs": [{"token": "a", "logprob": -0.5, "bytes": [97]}],
            }
        ],
        "refusal": None,
    }


async def test_messages_reach_the_template_in_its_own_form() -> None:
    engine = FakeEngine()
    call = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "be"}, {"type": "text", "text": "kind"}]},
        {"role": "user", "content": "hi", "name": "Ann"},
        {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None},
        {"role": "tool", "content": "2", "tool_call_id": "call_1"},
    ]
    await chat(engine, messages=messages, chat_template_kwargs={"enable_thinking": False})
    assert engine.chat_template is not None and engine.chat_template.kwargs == {"enable_thinking": False}
    assert engine.chat_template.messages == [
        {"role": "system", "content": "be\nkind"},
        {"role": "user", "content": "hi", "name": "Ann"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{**call, "function": {"name": "f", "arguments": {"x": 1}}}],
        },
        {"role": "tool", "content": "2", "tool_call_id": "call_1"},
    ]


async def test_final_message_can_be_continued() -> None:
    engine = FakeEngine()
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Well, "}]
    await chat(engine, messages=messages, continue_final_message=True)
    assert engine.calls[0].prompt == "<user>hi\n<assistant>Well, "


async def test_generation_prompt_can_be_left_out() -> None:
    engine = FakeEngine()
    await chat(engine, add_generation_prompt=False)
    assert engine.calls[0].prompt == "<user>hi\n"


async def test_completion_tokens_limit_wins_over_the_old_name() -> None:
    engine = FakeEngine()
    await chat(engine, max_tokens=9, max_completion_tokens=3)
    assert engine.calls[0].params.max_tokens == 3


# ---- Settings ----


async def test_settings_reach_the_engine() -> None:
    engine = FakeEngine()
    settings = {
        "temperature": 0.5, "top_p": 0.25, "top_k": 7, "min_p": 0.125, "seed": -5, "min_tokens": 1, "ignore_eos": True,
        "include_stop_str_in_output": True, "skip_special_tokens": False, "typical_p": 0.5, "frequency_penalty": 0.5,
        "presence_penalty": -0.5, "repetition_penalty": 1.5,
    }  # fmt: skip
    lists = {"stop_token_ids": [3, 4], "bad_words": ["no"], "allowed_token_ids": [7, 8]}
    await complete(engine, **settings, **lists, stop="zz", logit_bias={"5": 1, "60": -2.5}, priority=2)
    params = engine.calls[0].params
    assert {name: list(getattr(params, name)) for name in lists} == lists
    assert params.logit_bias == {5: 1.0, 60: -2.5}
    assert {name: getattr(params, name) for name in settings} == settings
    assert (params.stop, params.stop_token_ids, params.logprobs) == (("zz",), (3, 4), None)
    assert engine.calls[0].priority == 2


async def test_defaults_come_from_the_model_then_from_the_format() -> None:
    engine = FakeEngine(generation_defaults=GenerationDefaults(temperature=0.25, top_k=50))
    await complete(engine)
    await complete(engine, temperature=0, top_k=-1, stop=None)
    first, second = (call.params for call in engine.calls)
    assert (first.temperature, first.top_k, first.top_p, first.seed) == (0.25, 50, 1.0, None)
    assert (second.temperature, second.top_k, second.stop) == (0, 0, ())


async def test_stop_string_ends_the_text_and_is_named() -> None:
    answer = await complete(FakeEngine(), stop=["zzz", ", w"])
    choice = answer["choices"][0]
    assert choice["finish_reason"] == "stop" and choice["stop_reason"] == ", w"


async def test_neutral_values_of_unsupported_fields_are_accepted() -> None:
    engine = FakeEngine()
    await complete(engine, **NEUTRAL, echo=False)
    await complete(engine)
    await chat(engine, **NEUTRAL, tools=[], tool_choice="none")
    await chat(engine)
    with_fields, without, chat_with_fields, chat_without = [call.params for call in engine.calls]
    assert (with_fields, chat_with_fields) == (without, chat_without)


async def test_unknown_fields_are_accepted_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "tinyvllm"):
        await complete(FakeEngine(), wibble=1)
        await complete(FakeEngine(), wibble=2)
    assert [record.getMessage() for record in caplog.records if "wibble" in record.getMessage()] == [
        "the request field 'wibble' is unknown and has no effect (logged once)"
    ]


# ---- Refusals ----


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [("/v1/completions", {"prompt": "a", **body}, param) for body, param in BOTH + COMPLETION_ONLY]
    + [("/v1/chat/completions", {**CHAT, **body}, param) for body, param in BOTH + CHAT_ONLY],
)
async def test_bad_field_is_refused_by_name(path: str, body: dict[str, Any], param: str) -> None:
    engine = FakeEngine()
    async with client_of(engine) as client:
        headers = {"content-type": "application/json"}
        response = await client.post(path, content=json.dumps(body), headers=headers)
    error = error_of(response)
    assert (response.status_code, error["type"], error["param"]) == (400, "invalid_request_error", param), error
    assert param.rsplit(".", 1)[-1] in error["message"] or param.split(".")[0] in error["message"]
    assert not engine.calls


@pytest.mark.parametrize(("path", "field"), [("/v1/chat/completions", "messages"), ("/v1/responses", "input")])
async def test_an_image_is_refused_with_its_part(path: str, field: str) -> None:
    kind = "image_url" if field == "messages" else "input_image"
    content = [{"type": "text", "text": "What is this?"}, {"type": kind, "image_url": "data:,"}]
    response = await post(FakeEngine(), path, {field: [{"role": "user", "content": content}]})
    assert response.status_code == 400
    assert f"part 1 is an image ({kind}), but this model runs text only" in error_of(response)["message"]


@pytest.mark.parametrize("constant", ["NaN", "Infinity"])
async def test_nan_and_infinity_are_refused(constant: str) -> None:
    async with client_of(FakeEngine()) as client:
        for name in ("temperature", "top_p", "min_p"):
            body = f'{{"prompt": "a", "{name}": {constant}}}'
            response = await client.post("/v1/completions", content=body, headers={"content-type": "application/json"})
            assert response.status_code == 400 and error_of(response)["param"] == name


@pytest.mark.parametrize(
    ("content", "content_type"),
    [
        (b"{", "application/json"),
        (b"", "application/json"),
        (b"[1]", "application/json"),
        (b'"x"', "application/json"),
        (b"\xff\xfe\x00", "application/json"),
        (b"[" * 15_000, "application/json"),
        (b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", "application/json"),
        (b'{"prompt": "a"}', "text/plain"),
        (b'{"prompt": "a"}', "nonsense"),
        (b'{"prompt": "a", "\\ud800": 1}', "application/json"),
    ],
)
async def test_body_that_is_not_a_json_object_is_refused(content: bytes, content_type: str) -> None:
    async with client_of(FakeEngine()) as client:
        response = await client.post("/v1/completions", content=content, headers={"content-type": content_type})
    assert response.status_code == 400
    assert error_of(response)["type"] == "invalid_request_error"


async def test_unknown_model_is_not_found() -> None:
    for response in (
        await post(FakeEngine(), "/v1/completions", {"prompt": "a", "model": "gpt-9"}),
        await post(FakeEngine(), "/v1/chat/completions", {**CHAT, "model": "gpt-9"}),
        await get(FakeEngine(), "/v1/models/gpt-9"),
        await get(FakeEngine(), "/v1/models/org/name"),
    ):
        error = error_of(response)
        assert response.status_code == 404
        assert (error["code"], error["param"]) == ("model_not_found", "model") and "'tiny'" in error["message"]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/messages", "/api/generate"])
async def test_an_error_does_not_repeat_all_that_was_sent(path: str) -> None:
    body = {"model": "x" * 2_000_000, "prompt": "a", "max_tokens": 1, **CHAT}
    response = await post(FakeEngine(), path, body)
    assert response.status_code == 404 and len(response.content) < 1000


def test_no_message_of_an_error_is_long() -> None:
    assert len(Failure(400, "x" * 2_000_000, "kind").response("/v1/completions").body) < 10_000


async def test_an_unknown_route_is_answered_without_the_schema_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which takes the event loop half a second to build."""
    monkeypatch.setattr(FastAPI, "openapi", lambda app: pytest.fail("the schema is built"))
    response = await get(FakeEngine(), "/nope" * 1000)
    message = error_of(response)["message"]
    assert response.status_code == 404 and "/v1/models/{model_id}, " in message and len(message) < 1500


async def test_what_a_route_does_not_find_is_not_called_an_unknown_route() -> None:
    response = await get(FakeEngine(), "/requests/nope")
    assert response.status_code == 404 and "'nope' is kept" in error_of(response)["message"]


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", "/nope", 404), ("GET", "/v1/completions", 405), ("PUT", "/health", 405)]
)
async def test_unknown_routes_and_methods_have_the_error_body(method: str, path: str, status: int) -> None:
    async with client_of(FakeEngine()) as client:
        response = await client.request(method, path)
    assert response.status_code == status
    assert path in error_of(response)["message"]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/completions", {"prompt": "x" * 1000}, "prompt"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x" * 999}]}, "messages"),
    ],
)
async def test_overlong_prompt_names_both_lengths(path: str, body: dict[str, Any], param: str) -> None:
    response = await post(FakeEngine(), path, body)
    error = error_of(response)
    assert response.status_code == 400
    assert (error["code"], error["param"]) == ("context_length_exceeded", param)
    assert "1000" in error["message"] and "10" in error["message"].split("has")[1]


async def test_output_that_cannot_fit_is_refused_and_the_default_gives_way() -> None:
    body = {"prompt": ["a", "x" * 990], "max_tokens": 11}
    error = error_of(await post(FakeEngine(), "/v1/completions", body))
    assert (error["code"], error["param"]) == ("context_length_exceeded", "max_tokens")
    assert "990" in error["message"] and "11" in error["message"] and "1000" in error["message"]
    engine = FakeEngine()
    assert (await post(engine, "/v1/completions", {**body, "max_tokens": None})).status_code == 200
    assert {len(call.prompt_ids): call.params.max_tokens for call in engine.calls} == {1: 16, 990: 10}


async def test_output_that_cannot_fit_is_clamped_if_the_server_says_so() -> None:
    for path, body, room in (
        ("/v1/completions", {"prompt": "ab", "max_tokens": 5000, "min_tokens": 500}, 98),
        ("/v1/chat/completions", {**CHAT, "max_completion_tokens": 5000}, 100 - len("<user>hi\n<assistant>")),
        ("/v1/responses", {"input": "hi", "max_output_tokens": 5000}, 100 - len("<user>hi\n<assistant>")),
        ("/v1/completions", {"prompt": "ab", "max_tokens": 9}, 9),
    ):
        engine = FakeEngine(reply="x" * 200, max_model_len=100)
        response = await post(engine, path, body, clamp_max_tokens=True)
        assert response.status_code == 200, response.text
        assert engine.calls[0].params.max_tokens == room and engine.calls[0].params.min_tokens <= room
    full = await post(FakeEngine(max_model_len=100), "/v1/completions", {"prompt": "x" * 100}, clamp_max_tokens=True)
    assert error_of(full)["code"] == "context_length_exceeded"


@pytest.mark.parametrize("stream", [False, True])
async def test_refusal_by_the_engine_has_its_status_in_streams_too(stream: bool) -> None:
    engine = FakeEngine(refuse=ContextLengthError("prompt has 5 tokens, but the pool holds 4"))
    response = await post(engine, "/v1/chat/completions", {**CHAT, "stream": stream})
    assert response.status_code == 400 and error_of(response)["code"] == "context_length_exceeded"


async def test_model_without_a_template_cannot_chat() -> None:
    response = await post(FakeEngine(chat_template=None), "/v1/chat/completions", CHAT)
    assert response.status_code == 400 and "--chat-template" in error_of(response)["message"]


async def test_large_body_is_refused() -> None:
    response = await post(FakeEngine(), "/v1/completions", {"prompt": "x" * 1100}, max_body_bytes=1024)
    assert response.status_code == 413 and "1024 bytes" in error_of(response)["message"]
    response = await post(FakeEngine(), "/v1/completions", {"prompt": "x" * 900}, max_body_bytes=1024)
    assert response.status_code == 200


# ---- Failures ----


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_failed_step_is_an_internal_error(path: str) -> None:
    for stream in (False, True):
        response = await post(FakeEngine(fail_after=0), path, {"prompt": "a", **CHAT, "stream": stream})
        assert response.status_code == 500 and "logits are not finite" in error_of(response)["message"]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_a_grammar_that_is_too_complex_is_an_error_of_the_request(path: str) -> None:
    engine = FakeEngine(fail_after=0, fail_text=f"{GRAMMAR_TOO_COMPLEX}: too many items")
    response = await post(engine, path, {"prompt": "a", **CHAT})
    assert response.status_code == 400 and "too many items" in error_of(response)["message"]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_failure_inside_a_stream_is_an_event(path: str) -> None:
    for engine, text in (
        (FakeEngine(fail_after=2), "logits are not finite"),
        (FakeEngine(abort_after=2), "aborted"),
        (FakeEngine(crash_after=2), "internal error"),
    ):
        *chunks, last = await events(engine, path, {"prompt": "a", **CHAT})
        assert text in last["error"]["message"] and last["error"]["type"] == "server_error"
        assert chunks and all("error" not in chunk for chunk in chunks)
        assert not engine.running


async def test_one_failed_prompt_ends_the_others() -> None:
    engine = FakeEngine(fail_after=3)
    response = await post(engine, "/v1/completions", {"prompt": ["a", "b", "c"]})
    assert response.status_code == 500 and not engine.running


async def test_an_unexpected_error_reveals_no_internals() -> None:
    response = await post(FakeEngine(refuse=ZeroDivisionError("secret")), "/v1/completions", {"prompt": "a"})
    assert response.status_code == 500
    assert "secret" not in response.text and error_of(response)["code"] == "internal_error"
    assert response.headers["x-request-id"]


async def test_aborted_request_may_be_retried() -> None:
    response = await post(FakeEngine(abort_after=0), "/v1/chat/completions", CHAT)
    assert response.status_code == 503 and response.headers["retry-after"]


# ---- Operations ----


async def test_health_follows_the_engine() -> None:
    response = await get(FakeEngine(), "/health")
    assert (response.status_code, response.content) == (200, b"")
    response = await get(FakeEngine(is_ready=False), "/health")
    assert response.status_code == 503 and response.headers["retry-after"] == "5"
    assert error_of(response)["code"] == "engine_not_ready"
    response = await get(FakeEngine(error=EngineDeadError("the thread has ended")), "/health")
    assert response.status_code == 503 and response.headers["x-should-retry"] == "false"
    assert "the thread has ended" in error_of(response)["message"] and error_of(response)["code"] == "engine_dead"


async def test_ready_counts_the_graphs_still_to_be_captured() -> None:
    response = await get(FakeEngine(), "/ready")
    expected = {"num_captures": 7, "num_captures_to_come": 2, "num_failed_captures": 1}
    assert (response.status_code, response.json()) == (200, expected)
    state = (await get(FakeEngine(), "/engine/state")).json()
    assert (state["status"], state["counts"]["num_captures_to_come"]) == ("ready", 2)


async def test_nothing_is_generated_before_the_engine_is_ready() -> None:
    for path, body in (("/v1/completions", {"prompt": "a"}), ("/v1/chat/completions", CHAT)):
        response = await post(FakeEngine(is_ready=False), path, body)
        assert response.status_code == 503 and error_of(response)["code"] == "engine_not_ready"
    assert (await get(FakeEngine(is_ready=False), "/v1/models")).status_code == 503


async def test_models_are_listed_and_retrieved() -> None:
    card = {
        "id": "tiny", "object": "model", "created": 1_700_000_000, "owned_by": "tinyvllm", "root": "tiny-model",
        "state": "ready", "parent": None, "max_model_len": 1000,
    }  # fmt: skip
    assert (await get(FakeEngine(), "/v1/models")).json() == {"object": "list", "data": [card]}
    assert (await get(FakeEngine(), "/v1/models/tiny")).json() == card
    with_slash = FakeEngine(served_model_name="org/name")
    assert (await get(with_slash, "/v1/models/org/name")).json()["id"] == "org/name"


async def test_probes_may_send_head() -> None:
    engine, paths = FakeEngine(), ("/health", "/ready", "/ping", "/version", "/metrics", "/v1/models", "/")
    with serving(engine) as url, httpx.Client(base_url=url) as client:
        for path in paths:
            answer = client.head(path)
            assert answer.status_code == 200 and answer.content == b"", path
        engine.is_ready = False
        assert [path for path in paths if client.head(path).status_code != 503] == ["/version", "/metrics", "/"]


async def test_version_is_a_string() -> None:
    assert set((await get(FakeEngine(), "/version")).json()) == {"version"}


async def test_request_id_is_echoed_when_valid_and_generated_otherwise() -> None:
    mine = (await get(FakeEngine(), "/health", headers={"x-request-id": "abc-1"})).headers["x-request-id"]
    assert mine == "abc-1"
    for odd in ("", "a b", "x" * 200, "é"):
        headers = {"x-request-id": odd.encode()}
        made = (await get(FakeEngine(), "/nope", headers=headers)).headers["x-request-id"]
        assert len(made) == 32


async def test_schema_describes_the_routes() -> None:
    schema = (await get(FakeEngine(), "/openapi.json")).json()
    assert {"/v1/completions", "/v1/chat/completions", "/v1/models", "/health", "/metrics"} <= set(schema["paths"])


async def test_a_model_answers_to_its_aliases_and_to_ollamas_tag() -> None:
    async with client_of(FakeEngine(), model_aliases=("small", "gpt-4o")) as client:
        listed = (await client.get("/v1/models")).json()["data"]
        assert [card["id"] for card in listed] == ["tiny", "small", "gpt-4o"]
        for name in ("tiny", "small", "tiny:latest", "gpt-4o:latest"):
            response = await client.post("/v1/completions", json={"model": name, "prompt": "x"})
            assert response.status_code == 200 and response.json()["model"] == "tiny"
            assert (await client.get(f"/v1/models/{name}")).json()["id"] == name
        response = await client.post("/v1/completions", json={"model": "tiny:7b", "prompt": "x"})
        assert response.status_code == 404 and "'tiny', 'small', 'gpt-4o'" in error_of(response)["message"]


async def test_an_api_that_is_off_has_no_routes() -> None:
    async with client_of(FakeEngine(), apis=("anthropic",)) as client:
        assert (await client.post("/v1/completions", json={"prompt": "x"})).status_code == 404
        assert (await client.get("/health")).status_code == 200
