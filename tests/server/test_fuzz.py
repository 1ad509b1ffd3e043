"""Random requests, valid and broken: none is a 500, and every refusal has OpenAI's shape and names a field.

`pytest -m clients tests/server/test_fuzz.py` also runs schemathesis on the OpenAPI document (extra `clients`).
"""

from __future__ import annotations

import asyncio
import copy
import functools
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from hypothesis import given
from hypothesis import strategies as st

from tests.server.fake_engine import FakeEngine, TagTemplate, serving
from tests.server.hermes import CALL, THINKING
from tests.server.test_response_items import HISTORY, HOSTED, SKIPPED
from tests.sweeps import examples, swept
from tinyvllm.server.app import make_app
from tinyvllm.server.ollama.options import _READERS

# ---- Valid requests ----

words = st.text(st.characters(codec="utf-8"), max_size=8)
names = st.text("abcxyz_-", min_size=1, max_size=6)


def objects(required: dict[str, Any], **optional: Any) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(required, optional=optional)


def nullable(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.none() | strategy


schemas = st.recursive(
    st.sampled_from([{"type": "string"}, {"type": "integer", "minimum": 0}, {"enum": ["a", 1, None]}, {"const": 3}]),
    lambda inner: st.one_of(
        st.builds(lambda items: {"type": "array", "items": items, "maxItems": 3}, inner),
        st.builds(
            lambda properties: {"type": "object", "properties": properties, "required": sorted(properties)},
            st.dictionaries(names, inner, max_size=3),
        ),
        st.builds(lambda options: {"anyOf": options}, st.lists(inner, min_size=1, max_size=2)),
    ),
    max_leaves=4,
)
arguments = st.builds(lambda properties: {"type": "object", "properties": properties}, st.dictionaries(names, schemas))
functions = objects({"name": names}, description=words, parameters=arguments, strict=st.booleans())
tools = st.lists(
    st.builds(lambda function: {"type": "function", "function": function}, functions),
    max_size=3,
    unique_by=lambda tool: tool["function"]["name"],
)
chat_tools = tools | st.builds(lambda name: [{"type": "custom", "custom": {"name": name}}], names)
contents = words | st.lists(st.builds(lambda text: {"type": "text", "text": text}, words), max_size=2)
past_calls = st.lists(
    st.builds(
        lambda name, text: {"id": "c", "type": "function", "function": {"name": name, "arguments": text}},
        names,
        st.sampled_from(["{}", '{"a": 1}', "not JSON", ""]),
    ),
    min_size=1,
    max_size=2,
)
messages = st.lists(
    st.one_of(
        objects({"role": st.sampled_from(["system", "developer", "user", "assistant"]), "content": contents}),
        objects({"role": st.just("assistant"), "tool_calls": past_calls}, content=nullable(words)),
        objects({"role": st.just("tool"), "content": contents, "tool_call_id": st.just("c")}),
        objects({"role": st.just("function"), "content": nullable(words), "name": names}),
        objects({"role": st.just("assistant"), "function_call": objects({"name": names, "arguments": words})}),
    ),
    min_size=1,
    max_size=4,
)
sampling: dict[str, Any] = {
    "n": st.integers(1, 3),
    "temperature": st.floats(0, 2),
    "top_p": st.floats(0.1, 1),
    "top_k": st.integers(-1, 50),
    "min_p": st.floats(0, 1),
    "typical_p": st.floats(0.1, 1),
    "frequency_penalty": st.floats(-2, 2),
    "presence_penalty": st.floats(-2, 2),
    "repetition_penalty": st.floats(0.5, 2),
    "logit_bias": st.dictionaries(st.integers(0, 255).map(str), st.floats(-100, 100), max_size=3),
    "bad_words": st.lists(names, max_size=2),
    "allowed_token_ids": st.lists(st.integers(0, 255), min_size=1, max_size=4),
    "seed": st.integers(-(2**63), 2**63 - 1),
    "stop": words | st.lists(names, max_size=3),
    "stop_token_ids": st.lists(st.integers(0, 255), max_size=3),
    "ignore_eos": st.booleans(),
    "user": words,
    "metadata": st.dictionaries(words, words, max_size=2),
}
truncation: dict[str, Any] = {
    "truncate_prompt_tokens": st.none() | st.integers(1, 2000) | st.just(-1),
    "truncation_side": st.sampled_from([None, "left", "right"]),
    "return_token_ids": st.booleans(),
    "return_tokens_as_token_ids": st.booleans(),
}
formats = st.one_of(
    st.sampled_from([{"type": "text"}, {"type": "json_object"}]),
    st.builds(lambda schema: {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}, schemas),
)
chats = objects(
    {"messages": messages},
    **{name: nullable(strategy) for name, strategy in sampling.items()},
    max_tokens=st.integers(1, 50),
    max_completion_tokens=st.integers(1, 50),
    tools=chat_tools,
    tool_choice=st.sampled_from(["none", "auto"]),
    parallel_tool_calls=st.booleans(),
    response_format=formats,
    stream=st.booleans(),
    logprobs=st.booleans(),
    **truncation,
    chat_template_kwargs=st.just({"enable_thinking": False}),
)
completions = objects(
    {"prompt": names | st.lists(names, min_size=1, max_size=2) | st.lists(st.integers(0, 255), min_size=1, max_size=5)},
    **sampling,
    max_tokens=st.integers(1, 50),
    stream=st.booleans(),
    logprobs=st.integers(0, 5),
    echo=st.booleans(),
    structured_outputs=st.sampled_from([{"regex": "a+"}, {"choice": ["a", "b"]}, {"grammar": 'root ::= "a"'}]),
    **truncation,
)
grammars = st.sampled_from([("regex", "[a-z]+"), ("lark", 'start: "a"+'), ("lark", 'start: "(" start? ")"')])
flat_tools = st.one_of(
    st.builds(lambda function: {"type": "function", **function}, functions),
    st.builds(
        lambda name, grammar: {
            "type": "custom",
            "name": name,
            "format": {"type": "grammar", "syntax": grammar[0], "definition": grammar[1]},
        },
        names,
        grammars,
    ),
    st.builds(lambda name: {"type": "namespace", "name": name, "tools": [{"type": "custom", "name": name}]}, names),
    st.sampled_from(HOSTED),
)
responses = objects(
    {
        "input": words
        | st.lists(
            objects({"role": st.sampled_from(["user", "assistant"]), "content": words})
            | st.sampled_from([*HISTORY, *SKIPPED]),
            min_size=1,
            max_size=5,
        )
    },
    instructions=words,
    max_output_tokens=st.integers(1, 50),
    temperature=st.floats(0, 2),
    tools=st.lists(flat_tools, max_size=3, unique_by=lambda tool: str(tool.get("name", tool["type"]))),
    tool_choice=st.sampled_from(["auto", "none", {"type": "allowed_tools", "mode": "auto", "tools": []}]),
    include=st.just(["reasoning.encrypted_content", "message.output_text.logprobs"]),
    truncation=st.sampled_from(["auto", "disabled"]),
    stream=st.booleans(),
    store=st.booleans(),
)
options = objects(
    {},
    temperature=st.floats(0, 2),
    top_k=st.integers(-1, 50),
    top_p=st.floats(0, 1.5),
    min_p=st.floats(0, 1),
    typical_p=st.floats(0.1, 1),
    seed=st.integers(-(2**63), 2**63 - 1),
    stop=words | st.lists(names, max_size=3),
    repeat_penalty=st.floats(0.5, 2),
    presence_penalty=st.floats(-2, 2),
    frequency_penalty=st.floats(-2, 2),
    repeat_last_n=st.integers(-1, 64),
    num_predict=st.integers(-2, 9000),
    num_ctx=st.integers(0, 9000),
    num_keep=st.integers(-1, 9000),
    mirostat=st.integers(0, 2),
)
ollama_generation: dict[str, Any] = {
    "options": nullable(options),
    "stream": st.booleans(),
    "think": st.sampled_from([None, True, False, "low", "max"]),
    "format": st.sampled_from([None, "", "json"]) | schemas,
    "keep_alive": st.sampled_from([None, 0, -1, "5m", "1h30m", "-1"]),
    "truncate": st.booleans(),
    "logprobs": st.booleans(),
    "top_logprobs": st.integers(0, 20),
}
ollama_messages = st.lists(
    st.one_of(
        objects({"role": st.sampled_from(["system", "user", "assistant"])}, content=nullable(words), thinking=words),
        objects(
            {"role": st.just("assistant")},
            tool_calls=st.lists(
                st.builds(lambda name: {"function": {"name": name, "arguments": {"a": 1}}}, names), max_size=2
            ),
        ),
        objects({"role": st.just("tool"), "content": words}, tool_name=names, tool_call_id=names),
    ),
    max_size=4,
)
ollama_chats = objects({"model": st.just("tiny"), "messages": ollama_messages}, tools=tools, **ollama_generation)
ollama_generates = objects(
    {"model": st.just("tiny:latest")},
    prompt=words,
    system=words,
    raw=st.just(False),
    context=st.lists(st.integers(0, 255), max_size=9),
    **ollama_generation,
)
ollama_embeds = objects(
    {"model": st.just("tiny"), "input": nullable(names | st.lists(names, max_size=3))},
    truncate=st.booleans(),
    dimensions=st.integers(0, 9),
)
blocks = st.builds(lambda text: {"type": "text", "text": text}, words)
results = st.builds(
    lambda content, is_error: {"type": "tool_result", "tool_use_id": "t", "content": content, "is_error": is_error},
    words | st.lists(blocks, max_size=2),
    st.booleans(),
)
uses = st.builds(
    lambda name, text: {"type": "tool_use", "id": "t", "name": name, "input": {"a": text}},
    names,
    words,
)
thoughts = st.builds(lambda text: {"type": "thinking", "thinking": text, "signature": "s"}, words)
anthropic_messages = objects(
    {
        "max_tokens": st.integers(0, 5000),
        "messages": st.lists(
            st.one_of(
                objects({"role": st.sampled_from(["user", "assistant", "system"]), "content": words}),
                objects({"role": st.just("user"), "content": st.lists(blocks | results, max_size=3)}),
                objects({"role": st.just("assistant"), "content": st.lists(blocks | uses | thoughts, max_size=3)}),
            ),
            min_size=1,
            max_size=4,
        ),
    },
    system=nullable(words | st.lists(blocks, max_size=2)),
    temperature=nullable(st.floats(0, 1)),
    top_p=nullable(st.floats(0.1, 1)),
    top_k=nullable(st.integers(0, 50)),
    stop_sequences=nullable(st.lists(names, max_size=3)),
    stream=nullable(st.booleans()),
    tools=st.lists(
        st.builds(lambda name, schema: {"name": name, "input_schema": schema}, names, arguments)
        | st.sampled_from([{"type": "web_search_20250305", "name": "w"}, {"type": "bash_20250124", "name": "sh"}]),
        max_size=3,
        unique_by=lambda tool: tool["name"],
    ),
    tool_choice=st.sampled_from([{"type": "auto", "disable_parallel_tool_use": True}, {"type": "none"}]),
    thinking=st.sampled_from([{"type": "enabled", "budget_tokens": 2000}, {"type": "disabled"}, {"type": "adaptive"}]),
    output_config=st.builds(lambda schema: {"format": {"type": "json_schema", "schema": schema}}, arguments),
)
embeddings = objects(
    {"input": names | st.lists(names, min_size=1, max_size=3) | st.lists(st.integers(0, 255), min_size=1, max_size=4)},
    dimensions=st.integers(1, 4),
    encoding_format=st.sampled_from(["float", "base64"]),
    truncate_prompt_tokens=st.sampled_from([None, -1, 1, 7]),
    truncation_side=st.sampled_from([None, "left", "right"]),
    add_special_tokens=st.booleans(),
)
documents = st.lists(names | st.builds(lambda text: {"text": text}, names), min_size=1, max_size=3)
scoring: dict[str, Any] = {"use_activation": st.booleans(), "instruction": words, "priority": st.integers(0, 9)}
reranks = objects(
    {"query": names, "documents": documents},
    top_n=st.integers(0, 5),
    return_documents=st.booleans(),
    max_tokens_per_doc=st.integers(1, 9),
    truncate_prompt_tokens=st.sampled_from([None, -1, 1, 7]),
    **scoring,
)
scores = objects({"text_1": names, "text_2": documents}, **scoring) | objects({"queries": names, "items": documents})
tokenizations = objects({"prompt": words}) | objects({"messages": messages}, tools=tools)
ROUTES = {
    "/v1/chat/completions": chats,
    "/v1/completions": completions,
    "/v1/responses": responses,
    "/api/chat": ollama_chats,
    "/api/generate": ollama_generates,
    "/api/embed": ollama_embeds,
    "/api/show": objects({"model": st.just("tiny")}, verbose=st.booleans()),
    "/tokenize": tokenizations,
    "/v1/embeddings": embeddings,
    "/v1/rerank": reranks,
    "/v1/score": scores,
    "/v1/messages": anthropic_messages,
    "/v1/messages/count_tokens": anthropic_messages,
}
requests = st.one_of([st.tuples(st.just(path), bodies) for path, bodies in ROUTES.items()])

# ---- Broken ones ----

junk = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        st.sampled_from([2**63, -1, "", "\ud800", "x" * 300, {"$ref": "#"}, {"not": {}}, {"type": "function"}]),
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=6,
)


def paths_of(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The places where a value can be replaced."""
    inner: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        inner = list(value.items())
    elif isinstance(value, list):
        inner = list(enumerate(value))
    return [path, *(deeper for key, item in inner for deeper in paths_of(item, (*path, key)))]


@st.composite
def broken_requests(draw: st.DrawFn) -> tuple[str, Any]:
    """A valid request with one value at any depth replaced, removed or added."""
    path, body = draw(requests)
    body = copy.deepcopy(body)
    for _ in range(draw(st.integers(1, 2))):
        *parents, last = draw(st.sampled_from([*paths_of(body)[1:], ("x",)]))
        holder = body
        for key in parents:
            holder = holder[key]
        if isinstance(holder, dict) and draw(st.booleans()):
            holder.pop(last, None)
        elif isinstance(holder, dict | list):
            holder[last] = copy.deepcopy(draw(junk))  # `junk` draws the same objects again
    return path, body


REPLIES = ["ab", f"<think>x</think>{CALL}", '{"name": "a", "arguments": {}}', "{"]


@functools.cache
def shared() -> tuple[FakeEngine, httpx.ASGITransport]:
    """One app for all examples, because making one takes longer than a request."""
    engine = FakeEngine(chat_template=TagTemplate(THINKING), max_model_len=5000)
    engine.model_config.pooling = "last"
    return engine, httpx.ASGITransport(make_app(engine))  # type: ignore[arg-type]


async def ask(path: str, body: Any, reply: str) -> tuple[int, str]:
    engine, transport = shared()
    engine.reply = reply
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        content = json.dumps(body).encode()
        response = await client.post(path, content=content, headers={"content-type": "application/json"})
    assert not engine.running, "a request runs on"
    return response.status_code, response.text


def is_reason_to_refuse(message: str) -> bool:
    """Valid fields may be incompatible, and a valid schema may not be enforceable."""
    known = (
        "cannot be enforced",
        "has no tokens",
        "have no content",
        "is more than",
        "must be at most",
        "both say",
        "cannot bind",
        "nothing that a model can read",
    )
    return any(word in message for word in known)


@examples(30, 100)
@given(requests, st.sampled_from(REPLIES))
def test_valid_requests_are_answered(request: tuple[str, Any], reply: str) -> None:
    status, text = asyncio.run(ask(*request, reply))
    assert status == 200 or (status == 400 and is_reason_to_refuse(text)), text
    if status == 200 and '"error": {' in text:
        assert "internal error" not in text, text


@examples(60, 200)
@given(broken_requests(), st.sampled_from(REPLIES))
def test_broken_requests_are_answered_or_refused_by_name(request: tuple[str, Any], reply: str) -> None:
    status, text = asyncio.run(ask(*request, reply))
    assert status in (200, 400, 404), text
    assert "internal error" not in text, text
    if status != 200:
        error = json.loads(text)["error"]
        if request[0].startswith("/api/"):  # Ollama's
            assert isinstance(error, str) and error
            return
        is_anthropic = request[0].startswith("/v1/messages")
        assert set(error) - {"details"} == (
            {"message", "type"} if is_anthropic else {"message", "type", "param", "code"}
        )
        assert error["message"] and error["type"] in ("invalid_request_error", "not_found_error")


# ---- Extremes of every number ----

EXTREMES: list[Any] = [
    *(0, -1, 2**31, 2**63, -(2**63) - 1, 10**400, -(10**400), 1e-46, -1e-46, 1e-320, 1e308, -1e308, 0.5, True, "1"),
    *(math.nan, math.inf, -math.inf),
]
LISTS = ("stop_token_ids", "allowed_token_ids", "prompt", "input", "tokens", "context", "token_ids")
MINIMAL: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}]},
    "/v1/completions": {"prompt": "x"},
    "/v1/responses": {"input": "x"},
    "/v1/messages": {"messages": [{"role": "user", "content": "x"}], "max_tokens": 5},
    "/v1/embeddings": {"input": "x"},
    "/v1/rerank": {"query": "x", "documents": ["a"]},
    "/v1/score": {"text_1": "x", "text_2": "a"},
    "/api/chat": {"model": "tiny", "messages": [{"role": "user", "content": "x"}]},
    "/api/generate": {"model": "tiny", "prompt": "x"},
    "/api/embed": {"model": "tiny", "input": "x"},
    "/tokenize": {"prompt": "x"},
    "/detokenize": {"tokens": [1]},
}


def extreme_bodies(app: FastAPI, path: str) -> Iterator[dict[str, Any]]:
    """The minimal body with each of the numbers that the document names, and each of these at each extreme."""
    document = app.openapi()
    reference = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"]
    fields = document["components"]["schemas"][reference.rpartition("/")[2]]["properties"]
    for name, schema in fields.items():
        for value in EXTREMES:
            if any(f'"type": "{kind}"' in json.dumps(schema) for kind in ("integer", "number")):
                yield {**MINIMAL[path], name: [value] if name in LISTS else value}
    for value in EXTREMES:
        yield {**MINIMAL[path], "logit_bias": {"5": value}}
        yield from ({**MINIMAL[path], "options": {name: value}} for name in _READERS if path.startswith("/api/"))


@pytest.mark.parametrize("path", swept(MINIMAL, ["/v1/completions", "/v1/messages", "/api/generate"]))
def test_no_extreme_of_a_number_is_an_error_of_the_server(path: str) -> None:
    app = shared()[1].app
    for body in extreme_bodies(app, path):  # type: ignore[arg-type]
        status, text = asyncio.run(ask(path, body, "a"))
        assert status in (200, 400), (body, text)
        assert "internal error" not in text, (body, text)


# Every answer must be as the document says, whatever is sent.
CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"


@pytest.mark.clients
@pytest.mark.timeout(900)
def test_schemathesis_finds_no_crash_and_no_undocumented_answer() -> None:
    command = Path(sys.executable).parent / "schemathesis"
    with serving(FakeEngine(reply="ab")) as url:
        flags = f"--checks {CHECKS} --max-examples 50 --seed 1 --phases examples,coverage,fuzzing"
        done = subprocess.run(
            [command, "run", f"{url}/openapi.json", *flags.split(), "--exclude-path-regex", "profile|pull"],
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
