"""opencode, which speaks OpenAI's chat API through Vercel's AI SDK.

scripts/fetch_agents.sh /tmp/agents && TINYVLLM_AGENTS=/tmp/agents pytest -m agents tests/agents/test_opencode.py
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.agents.recordings import record
from tests.agents.running import Agent, make_agent, no_network
from tests.agents.scripted_engine import REASONING_TEMPLATE, call, loop, scripted_server, thought

pytestmark = [pytest.mark.agents, pytest.mark.timeout(200)]


def make_opencode(folder: Path, url: str, package: str = "@ai-sdk/openai-compatible") -> Agent:
    """opencode with the settings of docs/CLIENTS.md. package: Vercel's provider, one for each API; all are built in."""
    model = {"name": "tiny", "limit": {"context": 131072, "output": 8192}}
    provider = {
        "npm": package,
        "name": "tinyvllm",
        "options": {"baseURL": f"{url}/v1", "apiKey": "none"},
        "models": {"tiny": model},
    }
    settings = {
        "provider": {"tinyvllm": provider},
        "model": "tinyvllm/tiny",
        "autoupdate": False,
        "share": "disabled",
        "permission": "allow",
    }
    return make_agent(
        "opencode",
        folder,
        {"OPENCODE_CONFIG_CONTENT": json.dumps(settings), "OPENCODE_DISABLE_MODELS_FETCH": "1"},
    )


def test_a_file_is_read_edited_and_shown(tmp_path: Path) -> None:
    file = tmp_path / "project" / "hello.txt"
    script = loop(
        "Fix the greeting",
        call("read", filePath=str(file)),
        call("edit", filePath=str(file), oldString="Helo", newString="Hello"),
        call("bash", command="cat hello.txt", description="Show the file"),
        "The greeting is fixed.",
    )
    with no_network() as network, scripted_server(script) as server:
        opencode = make_opencode(tmp_path, server.url)
        file.write_text("Helo\n")
        ended = opencode.run("run", "Fix the greeting in hello.txt.", proxy=network.url)
        version = opencode.run("--version", proxy=network.url).output.strip()
    assert (ended.status, ended.output.strip()) == (0, "The greeting is fixed."), ended.errors
    assert file.read_text() == "Hello\n"
    # it asks for its plugins' package, and goes on without
    assert set(network.wanted) <= {"CONNECT registry.npmjs.org:443"}
    assert {request.status for request in server.requests} == {200}
    server.check_cache("Fix the greeting")
    record("opencode", version, server.requests, opencode.folders)


@pytest.mark.parametrize(
    ("package", "name", "num_handed_back"),
    [
        ("@ai-sdk/openai-compatible", "opencode_reasoning", 2),
        ("@ai-sdk/openai", "opencode_responses", 0),  # for models whose names it does not know, it leaves reasoning out
        ("@ai-sdk/anthropic", "opencode_messages", 2),
    ],
)
def test_reasoning_is_handed_back(package: str, name: str, num_handed_back: int, tmp_path: Path) -> None:
    script = loop(
        "Run two commands",
        thought(call("bash", command="echo one", description="Say one")),
        thought("Now the other.\n\n" + call("bash", command="echo two", description="Say two")),
        thought("Both ran."),
    )
    with no_network() as network, scripted_server(script, REASONING_TEMPLATE) as server:
        opencode = make_opencode(tmp_path, server.url, package)
        ended = opencode.run("run", "--title", "Commands", "Run two commands.", proxy=network.url)
        version = opencode.run("--version", proxy=network.url).output.strip()
    assert (ended.status, ended.output.split("\n")) == (0, ["Now the other.", "Both ran.", ""]), ended.errors
    assert [request.status for request in server.requests] == [200] * 3
    thoughts = server.engine.prompts[2].count("<think>\nThis needs some care.\n</think>")
    assert thoughts == num_handed_back
    server.check_cache("Run two commands")
    record(name, version, server.requests[2:], opencode.folders)
