"""Codex CLI, which speaks OpenAI's Responses API.

scripts/fetch_agents.sh /tmp/agents && TINYVLLM_AGENTS=/tmp/agents pytest -m agents tests/agents/test_codex.py
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.agents.recordings import record
from tests.agents.running import Agent, Ended, make_agent, no_network
from tests.agents.scripted_engine import REASONING_TEMPLATE, call, loop, scripted_server, thought

pytestmark = [pytest.mark.agents, pytest.mark.timeout(200)]

KNOWN_MODEL = "gpt-5.5"  # Codex has a table of models, whose tools differ: this one edits files by a custom tool
PATCH = """*** Begin Patch
*** Update File: hello.txt
@@
-Helo
+Hello
*** End Patch"""
QUIET = """
[features]
plugins = false
apps = false

[analytics]
enabled = false
"""
# whom it asks without these settings, and without which it goes on
HOSTS = {"github.com", "api.github.com", "chatgpt.com", "ab.chatgpt.com"}


def make_codex(folder: Path, url: str, model: str = "tiny") -> Agent:
    """Codex with the settings of docs/CLIENTS.md."""
    agent = make_agent("codex", folder, {})
    (agent.home / ".codex").mkdir()
    settings = f"""
model = "{model}"
model_provider = "tinyvllm"
model_context_window = 131072

[model_providers.tinyvllm]
name = "tinyvllm"
base_url = "{url}/v1"
wire_api = "responses"
"""
    (agent.home / ".codex" / "config.toml").write_text(settings)
    return agent


def ask(codex: Agent, task: str, proxy: str) -> Ended:
    # a container may not allow the sandbox that Codex makes for commands
    return codex.run("exec", "--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox", task, proxy=proxy)


def test_a_file_is_edited_by_a_command_and_by_a_patch(tmp_path: Path) -> None:
    by_command = loop(
        "Fix the greeting",
        call("exec_command", cmd="sed -i s/Helo/Hello/ hello.txt && cat hello.txt missing.txt"),
        "The greeting is fixed.",
    )
    by_patch = loop("Patch the greeting", call("apply_patch", input=PATCH), "The greeting is patched.")
    with no_network() as network, scripted_server([*by_command, *by_patch], model_aliases=(KNOWN_MODEL,)) as server:
        for task, model, answer in (
            ("Fix the greeting in hello.txt.", "tiny", "The greeting is fixed."),
            ("Patch the greeting in hello.txt.", KNOWN_MODEL, "The greeting is patched."),
        ):
            (tmp_path / model).mkdir()
            codex = make_codex(tmp_path / model, server.url, model)
            (codex.project / "hello.txt").write_text("Helo\n")
            ended = ask(codex, task, network.url)
            assert (ended.status, ended.output.strip()) == (0, answer), ended.errors
            assert (codex.project / "hello.txt").read_text() == "Hello\n"
            server.check_cache(task)
        version = codex.run("--version", proxy=network.url).output.split()[-1]
    assert {request.split(":")[0].removeprefix("CONNECT ") for request in network.wanted} <= HOSTS
    assert [request.status for request in server.requests] == [200] * 4
    assert server.requests[3].body["input"][-1]["type"] == "custom_tool_call_output"
    record("codex", version, server.requests, codex.folders)


def test_reasoning_is_handed_back_and_a_session_is_resumed(tmp_path: Path) -> None:
    script = loop(
        "Run two commands",
        thought(call("exec_command", cmd="echo one")),
        thought("Now the other.\n\n" + call("exec_command", cmd="echo two")),
        thought("Both ran."),
    )
    with no_network() as network, scripted_server(script, REASONING_TEMPLATE) as server:
        codex = make_codex(tmp_path, server.url)
        with (codex.home / ".codex" / "config.toml").open("a") as file:
            file.write(QUIET)
        ended = ask(codex, "Run two commands.", network.url)
        server.check_cache("Run two commands")
        more = codex.run("exec", "--skip-git-repo-check", "resume", "--last", "And now?", proxy=network.url)
        version = codex.run("--version", proxy=network.url).output.split()[-1]
    assert (ended.status, ended.output.strip()) == (0, "Both ran."), ended.errors
    assert network.wanted == []
    assert (more.status, more.output.strip()) == (0, "Both ran."), more.errors
    assert [request.status for request in server.requests] == [200] * 4
    assert server.engine.prompts[2].count("<think>\nThis needs some care.\n</think>") == 2
    record("codex_reasoning", version, server.requests[2:], codex.folders)


@pytest.mark.parametrize("provider", ["ollama", "lmstudio"])
def test_it_takes_the_server_for_a_local_one_that_it_knows(provider: str, tmp_path: Path) -> None:
    """`codex --oss` needs no file of settings. It asks which models there are, and pulls or loads its own."""
    script = loop("Run a command", call("exec_command", cmd="echo one"), "It ran.")
    with no_network() as network, scripted_server(script) as server:
        codex = make_agent("codex", tmp_path, {"CODEX_OSS_BASE_URL": f"{server.url}/v1"})
        (codex.home / ".codex").mkdir()
        (codex.home / ".codex" / "config.toml").write_text(QUIET)
        ended = codex.run(
            "exec", "--oss", "--local-provider", provider, "-m", "tiny", "--skip-git-repo-check",
            "--dangerously-bypass-approvals-and-sandbox", "Run a command.", proxy=network.url,
        )  # fmt: skip
        version = codex.run("--version", proxy=network.url).output.split()[-1]
    assert (ended.status, ended.output.strip().splitlines()[-1]) == (0, "It ran."), ended.errors
    assert {request.status for request in server.requests} == {200}
    record(f"codex_{provider}", version, server.requests[:-2], codex.folders)
