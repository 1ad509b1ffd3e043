"""Claude Code, which speaks Anthropic's Messages API.

scripts/fetch_agents.sh /tmp/agents && TINYVLLM_AGENTS=/tmp/agents pytest -m agents tests/agents/test_claude_code.py
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.agents.recordings import record
from tests.agents.running import Agent, make_agent, no_network
from tests.agents.scripted_engine import REASONING_TEMPLATE, Turn, call, loop, scripted_server, thought
from tests.agents.terminal import terminal_of

pytestmark = [pytest.mark.agents, pytest.mark.timeout(200)]


def make_claude(folder: Path, url: str, **environment: str) -> Agent:
    """Claude Code with the settings of docs/CLIENTS.md."""
    settings = {
        "ANTHROPIC_BASE_URL": url,
        "ANTHROPIC_AUTH_TOKEN": "none",
        "ANTHROPIC_MODEL": "tiny",
        "ANTHROPIC_DEFAULT_HAIKU_MODEL": "tiny",  # for its small requests
        "CLAUDE_CODE_MAX_CONTEXT_TOKENS": "131072",
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
    }
    return make_agent("claude", folder, {**settings, **environment})


def test_a_file_is_read_edited_and_shown(tmp_path: Path) -> None:
    file = tmp_path / "project" / "hello.txt"
    script = loop(
        "Fix the greeting",
        call("Read", file_path=str(file)),
        call("Edit", file_path=str(file), old_string="Helo", new_string="Hello"),
        call("Bash", command="cat hello.txt missing.txt", description="Show the file"),
        "The greeting is fixed.",
    )
    with no_network() as network, scripted_server(script) as server:
        claude = make_claude(tmp_path, server.url)
        file.write_text("Helo\n")
        tools = ("--allowedTools", "Read,Edit,Bash")
        ended = claude.run("-p", "Fix the greeting in hello.txt.", *tools, proxy=network.url)
        other = claude.run("-p", "Hello?", proxy=network.url)
        version = claude.run("--version", proxy=network.url).output.split()[0]
    assert (ended.status, ended.output.strip()) == (0, "The greeting is fixed."), ended.errors
    assert (other.status, other.output.strip()) == (0, "All right."), other.errors
    assert "context window" not in ended.errors  # it would assume one of a million tokens
    assert file.read_text() == "Hello\n"
    assert network.wanted == []
    assert {request.status for request in server.requests} == {200}
    results = [block for block in server.requests[3].body["messages"][-1]["content"] if block["type"] == "tool_result"]
    assert results[0]["is_error"] and "missing.txt" in results[0]["content"]
    server.check_cache("Fix the greeting")
    record("claude_code", version, server.requests[:4], claude.folders)


def test_reasoning_is_handed_back_and_a_searched_tool_is_called(tmp_path: Path) -> None:
    """With --output-format text, thoughts are omitted from the stream, and come back in their signature."""
    script = loop(
        "Look for tools",
        thought(call("ToolSearch", query="select:NotebookEdit,WebFetch")),
        thought("Now the command.\n\n" + call("Bash", command="echo one", description="Say one")),
        thought("Two tools were found."),
    )
    with no_network() as network, scripted_server(script, REASONING_TEMPLATE) as server:
        claude = make_claude(tmp_path, server.url)
        question = ("-p", "Look for tools that edit notebooks.", "--allowedTools", "Bash,ToolSearch")
        ended = claude.run(*question, proxy=network.url)
        server.check_cache("Look for tools")  # found tools stand where they are found, not at the beginning
        events = claude.run(*question, "--output-format", "stream-json", "--verbose", proxy=network.url)
        version = claude.run("--version", proxy=network.url).output.split()[0]
    assert (ended.status, ended.output.strip()) == (0, "Two tools were found."), ended.errors
    assert events.status == 0 and "This needs some care." in events.output
    assert [request.status for request in server.requests] == [200] * 6
    results = [request.body["messages"][-1]["content"] for request in server.requests[1:3]]
    assert {part["type"] for part in results[0][0]["content"]} == {"tool_reference"}
    for prompt in server.engine.prompts[1:3]:
        assert prompt.count("<think>\nThis needs some care.\n</think>") == prompt.count("<tool_response>\n")
    record("claude_code_reasoning", version, [server.requests[2], server.requests[5]], claude.folders)


def test_a_conversation_in_a_terminal(tmp_path: Path) -> None:
    """It starts without Anthropic's service, asks before it runs a command, and makes a summary when told to."""
    script = [
        Turn(lambda prompt: "Do NOT call any tools" in prompt[-3000:], "<summary>A file was made.</summary>"),
        *loop("Make a file", call("Bash", command="touch made.txt", description="Make it"), "The file is made."),
    ]
    with no_network() as network, scripted_server(script) as server:
        claude = make_claude(tmp_path, server.url)
        # a person answers these once
        settings = {"hasCompletedOnboarding": True, "projects": {str(claude.project): {"hasTrustDialogAccepted": True}}}
        (claude.home / ".claude.json").write_text(json.dumps(settings))
        with terminal_of(claude, "--permission-mode", "manual", proxy=network.url) as terminal:
            terminal.wait_for("manual mode on")
            terminal.enter("Make a file.")
            terminal.wait_for("Do you want to proceed?")
            assert not (claude.project / "made.txt").exists()
            terminal.enter("")
            terminal.wait_for("The file is made.")
            terminal.enter("/context")  # asks for counts of tokens
            terminal.wait_for("Context usage")
            terminal.enter("/compact")
            terminal.wait_for("Compacted")
            terminal.enter("Thanks.")
            terminal.wait_for("All right.")
        version = claude.run("--version", proxy=network.url).output.split()[0]
    assert (claude.project / "made.txt").exists()
    assert {request.status for request in server.requests} == {200}
    assert not any("api.anthropic.com" in request for request in network.wanted)
    counted = [request for request in server.requests if "count_tokens" in request.path]
    with_tools = [request for request in counted if len(request.body.get("tools", [])) == 1]
    record("claude_code_terminal", version, [server.requests[0], with_tools[0], server.requests[-1]], claude.folders)


def test_an_answer_has_the_form_of_a_schema(tmp_path: Path) -> None:
    """A schema is that of a tool which it must call."""
    schema = {"type": "object", "properties": {"lines": {"type": "integer"}}, "required": ["lines"]}
    script = loop("How many lines", call("StructuredOutput", lines=3), "Three.")
    with no_network() as network, scripted_server(script) as server:
        claude = make_claude(tmp_path, server.url)
        options = ("--output-format", "json", "--json-schema", json.dumps(schema))
        ended = claude.run("-p", "How many lines?", *options, proxy=network.url)
    assert ended.status == 0 and json.loads(ended.output)["structured_output"] == {"lines": 3}, ended.errors
    assert {request.status for request in server.requests} == {200}
