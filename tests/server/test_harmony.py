"""gpt-oss over HTTP: channels as reasoning, content and calls, whole and streamed; efforts, forced calls, documents."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import openai
import pytest

from tests.engine.fakes import FakeModelRunner
from tests.server.client import CHAT, chat, complete, error_of, events, post
from tests.server.fake_engine import FakeEngine, serving
from tests.server.test_responses import events_of, respond
from tests.text.harmony import TEMPLATE, encode, make_tokenizer
from tinyvllm.config import EngineConfig, GenerationDefaults
from tinyvllm.engine.async_engine import AsyncEngine
from tinyvllm.engine.loading import LoadedEngine, Progress, assemble_engine
from tinyvllm.scheduling.request import Request
from tinyvllm.text.chat import ChatTemplate, end_of_turn_ids

THOUGHT = "<|channel|>analysis<|message|>Hm. Well.<|end|><|start|>assistant"
FINAL = "<|channel|>final<|message|>"
CALL = '<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{"city": "Köln"}'
PREAMBLE = "<|channel|>commentary<|message|>I'll look.<|end|><|start|>assistant"
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER: Any = {"type": "function", "function": {"name": "get_weather", "parameters": PARAMETERS}}
NOW: Any = {"type": "function", "function": {"name": "now"}}
FLAT: Any = {"type": "function", "name": "get_weather", "parameters": PARAMETERS}


def harmony(reply: str, **config: Any) -> FakeEngine:
    engine = FakeEngine(reply=reply, chat_template=ChatTemplate({"default": TEMPLATE}, {}, "tiny"))  # type: ignore[arg-type]
    engine.config = EngineConfig("tiny", **config)
    return engine


def joined(chunks: list[Any], name: str) -> str:
    return "".join(choice["delta"].get(name) or "" for chunk in chunks for choice in chunk["choices"])


async def test_channels_are_reasoning_content_and_calls() -> None:
    answer = await chat(harmony(f"{THOUGHT}{FINAL}Yes."))
    [choice] = answer["choices"]
    assert choice["message"] == {
        "role": "assistant",
        "content": "Yes.",
        "refusal": None,
        "reasoning_content": "Hm. Well.",
    }
    assert choice["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens_details"] == {"reasoning_tokens": len("Hm. Well.")}, "a token a character"
    answer = await chat(harmony(THOUGHT + PREAMBLE + CALL), tools=[WEATHER])
    [choice] = answer["choices"]
    assert (choice["finish_reason"], choice["message"]["content"]) == ("tool_calls", "I'll look.")
    assert choice["message"]["tool_calls"][0]["function"] == {"name": "get_weather", "arguments": '{"city": "Köln"}'}


async def test_an_answer_streams_as_it_comes() -> None:
    options = {"stream_options": {"include_usage": True}}
    reply = THOUGHT + PREAMBLE + CALL
    chunks = await events(harmony(reply), "/v1/chat/completions", {**CHAT, **options, "tools": [WEATHER]})
    assert joined(chunks, "reasoning_content") == "Hm. Well." and joined(chunks, "content") == "I'll look."
    deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
    calls = [call for delta in deltas for call in delta.get("tool_calls", [])]
    assert calls[0]["function"] == {"name": "get_weather", "arguments": ""} and calls[0]["id"]
    assert len(calls) > 10 and "".join(call["function"]["arguments"] for call in calls) == '{"city": "Köln"}'
    assert chunks[-2]["choices"][0]["finish_reason"] == "tool_calls"
    assert chunks[-1]["usage"]["completion_tokens_details"] == {"reasoning_tokens": 9}
    kinds = [name for delta in deltas for name in delta if name != "role"]
    assert [kind for kind, last in zip(kinds[1:], kinds, strict=False) if kind != last] == [
        "reasoning_content", "content", "tool_calls",
    ]  # fmt: skip


async def test_responses_have_an_item_for_each_kind() -> None:
    reply = THOUGHT + PREAMBLE + THOUGHT + CALL
    answer = await respond(harmony(reply), tools=[FLAT])
    events = await events_of(harmony(reply), tools=[FLAT])
    for output in (answer["output"], events[-1]["response"]["output"]):
        assert [item["type"] for item in output] == ["reasoning", "message", "reasoning", "function_call"]
        assert [item["content"][0]["text"] for item in output[:3]] == ["Hm. Well.", "I'll look.", "Hm. Well."]
        assert output[3]["arguments"] == '{"city": "Köln"}'
    assert answer["usage"]["output_tokens_details"] == {"reasoning_tokens": 18}
    text = "".join(event["delta"] for event in events if event["type"] == "response.reasoning_text.delta")
    assert text == "Hm. Well." * 2


async def test_reasoning_of_a_turn_with_calls_goes_back_to_the_model() -> None:
    engine = harmony(f"{FINAL}21 degrees.")
    items = [
        {"role": "user", "content": "Weather?"},
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "I need it."}]},
        {"type": "function_call", "call_id": "a", "name": "get_weather", "arguments": '{"city": "Köln"}'},
        {"type": "function_call_output", "call_id": "a", "output": '{"degrees": 21}'},
    ]
    await respond(engine, input=items, tools=[FLAT], instructions="Be brief.", reasoning={"effort": "high"})
    prompt = engine.calls[0].prompt
    assert "Reasoning: high<|end|>" in prompt and "Be brief." in prompt
    assert prompt.endswith(
        "<|start|>assistant<|channel|>analysis<|message|>I need it.<|end|>"
        '<|start|>assistant to=functions.get_weather<|channel|>commentary json<|message|>{"city": "Köln"}<|call|>'
        '<|start|>functions.get_weather to=assistant<|channel|>commentary<|message|>{"degrees": 21}<|end|>'
        "<|start|>assistant"
    )
    engine = harmony(f"{FINAL}Yes.")
    said = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "reasoning_content": "old"},
        {"role": "user", "content": "c"},
    ]
    await chat(engine, messages=said)
    assert "old" not in engine.calls[0].prompt


@pytest.mark.parametrize(("effort", "meant"), [("low", "low"), ("minimal", "low"), ("high", "high"), (None, "medium")])
async def test_efforts(effort: str | None, meant: str) -> None:
    engine = harmony(f"{THOUGHT}{FINAL}Yes.")
    await chat(engine, reasoning_effort=effort)
    assert f"Reasoning: {meant}<" in engine.calls[0].prompt and engine.calls[0].prompt.endswith("<|start|>assistant")


async def test_no_effort_begins_the_answer_unless_there_are_tools() -> None:
    engine = harmony("Yes.")
    answer = await chat(engine, reasoning_effort="none", response_format={"type": "json_object"})
    assert engine.calls[0].prompt.endswith(f"<|start|>assistant{FINAL}")
    assert answer["choices"][0]["message"]["content"] == "Yes."
    grammar = engine.calls[0].params.grammar
    assert grammar is not None and grammar.prefix == ""
    engine = harmony(CALL)
    answer = await chat(engine, reasoning_effort="none", tools=[WEATHER])
    assert engine.calls[0].prompt.endswith("<|start|>assistant") and answer["choices"][0]["message"]["tool_calls"]
    error = error_of(await post(harmony(""), "/v1/chat/completions", {**CHAT, "reasoning_effort": "much"}))
    assert error["param"] == "reasoning_effort" and "minimal" in error["message"]


async def test_documents_and_forced_calls_have_headers() -> None:
    engine = harmony(f"{THOUGHT}{FINAL}{{}}")
    await chat(engine, response_format={"type": "json_object"})
    grammar = engine.calls[0].params.grammar
    assert grammar is not None and '"analysis"' in grammar.prefix and '"final"' in grammar.prefix
    engine = harmony(CALL)
    await chat(engine, tools=[WEATHER], tool_choice={"type": "function", "function": {"name": "get_weather"}})
    grammar = engine.calls[0].params.grammar
    assert grammar is not None and '"final"' not in grammar.prefix and "to=functions.get_weather" in grammar.text
    engine = harmony(f"{FINAL}{{}}")
    await chat(engine, tools=[WEATHER], response_format={"type": "json_object"})
    grammar = engine.calls[0].params.grammar
    assert grammar is not None and '"final"' in grammar.text and "to=functions.get_weather" in grammar.text


async def test_reasoning_may_be_left_out_or_left_in() -> None:
    answer = await chat(harmony(f"{THOUGHT}{FINAL}Yes."), include_reasoning=False)
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": "Yes.", "refusal": None}
    assert answer["usage"]["completion_tokens_details"] == {"reasoning_tokens": 9}
    answer = await chat(harmony(f"{THOUGHT}{FINAL}Yes.", reasoning_parser="none"))
    assert answer["choices"][0]["message"]["content"] == "Hm. Well.\n\nYes."
    assert "completion_tokens_details" not in answer["usage"]


async def test_names_of_vllm_choose_the_format() -> None:
    names: list[dict[str, Any]] = [{"tool_call_parser": "openai"}, {"reasoning_parser": "openai_gptoss"}]
    for config in names:
        engine = FakeEngine(reply=f"{THOUGHT}{FINAL}Yes.")
        engine.config = EngineConfig("tiny", **config)
        content = (await chat(engine))["choices"][0]["message"]["content"]
        assert content == "Yes."


async def test_a_message_may_be_continued() -> None:
    engine = harmony(" and no.")
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "Yes"}]
    answer = await chat(engine, messages=said, continue_final_message=True)
    assert engine.calls[0].prompt.endswith(f"<|start|>assistant{FINAL}Yes")
    assert answer["choices"][0]["message"]["content"] == " and no."


async def test_an_answer_that_is_cut_off_ends_by_length() -> None:
    answer = await chat(harmony(f"{THOUGHT}{FINAL}Yes."), max_tokens=34)
    [choice] = answer["choices"]
    assert choice["finish_reason"] == "length" and choice["message"]["reasoning_content"] == "Hm. "
    answer = await chat(harmony(CALL), tools=[WEATHER], max_tokens=len(CALL) - 2)
    assert answer["choices"][0]["finish_reason"] == "length" and answer["choices"][0]["message"]["tool_calls"]


async def test_completions_are_the_models_own_text() -> None:
    answer = await complete(harmony(f"{THOUGHT}{FINAL}Yes."), max_tokens=200)
    assert answer["choices"][0]["text"] == f"{THOUGHT}{FINAL}Yes."


def test_the_openai_client_reads_a_stream() -> None:
    with serving(harmony(THOUGHT + PREAMBLE + CALL)) as url:
        client = openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0)
        asked: dict[str, Any] = {"model": "tiny", "tools": [WEATHER], "reasoning_effort": "low", **CHAT}
        with client, client.chat.completions.stream(**asked) as stream:
            completion = stream.get_final_completion()
        [choice] = completion.choices
        assert choice.finish_reason == "tool_calls" and choice.message.content == "I'll look."
        assert choice.message.tool_calls is not None
        assert choice.message.tool_calls[0].function.arguments == '{"city": "Köln"}'
        assert completion.usage is None or completion.usage.completion_tokens > 0


# ---- With a real engine, whose device writes given tokens ----


TOKENIZER = make_tokenizer()


def load_engine(choose: Callable[[Request, int], int]) -> Callable[[EngineConfig, Progress], LoadedEngine]:
    tokenizer, template = TOKENIZER, ChatTemplate({"default": TEMPLATE}, {}, "tiny")
    runner = FakeModelRunner(num_blocks=128, max_model_len=512)
    runner.choose = choose
    runner.vocab_size = tokenizer.vocab_size
    runner.model_config = dataclasses.replace(runner.model_config, vocab_size=tokenizer.vocab_size)
    defaults = GenerationDefaults(eos_ids=end_of_turn_ids(template, tokenizer))
    return lambda config, _: assemble_engine(config, runner, tokenizer, template, defaults)


@contextlib.contextmanager
def client_of_engine(choose: Callable[[Request, int], int]) -> Iterator[openai.OpenAI]:
    engine = AsyncEngine.start(EngineConfig("tiny", served_model_name="tiny"), load=load_engine(choose))
    asyncio.run(engine.wait_ready())
    try:
        with serving(engine) as url, openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0) as client:
            yield client
    finally:
        asyncio.run(engine.shutdown())


def test_tokens_become_reasoning_content_and_calls() -> None:
    completion = (
        "«channel»analysis«message»Is <|end|> text? «end»«start»assistant«channel»commentary«message»Só.«end»"
        '«start»assistant«channel»commentary to=functions.get_weather «constrain»json«message»{"city": "Köln"}«call»'
    )
    ids = encode(TOKENIZER, completion)
    with client_of_engine(lambda request, digest: ids[len(request.output_ids)]) as client:
        asked: dict[str, Any] = {"model": "tiny", "tools": [WEATHER], "max_completion_tokens": 300, **CHAT}
        answer = client.chat.completions.create(**asked)
        streamed = list(client.chat.completions.create(stream=True, **asked))
        response = client.responses.create(model="tiny", input="hi", tools=[FLAT])
    [choice] = answer.choices
    message = choice.message.model_dump()
    assert (message["reasoning_content"], message["content"]) == ("Is <|end|> text? ", "Só.")
    assert choice.finish_reason == streamed[-1].choices[0].finish_reason == "tool_calls"
    [call] = message["tool_calls"]
    assert call["function"] == {"name": "get_weather", "arguments": '{"city": "Köln"}'}
    chunks = [chunk.model_dump() for chunk in streamed]
    assert joined(chunks, "reasoning_content") == "Is <|end|> text? " and joined(chunks, "content") == "Só."
    assert [item.type for item in response.output] == ["reasoning", "message", "function_call"]
    assert answer.usage is not None and answer.usage.completion_tokens == len(ids)
    details = answer.usage.completion_tokens_details
    assert details is not None and details.reasoning_tokens == len("Is <|end|> text? ")


def draw(request: Request, digest: int) -> int:
    """Some id that the request's grammar allows, often one that ends what is open."""
    assert request.constraint is not None
    mask = np.zeros((TOKENIZER.vocab_size + 31) // 32, np.int32)
    request.constraint.fill_mask(mask)
    ids = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
    special = [int(token_id) for token_id in ids if token_id in TOKENIZER.special_ids]
    return special[digest % len(special)] if special and digest % 8 == 0 else int(ids[digest % len(ids)])


def test_forced_calls_and_documents_are_valid_whatever_the_model_would_write() -> None:
    schema: Any = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"enum": [17, "yes"]}}}
    asked: dict[str, Any] = {"model": "tiny", "max_completion_tokens": 400, "seed": 3, **CHAT}
    with client_of_engine(draw) as client:
        for seed in range(3):
            asked["seed"] = seed
            answer = client.chat.completions.create(tool_choice="required", tools=[NOW], **asked)
            document = client.chat.completions.create(response_format=schema, **asked)
            [call], content = answer.choices[0].message.tool_calls or [], document.choices[0].message.content
            called = call.model_dump()["function"]
            assert called["name"] == "now" and json.loads(called["arguments"]) == {}
            assert answer.choices[0].finish_reason == "tool_calls" and json.loads(content or "") in (17, "yes")
