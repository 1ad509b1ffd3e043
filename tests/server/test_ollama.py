"""Ollama's /api/chat and /api/generate: answers, streams, options, what is left out and what is refused."""

from __future__ import annotations

import itertools
import json
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.patience import jump_over_waits
from tests.server.client import client_of, post
from tests.server.fake_engine import FakeEngine, TagTemplate
from tests.server.hermes import CALL, THINKING, hermes
from tests.sweeps import examples
from tinyvllm.config import GenerationDefaults
from tinyvllm.engine.output import Timing
from tinyvllm.server.ollama.answers import durations
from tinyvllm.server.ollama.keep_alive import read_duration

USER = {"role": "user", "content": "hi"}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
DURATIONS = {
    "total_duration": 6_000_000_000,
    "load_duration": 0,
    "prompt_eval_duration": 2_000_000_000,
    "eval_duration": 4_000_000_000,
}


async def ask(engine: FakeEngine, path: str, **body: Any) -> dict[str, Any]:
    """The whole answer, after a check that the lines of a stream add up to it."""
    body = {"model": "tiny", **body}
    response = await post(engine, path, {**body, "stream": False})
    assert response.status_code == 200, response.text
    assert response.json()["created_at"].endswith("Z")
    answer = without_time(response.json())
    assert joined(await lines(engine, path, **body)) == answer
    return answer


async def lines(engine: FakeEngine, path: str, **body: Any) -> list[dict[str, Any]]:
    response = await post(engine, path, {"model": "tiny", **body})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/x-ndjson" and response.text.endswith("\n")
    return [json.loads(line) for line in response.text.splitlines()]


def without_time(line: dict[str, Any]) -> dict[str, Any]:
    ids = [call.pop("id") for call in line.get("message", {}).get("tool_calls", [])]
    assert all(len(call_id) > 5 for call_id in ids)
    return {name: value for name, value in line.items() if name != "created_at"}


def joined(streamed: list[dict[str, Any]]) -> dict[str, Any]:
    """The lines of a stream as one answer."""
    assert [line["done"] for line in streamed] == [False] * (len(streamed) - 1) + [True]
    total = without_time(streamed[-1])
    for line in reversed(streamed[:-1]):
        given, part = total.get("message", total), without_time(line).get("message", line)
        for name in ("content", "response", "thinking", "tool_calls"):
            if name in part:
                given[name] = part[name] + given.get(name, [] if name == "tool_calls" else "")
        if "logprobs" in line:
            total["logprobs"] = line["logprobs"] + total.get("logprobs", [])
    return total


async def refusal(engine: FakeEngine, path: str, status: int = 400, **body: Any) -> str:
    response = await post(engine, path, {"model": "tiny", **body})
    assert response.status_code == status, response.text
    assert list(response.json()) == ["error"]
    return str(response.json()["error"])


# ---- Answers ----


async def test_chat_has_the_fields_of_ollama() -> None:
    answer = await ask(FakeEngine(), "/api/chat", messages=[USER])
    assert answer == {
        "model": "tiny",
        "message": {"role": "assistant", "content": "Hello, wörld!"},
        "done": True,
        "done_reason": "stop",
        "prompt_eval_count": 20,
        "eval_count": 13,
        **DURATIONS,
    }


async def test_generate_answers_from_the_template_and_returns_its_context() -> None:
    engine = FakeEngine(reply="ab")
    answer = await ask(engine, "/api/generate", prompt="hi", system="Be brief.")
    assert engine.calls[0].prompt == "<system>Be brief.\n<user>hi\n<assistant>"
    assert answer["response"] == "ab" and answer["done_reason"] == "stop"
    assert answer["context"] == [*engine.calls[0].prompt_ids, 1, 1]
    await ask(engine, "/api/generate", prompt="more", context=answer["context"])
    assert engine.calls[-1].prompt_ids == answer["context"] + list(b"<user>more\n<assistant>")


async def test_raw_prompts_are_sent_as_they_are() -> None:
    engine = FakeEngine()
    answer = await ask(engine, "/api/generate", prompt="[INST] hi", raw=True)
    assert engine.calls[0].prompt == "[INST] hi" and "context" not in answer


async def test_a_model_without_a_template_gets_the_prompt_alone() -> None:
    engine = FakeEngine(chat_template=None)
    await ask(engine, "/api/generate", prompt="Once", system="Tell.")
    assert engine.calls[0].prompt == "Tell.\n\nOnce"
    assert "no chat template" in await refusal(engine, "/api/chat", messages=[USER])


@pytest.mark.parametrize(("path", "empty"), [("/api/chat", {"messages": []}), ("/api/generate", {}), ("/api/chat", {})])
async def test_requests_without_a_prompt_load_and_unload(path: str, empty: dict[str, Any]) -> None:
    engine = FakeEngine()
    for keep_alive, reason in (("5m", "load"), (0, "unload"), ("0s", "unload"), (-1, "load")):
        response = await post(engine, path, {"model": "tiny", "keep_alive": keep_alive, **empty})
        answer = response.json()
        assert response.headers["content-type"] == "application/json"
        assert answer["done"] and answer["done_reason"] == reason and answer["model"] == "tiny"
    assert not engine.calls


async def test_the_model_is_named_as_the_request_names_it() -> None:
    assert (await ask(FakeEngine(), "/api/chat", model="tiny:latest", messages=[USER]))["model"] == "tiny:latest"
    assert "model 'other' not found" in await refusal(FakeEngine(), "/api/chat", 404, model="other", messages=[USER])


async def test_an_answer_that_has_begun_is_continued() -> None:
    engine = FakeEngine()
    begun = {"role": "assistant", "content": "Well, "}
    answer = await ask(engine, "/api/chat", messages=[USER, begun])
    assert engine.calls[0].prompt == "<user>hi\n<assistant>Well, " and answer["message"]["content"] == "Hello, wörld!"
    await ask(engine, "/api/chat", messages=[USER, {**begun, "content": ""}])
    assert engine.calls[-1].prompt.endswith("\n<assistant>")


async def test_calls_are_objects_and_come_whole() -> None:
    text = f"Let me see.{CALL}" + CALL.replace("Köln", "Bonn")
    engine = hermes(text)
    answer = await ask(engine, "/api/chat", messages=[USER], tools=TOOLS)
    assert answer["done_reason"] == "stop" and answer["message"]["content"] == "Let me see."
    assert answer["message"]["tool_calls"] == [
        {"function": {"index": 0, "name": "get_weather", "arguments": {"city": "Köln"}}},
        {"function": {"index": 1, "name": "get_weather", "arguments": {"city": "Bonn"}}},
    ]
    streamed = await lines(engine, "/api/chat", messages=[USER], tools=TOOLS)
    assert sum("tool_calls" in line["message"] for line in streamed) == 2
    assert engine.chat_template is not None
    assert engine.chat_template.tools[0]["function"] == {"description": "", **TOOLS[0]["function"]}  # type: ignore[dict-item]


async def test_a_call_that_was_cut_short_is_shown_as_text() -> None:
    cut = CALL.index("Köln") + 2
    answer = await ask(hermes(CALL), "/api/chat", messages=[USER], tools=TOOLS, options={"num_predict": cut})
    assert answer["done_reason"] == "length" and "tool_calls" not in answer["message"]
    assert answer["message"]["content"] == 'get_weather({"city": "Kö)'


async def test_history_gets_ids_and_names_of_calls() -> None:
    engine = hermes("ok")
    calls = [{"function": {"name": name, "arguments": {"n": n}}} for n, name in enumerate(("a", "b", "a"))]
    messages = [
        USER,
        {"role": "assistant", "content": "", "thinking": "Hm.", "tool_calls": calls},
        {"role": "tool", "content": "of b", "tool_name": "b"},
        {"role": "TOOL", "content": "of the first a"},
        {"role": "tool", "content": "of the second a", "tool_name": "a"},
        {"role": "tool", "content": "of none", "tool_name": "c", "tool_call_id": "x"},
    ]
    await ask(engine, "/api/chat", messages=messages, tools=TOOLS)
    assert engine.chat_template is not None
    asked, *results = engine.chat_template.messages[1:]
    assert asked["reasoning_content"] == "Hm."
    ids = [call["id"] for call in asked["tool_calls"]]
    assert len(set(ids)) == 3 and asked["tool_calls"][1]["function"] == {"name": "b", "arguments": {"n": 1}}
    found = [(result["tool_call_id"], result["name"]) for result in results]
    assert found == [(ids[1], "b"), (ids[0], "a"), (ids[2], "a"), ("x", "c")]


# ---- Thinking ----


def thinker(reply: str = "<think>Hm.</think>Yes.") -> FakeEngine:
    return FakeEngine(reply=reply, chat_template=TagTemplate(THINKING))


@pytest.mark.parametrize(
    ("think", "arguments"),
    [
        (None, {"enable_thinking": True, "thinking": True}),
        (True, {"enable_thinking": True, "thinking": True}),
        ("low", {"enable_thinking": True, "thinking": True, "reasoning_effort": "low"}),
        ("max", {"enable_thinking": True, "thinking": True, "reasoning_effort": "high"}),
        (False, {"enable_thinking": False, "thinking": False, "reasoning_effort": "none"}),
    ],
)
async def test_think_sets_the_templates_variables(think: bool | str | None, arguments: dict[str, Any]) -> None:
    engine = thinker()
    answer = await ask(engine, "/api/chat", messages=[USER], think=think)
    assert engine.chat_template is not None and engine.chat_template.kwargs == arguments
    assert answer["message"] == {"role": "assistant", "content": "Yes.", "thinking": "Hm."}


async def test_generate_has_thinking_beside_the_response() -> None:
    answer = await ask(thinker(), "/api/generate", prompt="hi", think=True)
    assert (answer["thinking"], answer["response"]) == ("Hm.", "Yes.")


async def test_a_model_that_does_not_think_says_so() -> None:
    assert "does not support thinking" in await refusal(FakeEngine(), "/api/chat", messages=[USER], think="high")
    await ask(FakeEngine(), "/api/chat", messages=[USER], think=False)


# ---- Options ----


async def params_of(options: dict[str, Any], engine: FakeEngine | None = None, **body: Any) -> Any:
    engine = engine or FakeEngine()
    await ask(engine, "/api/chat", messages=[USER], options=options, **body)
    return engine.calls[-1].params


async def test_defaults_are_the_models_then_ollamas() -> None:
    params = await params_of({})
    assert (params.temperature, params.top_k, params.top_p) == (0.8, 40, 0.9)
    recommended = GenerationDefaults(temperature=0.6, min_p=0.1)
    params = await params_of({"top_k": 7}, FakeEngine(generation_defaults=recommended))
    assert (params.temperature, params.top_k, params.top_p, params.min_p) == (0.6, 7, 0.9, 0.1)


async def test_options_reach_the_engine() -> None:
    options = {"temperature": 0, "top_k": 20.0, "top_p": 1.5, "min_p": 0.05, "typical_p": 0.7, "seed": 42, "stop": "x"}
    options |= {"repeat_penalty": 1.2, "presence_penalty": 1.5, "frequency_penalty": 1, "num_predict": 9, "num_gpu": 1}
    params = await params_of({**options, "num_ctx": None, "mirostat": 1, "repeat_last_n": 33})
    assert (params.temperature, params.top_k, params.top_p, params.min_p, params.typical_p) == (0, 20, 1, 0.05, 0.7)
    assert (params.seed, params.stop, params.max_tokens) == (42, ("x",), 9)
    assert (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) == (1.2, 1.5, 1)


async def test_special_values_of_options() -> None:
    params = await params_of({"seed": -1, "num_predict": -2, "stop": ["", "a"], "top_p": 0, "repeat_last_n": 0})
    assert params.seed is None and params.max_tokens == 980 and params.stop == ("a",) and params.top_k == 1
    params = await params_of({"repeat_last_n": 0, "repeat_penalty": 1.3, "presence_penalty": 1.0})
    assert not params.has_penalties
    assert (await params_of({"num_predict": 5000})).max_tokens == 980  # cut to what fits
    assert (await params_of({"num_ctx": 100})).max_tokens == 80
    assert (await params_of({"num_ctx": 100_000})).max_tokens == 980


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": "hot"},
        {"top_k": 1.5},
        {"stop": [1]},
        {"seed": True},
        {"min_p": 2},
        {"num_ctx": "4k"},
        {"repeat_penalty": 0},
    ],
)
async def test_a_wrong_option_is_named(options: dict[str, Any]) -> None:
    assert next(iter(options)) in await refusal(FakeEngine(), "/api/chat", messages=[USER], options=options)


@pytest.mark.parametrize("path", ["/api/chat", "/api/generate"])
async def test_format_constrains_the_output(path: str) -> None:
    body: dict[str, Any] = {"messages": [USER]} if path == "/api/chat" else {"prompt": "hi"}
    engine = FakeEngine(reply="{}")
    await ask(engine, path, format="json", **body)
    assert engine.calls[-1].params.grammar is not None and engine.calls[-1].params.grammar.kind == "json_object"
    schema = {"type": "object", "properties": {"age": {"type": "integer"}}}
    await ask(engine, path, format=schema, **body)
    grammar = engine.calls[-1].params.grammar
    assert grammar is not None and grammar.kind == "json_schema" and json.loads(grammar.text) == schema
    await ask(engine, path, format="", **body)
    assert engine.calls[-1].params.grammar is None
    assert "format" in await refusal(engine, path, format="yaml", **body)
    assert "format" in await refusal(engine, path, format={"type": "nothing"}, **body)


async def test_logprobs_are_on_the_lines_of_their_tokens() -> None:
    answer = await ask(FakeEngine(reply="öb"), "/api/chat", messages=[USER], logprobs=True, top_logprobs=1)
    assert answer["logprobs"] == [
        {"token": token, "logprob": -9999.0, "bytes": list(token.encode()), "top_logprobs": [top]}
        for token, top in (("ö", _TOP), ("b", _TOP))
    ]


_TOP = {"token": "a", "logprob": -0.5, "bytes": [97]}


# ---- What does not fit ----


def turns(count: int, length: int = 100) -> list[dict[str, Any]]:
    """Alternating messages, each of which begins with its number."""
    return [{"role": "assistant" if n % 2 else "user", "content": f"{n:03}" + "." * (length - 3)} for n in range(count)]


async def test_the_oldest_messages_are_dropped_and_system_messages_stay() -> None:
    engine = FakeEngine()
    system = {"role": "system", "content": "Rules."}
    await ask(engine, "/api/chat", messages=[system, *turns(21)])
    prompt = engine.calls[-1].prompt
    assert prompt.startswith("<system>Rules.\n<user>") and prompt.endswith("." * 97 + "\n<assistant>")
    assert "<user>020" in prompt and len(prompt) <= 750  # a quarter of the context is left for the answer
    kept = [int(line.partition(">")[2][:3]) for line in prompt.splitlines()[1:-1]]
    assert kept[0] % 2 == 0 and kept[-5:] == list(range(16, 21)) and kept == sorted(kept)


async def test_the_turns_after_a_cut_begin_alike() -> None:
    engine = FakeEngine(reply="x")
    for count in range(11, 41, 2):
        await ask(engine, "/api/chat", messages=turns(count, 40), options={"num_predict": 20})
    prompts = [call.prompt.removesuffix("<assistant>") for call in engine.calls[::2]]
    extended = sum(later.startswith(earlier) for earlier, later in itertools.pairwise(prompts))
    assert extended >= 10 and prompts[-1].startswith("<user>") and "000" not in prompts[-1]


async def test_a_long_loop_keeps_its_task_and_whole_rounds() -> None:
    engine = hermes("x")
    rounds: list[dict[str, Any]] = []
    for n in range(9):
        call = {"id": f"call-{n}", "function": {"name": "get_weather", "arguments": {}}}
        rounds.append({"role": "assistant", "content": f"Round {n}.", "tool_calls": [call]})
        rounds.append({"role": "tool", "content": "." * 150, "tool_call_id": f"call-{n}"})
    history = [USER, {"role": "assistant", "content": "Hello."}, {"role": "user", "content": "The task."}, *rounds]
    await ask(engine, "/api/chat", messages=history, tools=TOOLS)
    assert engine.chat_template is not None
    task, *kept = engine.chat_template.messages
    assert task["content"] == "The task." and len(kept) >= 6
    assert [message["role"] for message in kept] == ["assistant", "tool"] * (len(kept) // 2)
    assert kept[-1]["tool_call_id"] == "call-8"


async def test_a_chat_that_fits_is_left_alone() -> None:
    engine = FakeEngine()
    await ask(engine, "/api/chat", messages=turns(7))
    assert engine.calls[-1].prompt.startswith("<user>000") and len(engine.calls[-1].prompt) > 750


@examples(15, 40)
@given(st.lists(st.integers(3, 400), min_size=1, max_size=12), st.integers(0, 900), st.integers(-1, 50))
async def test_whatever_is_sent_fits(lengths: list[int], num_predict: int, num_keep: int) -> None:
    engine = FakeEngine(reply="x")
    messages = [turns(n + 1, length)[n] for n, length in enumerate(lengths)]
    options = {"num_predict": num_predict, "num_keep": num_keep}
    body = {"model": "tiny", "messages": messages, "options": options, "stream": False}
    assert (await post(engine, "/api/chat", body)).status_code == 200
    call = engine.calls[0]
    assert call.params.max_tokens is not None and call.params.max_tokens >= 1
    assert len(call.prompt_ids) + call.params.max_tokens <= 1000


async def test_a_message_that_is_too_long_keeps_its_beginning_and_end() -> None:
    engine = FakeEngine(reply="x")
    await ask(engine, "/api/generate", prompt="b" * 3000, options={"num_keep": 7})
    prompt = engine.calls[-1].prompt
    assert len(prompt) == 999 and prompt.startswith("<user>bbb") and prompt.endswith("\n<assistant>")
    await ask(engine, "/api/generate", prompt="abcdefghij" * 200, raw=True, options={"num_ctx": 24})
    assert engine.calls[-1].prompt == "abcd" + ("abcdefghij" * 2)[-19:]


async def test_truncate_false_refuses_instead() -> None:
    for path, body in (("/api/chat", {"messages": turns(21)}), ("/api/generate", {"prompt": "b" * 3000})):
        assert "maximum context length" in await refusal(FakeEngine(), path, truncate=False, **body)


# ---- What is refused ----


@pytest.mark.parametrize(
    ("path", "body", "named"),
    [
        ("/api/chat", {"messages": [{**USER, "images": ["aGk="]}]}, "messages.0.images"),
        ("/api/chat", {"messages": [{"role": "narrator", "content": "x"}]}, "messages.0.role"),
        ("/api/chat", {"messages": [USER], "tools": [*TOOLS, *TOOLS]}, "tools.1"),
        ("/api/chat", {"messages": [USER], "keep_alive": "soon"}, "keep_alive"),
        ("/api/chat", {"messages": [USER], "think": "hard"}, "think"),
        ("/api/chat", {"messages": [USER], "top_logprobs": 21}, "top_logprobs"),
        ("/api/generate", {"prompt": "x", "images": ["aGk="]}, "images"),
        ("/api/generate", {"prompt": "x", "template": "{{ .Prompt }}"}, "template"),
        ("/api/generate", {"prompt": "x", "raw": True, "system": "y"}, "system"),
        ("/api/generate", {"prompt": "x", "context": [300]}, "context"),
        ("/api/generate", {"prompt": "x", "model": None}, "model"),
    ],
)
async def test_refusals_name_the_field(path: str, body: dict[str, Any], named: str) -> None:
    assert named in await refusal(FakeEngine(), path, **body)


async def test_bodies_need_no_content_type_but_from_a_page() -> None:
    body = json.dumps({"model": "tiny", "prompt": "hi", "stream": False})
    curls = {"content-type": "application/x-www-form-urlencoded"}
    async with client_of(FakeEngine()) as client:
        for headers, status in (
            ({}, 200),
            (curls, 200),
            ({"origin": "http://other", **curls}, 400),
            ({"origin": "http://other", "content-type": "text/plain"}, 400),
        ):
            response = await client.post("/api/generate", content=body, headers=headers)
            assert response.status_code == status, response.text


async def test_a_stream_that_fails_ends_with_an_error() -> None:
    response = await post(FakeEngine(fail_after=3), "/api/chat", {"model": "tiny", "messages": [USER]})
    *pieces, last = [json.loads(line) for line in response.text.splitlines()]
    assert response.status_code == 200 and len(pieces) == 2
    assert list(last) == ["error"] and "logits are not finite" in last["error"]
    assert "not finite" in await refusal(FakeEngine(fail_after=3), "/api/chat", 500, messages=[USER], stream=False)


async def test_silent_streams_send_pieces_without_text() -> None:
    jump_over_waits()
    engine = FakeEngine(hang_after=2)
    async with client_of(engine, keepalive_s=5, request_timeout_s=18) as client:
        response = await client.post("/api/chat", json={"model": "tiny", "messages": [USER]})
    answered = [json.loads(line) for line in response.text.splitlines()]
    empty = [line for line in answered if line.get("message", {}).get("content") == ""]
    assert len(empty) >= 3 and all(not line["done"] for line in empty) and "error" in answered[-1]


async def test_apis_can_be_turned_off() -> None:
    async with client_of(FakeEngine(), apis=("openai",)) as client:
        response: httpx.Response = await client.post("/api/chat", json={"model": "tiny"})
    assert response.status_code == 404 and list(response.json()) == ["error"]


# ---- Durations ----


@examples(30, 100)
@given(st.lists(st.floats(-5, 1e6), min_size=5, max_size=5), st.booleans())
def test_durations_add_up(times: list[float], is_sorted: bool) -> None:
    arrival, queued, scheduled, first, last = sorted(times) if is_sorted else times
    timing = Timing(
        submitted_s=queued,
        queued_s=queued,
        scheduled_s=scheduled,
        first_token_s=first,
        last_token_s=last,
        num_preemptions=0,
    )
    found = durations(timing, last - arrival, arrival)
    parts = found["load_duration"] + found["prompt_eval_duration"] + found["eval_duration"]
    assert min(found.values()) >= 0 and parts <= found["total_duration"]
    if is_sorted:
        assert found["total_duration"] - parts <= 2  # rounded


@pytest.mark.parametrize(
    ("given_value", "seconds"),
    [
        *(
            (None, None),
            (5, 5.0),
            ("5m", 300.0),
            ("1h30m", 5400.0),
            ("300ms", 0.3),
            ("1.5s", 1.5),
            (0, 0.0),
            ("0", 0.0),
        ),
        *((given, float("inf")) for given in (-1, "-1", "-5m", 1e300, 10**400, "9223372036854775807h", "inf")),
    ],
)
def test_keep_alive_is_a_number_or_a_duration(given_value: Any, seconds: float | None) -> None:
    assert read_duration(given_value) == seconds


@pytest.mark.parametrize("given_value", ["", "soon", "5 minutes", True, [], {}, "nan", "5m" * 1000])
def test_other_values_of_keep_alive_are_refused(given_value: Any) -> None:
    with pytest.raises(ValueError, match="duration"):
        read_duration(given_value)
