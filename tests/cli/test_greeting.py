"""What a start of `serve` prints."""

from __future__ import annotations

import json
import shlex
from typing import Any

import pytest

from tinyvllm.cli.greeting import Greeting
from tinyvllm.server.settings import APIS

MAX_LINES = 16  # with eight of the log before it, they fit on a screen of 24


def greeting(**facts: Any) -> Greeting:
    usual: dict[str, Any] = {
        "address": "http://127.0.0.1:8000",
        "names": ("smollm2-135m-instruct",),
        "apis": APIS,
        "needs_key": False,
        "can_chat": True,
        "context_tokens": 8192,
        "num_slots": 16,
    }
    return Greeting(**usual | facts)


@pytest.mark.parametrize("needs_key", [False, True])
@pytest.mark.parametrize("address", ["http://127.0.0.1:8000", "https://[::1]:8000", "unix:/run/user/1000/tiny.sock"])
def test_it_fits_on_a_screen(address: str, needs_key: bool) -> None:
    lines = list(greeting(address=address, needs_key=needs_key).lines())
    assert sum(-(-max(len(line), 1) // 80) for line in lines) <= MAX_LINES
    assert address in lines[0] and "8,192 tokens of context, 16 requests at once" in lines[0]
    assert lines[-1].endswith("docs/CLIENTS.md")


@pytest.mark.parametrize(
    ("facts", "path"),
    [
        ({}, "/v1/chat/completions"),
        ({"can_chat": False}, "/v1/completions"),
        ({"apis": ("ollama",)}, "/api/generate"),
        ({"apis": ("anthropic",)}, "/v1/messages"),
    ],
)
def test_the_second_line_can_be_pasted(facts: dict[str, Any], path: str) -> None:
    command = shlex.split(list(greeting(**facts).lines())[1])
    assert command[:2] == ["curl", f"http://127.0.0.1:8000{path}"]
    body = json.loads(command[-1])
    assert body["model"] == "smollm2-135m-instruct"
    assert body.get("max_tokens") or body["options"]["num_predict"], "a small model may not stop by itself"


def test_only_what_is_on_and_can_be_reached_is_named() -> None:
    variables = ("OPENAI_BASE_URL=", "ANTHROPIC_BASE_URL=", "OLLAMA_HOST=")

    def named(**facts: Any) -> list[str]:
        text = "\n".join(greeting(**facts).lines())
        return [variable for variable in variables if variable in text]

    assert named() == list(variables)
    assert named(apis=("openai", "ollama")) == ["OPENAI_BASE_URL=", "OLLAMA_HOST="]
    assert named(apis=("anthropic",)) == ["ANTHROPIC_BASE_URL="]
    assert named(can_chat=False) == ["OPENAI_BASE_URL=", "OLLAMA_HOST="], "an agent needs a chat template"
    assert named(needs_key=True) == ["OPENAI_BASE_URL=", "ANTHROPIC_BASE_URL="], "they cannot send a key"
    assert named(address="unix:/run/tiny.sock") == []


def test_claude_code_is_offered_where_its_prompt_fits() -> None:
    assert "claude" not in "\n".join(greeting(context_tokens=8192).lines())
    for num_tokens in (16_384, None):
        assert "ANTHROPIC_MODEL=smollm2-135m-instruct claude" in "\n".join(greeting(context_tokens=num_tokens).lines())


def test_keys_are_placeholders() -> None:
    text = "\n".join(greeting(needs_key=True).lines())
    assert "Bearer KEY" in text and "OPENAI_API_KEY=KEY" in text and "ANTHROPIC_AUTH_TOKEN=KEY" in text


def test_many_models_are_counted() -> None:
    names = tuple(f"model-{number}" for number in range(9))
    line, command = list(greeting(names=names, context_tokens=None, num_slots=1).lines())[:2]
    assert "model-3 and 5 more are served on http://127.0.0.1:8000 (1 request at once)" in line
    assert '"model": "model-0"' in command
