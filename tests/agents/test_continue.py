"""Continue's command line, which speaks OpenAI's chat API.

scripts/fetch_agents.sh /tmp/agents && TINYVLLM_AGENTS=/tmp/agents pytest -m agents tests/agents/test_continue.py
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.agents.recordings import record
from tests.agents.running import Agent, make_agent, no_network
from tests.agents.scripted_engine import call, loop, scripted_server

pytestmark = [pytest.mark.agents, pytest.mark.timeout(200)]

CONFIG = """name: tinyvllm
version: 1.0.0
schema: v1
models:
  - name: tiny
    provider: openai
    model: tiny
    apiBase: http://127.0.0.1:8000/v1
    apiKey: none
    roles: [chat, edit, apply]
    capabilities: [tool_use]
"""


def make_continue(folder: Path, url: str) -> Agent:
    """Continue with the settings of docs/CLIENTS.md."""
    agent = make_agent("cn", folder, {"CONTINUE_TELEMETRY_ENABLED": "0"})
    settings = agent.home / "config.yaml"
    settings.write_text(CONFIG.replace("http://127.0.0.1:8000", url), encoding="utf-8")
    return agent


def test_a_file_is_read_edited_and_shown(tmp_path: Path) -> None:
    file = tmp_path / "project" / "hello.txt"
    script = loop(
        "Fix the greeting",
        call("Read", filepath=str(file)),
        call("Edit", file_path=str(file), old_string="Helo", new_string="Hello"),
        call("Bash", command="cat hello.txt"),
        "The greeting is fixed.",
    )
    with no_network() as network, scripted_server(script) as server:
        agent = make_continue(tmp_path, server.url)
        file.write_text("Helo\n")
        settings = str(agent.home / "config.yaml")
        ended = agent.run("--config", settings, "--auto", "-p", "Fix the greeting in hello.txt.", proxy=network.url)
        version = agent.run("--version", proxy=network.url).output.strip()
    assert (ended.status, ended.output.strip()) == (0, "The greeting is fixed."), ended.output + ended.errors
    assert file.read_text() == "Hello\n"
    assert network.wanted == []
    assert {request.status for request in server.requests} == {200}
    server.check_cache("Fix the greeting")
    record("continue", version, server.requests, agent.folders)
