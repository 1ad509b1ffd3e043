"""Agents whose conversation outgrows the context: they ask for a summary, and go on with it.

scripts/fetch_agents.sh /tmp/agents && TINYVLLM_AGENTS=/tmp/agents pytest -m agents tests/agents/test_full_context.py
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.agents.running import no_network
from tests.agents.scripted_engine import Turn, call, loop, scripted_server
from tests.agents.test_claude_code import make_claude
from tests.agents.test_codex import ask, make_codex
from tests.agents.test_opencode import make_opencode

pytestmark = [pytest.mark.agents, pytest.mark.timeout(200)]

COMMAND = "seq 1 3000 | head -c 12000"  # a token of the scripted engine is a byte
SUMMARY = "The first numbers are counted."
# by which each of them asks for a summary
ORDERS = ("CONTEXT CHECKPOINT COMPACTION", "Do NOT call any tools", "anchored summary")


def make_script(tool_call: str) -> list[Turn]:
    """Calls until a summary is asked for, and then the answer."""
    return [
        Turn(lambda prompt: any(order in prompt[-9000:] for order in ORDERS), f"<summary>{SUMMARY}</summary>"),
        Turn(SUMMARY, "All is counted."),
        *loop("Count a lot", *[tool_call] * 9),
    ]


@pytest.mark.parametrize("assumed", [75_000, 400_000])
def test_claude_code(assumed: int, tmp_path: Path) -> None:
    """It asks before the context is full if it knows how long it is, else after the server's refusal."""
    script = make_script(call("Bash", command=COMMAND, description="Count"))
    with no_network() as network, scripted_server(script, max_model_len=75_000) as server:
        claude = make_claude(tmp_path, server.url, CLAUDE_CODE_MAX_CONTEXT_TOKENS=str(assumed))
        ended = claude.run("-p", "Count a lot.", "--allowedTools", "Bash", proxy=network.url)
    assert (ended.status, ended.output.strip()) == (0, "All is counted."), ended.errors
    assert (400 in {request.status for request in server.requests}) == (assumed > 75_000)


def test_codex(tmp_path: Path) -> None:
    script = make_script(call("exec_command", cmd=COMMAND))
    with no_network() as network, scripted_server(script, max_model_len=75_000) as server:
        codex = make_codex(tmp_path, server.url)
        config = codex.home / ".codex" / "config.toml"
        config.write_text(config.read_text().replace("131072", "65000"))
        ended = ask(codex, "Count a lot.", network.url)
    assert (ended.status, ended.output.strip()) == (0, "All is counted."), ended.errors
    assert {request.status for request in server.requests} == {200}


def test_opencode(tmp_path: Path) -> None:
    script = make_script(call("bash", command=COMMAND, description="Count"))
    with no_network() as network, scripted_server(script, max_model_len=50_000) as server:
        opencode = make_opencode(tmp_path, server.url)
        settings = json.loads(opencode.environment["OPENCODE_CONFIG_CONTENT"])
        settings["provider"]["tinyvllm"]["models"]["tiny"]["limit"] = {"context": 50_000, "output": 4096}
        opencode.environment["OPENCODE_CONFIG_CONTENT"] = json.dumps(settings)
        ended = opencode.run("run", "--title", "Numbers", "Count a lot.", proxy=network.url)
    assert ended.output.strip().endswith("All is counted."), ended.errors
