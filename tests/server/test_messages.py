"""Chats with tools, reasoning and constrained output over HTTP: the requests to the engine, and parsing its text."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from tests.server.client import CHAT, chat, complete, error_of, events, get, post
from tests.server.fake_engine import FakeEngine, TagTemplate, serving
from tests.server.hermes import CALL, THINKING, hermes
from tinyvllm.config import EngineConfig, GenerationDefaults
from tinyvllm.engine.beam import BeamSettings
from tinyvllm.server import state
from tinyvllm.text.chat import ChatTemplate

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"type": "function", "function": {"name": "get_weather", "description": "Weather.", "parameters": PARAMETERS}}
NOW = {"type": "function", "function": {"name": "now"}}


def grammar_text(engine: FakeEngine) -> str:
    [call] = engine.calls
    assert call.params.grammar is not None
    return call.params.grammar.text


# ---- Tools ----


async def test_calls_are_split_from_the_text() -> None:
    engine = hermes(f"One moment.\n{CALL}\n{CALL.replace('Köln', 'Rom')}")
    answer = await chat(engine, tools=[WEATHER])
    [choice] = answer["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "One moment."
    first, second = choice["message"]["tool_calls"]
    assert first.pop("id") != second.pop("id")
    assert first == {"type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Köln"}'}}
    assert engine.chat_template is not None
    assert engine.chat_template.tools == [
        {"type": "function", "function": {"name": "get_weather", "description": "Weather.", "parameters": PARAMETERS}}
    ]


async def test_a_message_of_calls_alone_has_null_for_content() -> None:
    answer = await chat(hermes(CALL), tools=[WEATHER])
    assert answer["choices"][0]["message"]["content"] is None
    answer = await chat(hermes("No call."), tools=[WEATHER])
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": "No call.", "refusal": None}
    assert answer["choices"][0]["finish_reason"] == "stop"


async def test_calls_stream_with_id_and_name_once_and_arguments_in_pieces() -> None:
    chunks = await events(hermes(f"Wait. {CALL}"), "/v1/chat/completions", {**CHAT, "tools": [WEATHER]})
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert "".join(delta.get("content", "") for delta in deltas) == "Wait."
    calls = [call for delta in deltas for call in delta.get("tool_calls", [])]
    assert [sorted(call) for call in calls] == [["function", "id", "index", "type"]] + [["function", "index"]] * (
        len(calls) - 1
    )
    assert calls[0]["function"] == {"name": "get_weather", "arguments": ""}
    assert len(calls) > 5 and "".join(call["function"]["arguments"] for call in calls) == '{"city": "Köln"}'
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls" and deltas[-1] == {}


async def test_a_call_without_arguments_has_an_empty_object() -> None:
    reply = '<tool_call>{"name": "now"}</tool_call>'
    answer = await chat(hermes(reply), tools=[NOW])
    assert answer["choices"][0]["message"]["tool_calls"][0]["function"]["arguments"] == "{}"
    chunks = await events(hermes(reply), "/v1/chat/completions", {**CHAT, "tools": [NOW]})
    pieces = [c for chunk in chunks for c in chunk["choices"][0]["delta"].get("tool_calls", [])]
    assert "".join(piece["function"]["arguments"] for piece in pieces) == "{}"


async def test_a_call_that_is_cut_off_ends_by_length() -> None:
    answer = await chat(hermes(CALL), tools=[WEATHER], max_tokens=60)
    choice = answer["choices"][0]
    assert choice["finish_reason"] == "length"
    assert CALL.startswith("<tool_call>") and choice["message"]["tool_calls"][0]["function"]["name"] == "get_weather"


async def test_without_tools_or_with_choice_none_no_calls_are_parsed() -> None:
    for settings in ({}, {"tools": [WEATHER], "tool_choice": "none"}):
        engine = hermes(CALL)
        answer = await chat(engine, **settings)
        assert answer["choices"][0]["message"]["content"] == CALL
        assert engine.chat_template is not None and engine.chat_template.tools is None


async def test_auto_constrains_the_output_only_if_a_tool_is_strict() -> None:
    engine = hermes("Hello")
    await chat(engine, tools=[WEATHER], tool_choice="auto")
    assert engine.calls[0].params.grammar is None
    strict = {"type": "function", "function": {**WEATHER["function"], "strict": True}}  # type: ignore[dict-item]
    engine = hermes("Hello")
    await chat(engine, tools=[strict, NOW])
    assert "TEXT" in grammar_text(engine) and '"city"' in grammar_text(engine)


async def test_required_and_named_choices_constrain_the_output_to_calls() -> None:
    engine = hermes(CALL)
    await chat(engine, tools=[WEATHER, NOW], tool_choice="required")
    assert "get_weather" in grammar_text(engine) and "now" in grammar_text(engine) and ")*" in grammar_text(engine)
    engine = hermes(CALL)
    await chat(engine, tools=[WEATHER, NOW], tool_choice="required", parallel_tool_calls=False)
    assert ")*" not in grammar_text(engine)
    engine = hermes(CALL)
    named = {"type": "function", "function": {"name": "now"}}
    await chat(engine, tools=[WEATHER, NOW], tool_choice=named)
    assert "get_weather" not in grammar_text(engine) and "now" in grammar_text(engine)


async def test_without_parallel_calls_the_message_ends_with_its_first() -> None:
    reply = f"A. {CALL}{CALL}"
    settings: dict[str, Any] = {"tools": [WEATHER], "parallel_tool_calls": False}
    answer = await chat(hermes(reply), **settings)
    assert len(answer["choices"][0]["message"]["tool_calls"]) == 1
    chunks = await events(hermes(reply), "/v1/chat/completions", {**CHAT, **settings})
    calls = [c for chunk in chunks for c in chunk["choices"][0]["delta"].get("tool_calls", [])]
    assert {call["index"] for call in calls} == {0}


async def test_a_schema_of_a_tool_that_cannot_be_enforced_is_refused_by_its_path() -> None:
    bad = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"not": {}}}}}}
    body = {**CHAT, "tools": [NOW, bad], "tool_choice": "required"}
    error = error_of(await post(hermes(""), "/v1/chat/completions", body))
    assert error["param"] == "tools.1.function.parameters.properties.a.not"
    answer = await post(hermes("ok"), "/v1/chat/completions", {**body, "tool_choice": "auto"})
    assert answer.status_code == 200, "nothing is enforced, so nothing is refused"


async def test_history_reaches_the_template_with_arguments_as_objects() -> None:
    engine = hermes("It is sunny.")
    call = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Rom"}'}}
    history = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "sunny"}]},
    ]
    await chat(engine, messages=history, tools=[WEATHER])
    assert engine.chat_template is not None
    _, assistant, tool = engine.chat_template.messages
    assert assistant["content"] == "" and assistant["tool_calls"][0]["function"]["arguments"] == {"city": "Rom"}
    assert tool == {"role": "tool", "content": "sunny", "tool_call_id": "call_1"}


async def test_a_template_that_knows_no_tools_gets_them_as_text() -> None:
    engine = FakeEngine(reply='{"name": "now", "arguments": {}}', chat_template=TagTemplate("{{ messages }}"))
    answer = await chat(engine, tools=[NOW])
    assert "now" in engine.calls[0].prompt and engine.calls[0].prompt.startswith("<system>")
    assert answer["choices"][0]["message"]["tool_calls"][0]["function"]["name"] == "now"


async def test_a_parser_can_be_named() -> None:
    engine = FakeEngine(reply='[TOOL_CALLS][{"name": "now"}]')
    engine.config = EngineConfig("tiny", tool_call_parser="mistral")
    answer = await chat(engine, tools=[NOW])
    assert len(answer["choices"][0]["message"]["tool_calls"][0]["id"]) == 9


async def test_choices_have_calls_of_their_own() -> None:
    answer = await chat(hermes(CALL), tools=[WEATHER], n=2)
    ids = [choice["message"]["tool_calls"][0]["id"] for choice in answer["choices"]]
    assert len(set(ids)) == 2
    chunks = await events(hermes(CALL), "/v1/chat/completions", {**CHAT, "tools": [WEATHER], "n": 2})
    for index in (0, 1):
        deltas = [c["choices"][0]["delta"] for c in chunks if c["choices"][0]["index"] == index]
        pieces = [call["function"]["arguments"] for delta in deltas for call in delta.get("tool_calls", [])]
        assert "".join(pieces) == '{"city": "Köln"}'


# ---- Reasoning ----


async def test_reasoning_is_split_off_before_calls() -> None:
    engine = FakeEngine(reply=f"<think>\nHm. <tool_call>\n</think>\n\n{CALL}", chat_template=TagTemplate(THINKING))
    answer = await chat(engine, tools=[WEATHER])
    message = answer["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("Hm. <tool_call>", None)
    assert len(message["tool_calls"]) == 1


async def test_reasoning_streams() -> None:
    engine = FakeEngine(reply="<think>Hm.</think>Yes.", chat_template=TagTemplate(THINKING))
    chunks = await events(engine, "/v1/chat/completions", {**CHAT})
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "Hm."
    assert "".join(delta.get("content", "") for delta in deltas) == "Yes."
    assert not any("reasoning_content" in delta and "content" in delta for delta in deltas)


async def test_reasoning_may_be_left_out_or_left_in() -> None:
    template = TagTemplate(THINKING)
    answer = await chat(FakeEngine(reply="<think>Hm.</think>Yes.", chat_template=template), include_reasoning=False)
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": "Yes.", "refusal": None}
    engine = FakeEngine(reply="<think>Hm.</think>Yes.", chat_template=template)
    engine.config = EngineConfig("tiny", reasoning_parser="none")
    answer = await chat(engine)
    assert answer["choices"][0]["message"]["content"] == "<think>Hm.</think>Yes."


async def test_reasoning_may_precede_a_constrained_answer() -> None:
    engine = FakeEngine(reply="<think>Hm.</think>{}", chat_template=TagTemplate(THINKING))
    answer = await chat(engine, response_format={"type": "json_object"})
    assert answer["choices"][0]["message"]["content"] == "{}"
    grammar = engine.calls[0].params.grammar
    assert grammar is not None and "@answer" in grammar.prefix


OPENS = """{{ messages[0].content }}{# <parameter= #}{% if tools %}T{% endif %}<|assistant|>
{% if enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% else %}{{ '<think>\n' }}{% endif %}"""


async def test_the_prompt_may_open_the_reasoning_and_calls_may_be_between_tags() -> None:
    """As Qwen3.5's template and calls."""
    template: Any = ChatTemplate({"default": OPENS}, {}, "tiny")
    call = "<tool_call>\n<function=get_weather>\n<parameter=city>\nKöln\n</parameter>\n</function>\n</tool_call>"
    engine = FakeEngine(reply=f"Hm.\n</think>\n\n{call}", chat_template=template)
    answer = await chat(engine, tools=[WEATHER])
    message = answer["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("Hm.", None)
    assert message["tool_calls"][0]["function"] == {"name": "get_weather", "arguments": '{"city": "Köln"}'}
    assert answer["usage"]["completion_tokens_details"] == {"reasoning_tokens": 3}
    engine = FakeEngine(reply="Yes.", chat_template=template)
    answer = await chat(engine, tools=[WEATHER], reasoning_effort="none")
    assert engine.calls[0].prompt.endswith("</think>\n\n")
    assert answer["choices"][0]["message"]["content"] == "Yes."


# ---- Constrained output ----


@pytest.mark.parametrize(
    ("body", "kind", "text"),
    [
        ({"response_format": {"type": "json_object"}}, "json_object", ""),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "null"}}}},
            "json_schema",
            '{"type": "null"}',
        ),
        ({"structured_outputs": {"json": {"type": "null"}}}, "json_schema", '{"type": "null"}'),
        ({"structured_outputs": {"json": '{"type": "null"}'}}, "json_schema", '{"type": "null"}'),
        ({"structured_outputs": {"regex": "a+"}}, "regex", "a+"),
        ({"structured_outputs": {"choice": ["a", "b"]}}, "choice", '["a", "b"]'),
        ({"structured_outputs": {"grammar": 'root ::= "a"'}}, "grammar", 'root ::= "a"'),
        ({"structured_outputs": {"json_object": True}}, "json_object", ""),
        ({"guided_json": {"type": "null"}}, "json_schema", '{"type": "null"}'),
        ({"guided_regex": "a+"}, "regex", "a+"),
        ({"guided_choice": ["a"]}, "choice", '["a"]'),
        ({"guided_grammar": 'start: "a"'}, "grammar", 'start: "a"'),
    ],
)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_every_kind_of_constraint_reaches_the_engine(
    path: str, body: dict[str, Any], kind: str, text: str
) -> None:
    engine = FakeEngine(reply="x")
    response = await post(engine, path, {**CHAT, "prompt": "a", **body})
    assert response.status_code == 200, response.text
    grammar = engine.calls[0].params.grammar
    assert grammar is not None and (grammar.kind, grammar.text) == (kind, text)
    assert grammar.param in {name for key in body for name in (key, f"{key}.json_schema.schema")} | {
        f"structured_outputs.{name}" for name in body.get("structured_outputs", {})
    }


@pytest.mark.parametrize("stream", [False, True])
async def test_what_cannot_be_enforced_is_refused_by_its_path_before_a_status_is_sent(stream: bool) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string", "pattern": "(?=x)"}}}
    asked = {"type": "json_schema", "json_schema": {"name": "n", "strict": True, "schema": schema}}
    response = await post(FakeEngine(), "/v1/chat/completions", {**CHAT, "response_format": asked, "stream": stream})
    assert response.status_code == 400
    assert error_of(response)["param"] == "response_format.json_schema.schema.properties.a"


async def test_a_constrained_answer_with_tools_is_a_document_or_a_call() -> None:
    engine = hermes("{}")
    await chat(engine, tools=[NOW], response_format={"type": "json_object"})
    assert grammar_text(engine).startswith("start: calls | document")
    response = await post(
        hermes(""), "/v1/chat/completions", {**CHAT, "tools": [NOW], "structured_outputs": {"regex": "a"}}
    )
    assert error_of(response)["param"] == "structured_outputs.regex"


# ---- Other fields ----


async def test_a_salt_of_the_prefix_cache_reaches_the_engine() -> None:
    engine = FakeEngine()
    bodies: dict[str, dict[str, Any]] = {
        "/v1/completions": {"prompt": "a"},
        "/v1/chat/completions": CHAT,
        "/v1/responses": {"input": "a"},
        "/v1/messages": {**CHAT, "max_tokens": 5},
    }
    for path, body in bodies.items():
        assert (await post(engine, path, {**body, "cache_salt": path})).status_code == 200
        assert (await post(engine, path, {**body, "cache_salt": ""})).status_code == 400
    assert [call.cache_salt for call in engine.calls] == list(bodies)


async def test_template_arguments_and_roles_reach_the_template() -> None:
    engine = FakeEngine()
    messages = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    await chat(engine, messages=messages, chat_template_kwargs={"enable_thinking": False}, reasoning_effort="low")
    assert engine.chat_template is not None
    assert engine.chat_template.kwargs == {"enable_thinking": False, "reasoning_effort": "low"}
    assert engine.chat_template.messages[0] == {"role": "system", "content": "Be brief."}


async def test_usage_in_every_chunk_if_requested() -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    for path, body in (("/v1/chat/completions", CHAT), ("/v1/completions", {"prompt": "a"})):
        chunks = await events(FakeEngine(), path, {**body, "stream_options": options})
        counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
        assert counts == sorted(counts) and counts[-1] == 13


def test_the_openai_client_rebuilds_calls_of_a_stream() -> None:
    with serving(hermes(f"Wait. {CALL}")) as url:
        client = openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0)
        chat: dict[str, Any] = {"model": "tiny", "tools": [WEATHER], **CHAT}
        with client, client.chat.completions.stream(**chat) as stream:
            [choice] = stream.get_final_completion().choices
    assert choice.finish_reason == "tool_calls" and choice.message.tool_calls is not None
    assert json.loads(choice.message.tool_calls[0].function.arguments) == {"city": "Köln"}


# ---- Prompt logprobs ----


async def test_an_echo_has_the_logprobs_of_the_prompt_before_those_of_the_answer() -> None:
    answer = await complete(FakeEngine(reply="xy"), prompt="abc", echo=True, logprobs=2)
    choice = answer["choices"][0]
    assert choice["text"] == "abcxy"
    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == ["a", "b", "c", "x", "y"] and logprobs["text_offset"] == [0, 1, 2, 3, 4]
    assert logprobs["token_logprobs"] == [None, -1.0, -2.0, -9999.0, -9999.0]
    assert logprobs["top_logprobs"][0] is None and [len(top) for top in logprobs["top_logprobs"][1:]] == [2, 3, 3, 3]


async def test_an_echo_streams_once_its_logprobs_are_there() -> None:
    body = {"prompt": ["abc", "d"], "n": 2, "echo": True, "logprobs": 1, "max_tokens": 2}
    chunks = await events(FakeEngine(reply="xy"), "/v1/completions", body)
    for index, text in enumerate(["abcxy", "abcxy", "dxy", "dxy"]):
        pieces = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert "".join(piece["text"] for piece in pieces) == text
        tokens = [token for piece in pieces for token in (piece["logprobs"] or {"tokens": []})["tokens"]]
        offsets = [n for piece in pieces for n in (piece["logprobs"] or {"text_offset": []})["text_offset"]]
        assert tokens == list(text) and offsets == list(range(len(text)))


@pytest.mark.parametrize("stream", [False, True])
async def test_only_the_prompt_may_be_requested(stream: bool) -> None:
    body = {"prompt": "abc", "echo": True, "logprobs": 0, "max_tokens": 0}
    if stream:
        chunks = await events(FakeEngine(reply="xy"), "/v1/completions", body)
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "abc"
        assert chunks[-1]["choices"][0]["finish_reason"] == "length"
        return
    answer = await complete(FakeEngine(reply="xy"), **body)
    assert answer["choices"][0]["text"] == "abc" and answer["choices"][0]["finish_reason"] == "length"
    assert answer["choices"][0]["logprobs"]["token_logprobs"] == [None, -1.0, -2.0]
    assert answer["usage"]["completion_tokens"] == 0


async def test_prompt_logprobs_have_vllms_form() -> None:
    expected = {"98": {"logprob": -1.0, "rank": 1, "decoded_token": "b"}}
    answer = await complete(FakeEngine(reply="x"), prompt="ab", prompt_logprobs=0)
    assert answer["choices"][0]["prompt_logprobs"] == [None, expected]
    answer = await chat(FakeEngine(reply="x"), prompt_logprobs=1)
    assert answer["prompt_logprobs"][0] is None and len(answer["prompt_logprobs"][1]) == 2
    assert "prompt_logprobs" not in await chat(FakeEngine(reply="x"))


# ---- Tokenizer ----


async def test_texts_become_tokens_and_tokens_texts() -> None:
    answer = (await post(FakeEngine(), "/tokenize", {"prompt": "hé", "return_token_strs": True})).json()
    assert answer == {"count": 3, "max_model_len": 1000, "tokens": [104, 195, 169], "token_strs": ["h", "�", "�"]}
    answer = (await post(FakeEngine(), "/tokenize", CHAT)).json()
    assert bytes(answer["tokens"]) == b"<user>hi\n<assistant>"
    answer = (await post(FakeEngine(), "/detokenize", {"tokens": [104, 195, 169]})).json()
    assert answer == {"prompt": "hé"}
    for body, path in (({}, "/tokenize"), ({"prompt": "a", **CHAT}, "/tokenize"), ({"tokens": [257]}, "/detokenize")):
        assert (await post(FakeEngine(), path, body)).status_code == 400


async def test_tokenizer_info_has_what_lm_eval_needs() -> None:
    info = (await get(FakeEngine(), "/tokenizer_info")).json()
    assert (info["eos_token"], info["vocab_size"], info["bos_token"]) == ("<end>", 257, None)


# ---- Beam search ----


async def test_beam_search_runs_best_of_beams_on_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def search(engine: Any, ids: list[int], params: Any, settings: Any, **options: Any) -> Any:
        asked.append((params, settings))
        return engine.generate(ids, params, **options)

    monkeypatch.setattr(state, "generate_beams", search)
    engine = FakeEngine(reply="ab", generation_defaults=GenerationDefaults(temperature=0.5, top_p=0.5))
    body = {"use_beam_search": True, "n": 2, "best_of": 4, "length_penalty": 0.5, "early_stopping": True}
    for answer in (await complete(engine, **body), await chat(engine, **body)):
        assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    for params, settings in asked:
        assert (params.n, params.top_p, settings) == (4, 1.0, BeamSettings(0.5, early_stopping=True))
    assert len(asked) == 2
