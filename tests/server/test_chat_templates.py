"""Requests and the habits of chat templates, through the whole server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.agents.recordings import DATA, load
from tests.agents.scripted_engine import make_scripted_engine
from tests.builders import CHATML
from tests.server.client import client_of
from tests.server.fake_engine import FakeEngine
from tests.text.test_template_adapter import GEMMA, MISTRAL, PARTS_ONLY
from tests.text.write_template_abilities import OUTPUT as ABILITIES
from tests.text.write_template_abilities import load_templates
from tinyvllm.text.chat import ChatTemplate

WEATHER: dict[str, Any] = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}
CALL = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Rom"}'}}
LOOP: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "developer", "content": "Be kind."},
    {"role": "user", "content": "Weather?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
    {"role": "user", "content": "And now?"},
]


async def prompt_of(source: str, messages: list[dict[str, Any]], **body: Any) -> str:
    engine = FakeEngine(chat_template=ChatTemplate({"default": source}, {}, "tiny"))  # type: ignore[arg-type]
    async with client_of(engine) as client:
        response = await client.post("/v1/chat/completions", json={"model": "tiny", "messages": messages, **body})
    assert response.status_code == 200, response.text
    return engine.calls[0].prompt


@pytest.mark.parametrize("content", ["i", "<", "end"])
async def test_a_continued_message_ends_the_prompt(content: str) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": content}]
    prompt = await prompt_of(CHATML, messages, continue_final_message=True, add_generation_prompt=False)
    assert prompt.endswith(f"<|im_start|>assistant\n{content}")


@pytest.mark.parametrize("content", ["hi", [{"type": "text", "text": "hi"}]])
async def test_a_template_of_parts_shows_the_text(content: Any) -> None:
    prompt = await prompt_of(PARTS_ONLY, [{"role": "user", "content": content}])
    assert prompt == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


async def test_a_loop_of_an_agent_reaches_a_template_that_takes_little() -> None:
    prompt = await prompt_of(GEMMA, LOOP, tools=[WEATHER])
    places = [prompt.index(text) for text in ("Be brief.", "Be kind.", "Weather?", '"Rom"', "sunny", "And now?")]
    assert places == sorted(places) and prompt.index("You can call functions.") < places[2]
    prompt = await prompt_of(MISTRAL, LOOP, tools=[WEATHER])
    assert prompt.startswith("[INST]Be brief.\n\nBe kind.\n\nWeather?[/INST]") and prompt.endswith(":sunny\n\nAnd now?")


RECORDED = sorted(set(json.loads(ABILITIES.read_text(encoding="utf-8"))) - {"fireworks-ai-llama-3-firefunction-v2"})


@pytest.mark.tokenizers
@pytest.mark.parametrize("name", RECORDED)
async def test_what_agents_sent_is_rendered_by_every_template(name: str) -> None:
    for file in sorted(DATA.glob("*.json")):
        bodies = [
            one for one in load(file).requests if {"messages", "input"} & set(one.body or {}) and one.method == "POST"
        ]
        last = max(bodies, key=lambda one: len(json.dumps(one.body)))
        await check(name, file, last)


async def check(name: str, file: Path, request: Any) -> None:
    engine = make_scripted_engine()
    engine.chat_template, engine.max_model_len = load_templates()[name], 10**7  # type: ignore[assignment]
    async with client_of(engine, model_aliases=(request.body.get("model", "tiny"),)) as client:
        headers = {name: value for name, value in request.headers.items() if name != "content-encoding"}
        response = await client.request("POST", request.path, headers=headers, content=json.dumps(request.body))
    assert response.status_code == 200, f"{file.name}: {response.text}"
