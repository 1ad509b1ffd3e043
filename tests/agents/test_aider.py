"""aider, which speaks OpenAI's chat API through LiteLLM, and writes edits as text instead of calling tools.

scripts/fetch_agents.sh /tmp/agents && TINYVLLM_AGENTS=/tmp/agents pytest -m agents tests/agents/test_aider.py
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.agents.recordings import record
from tests.agents.running import Agent, make_agent, no_network
from tests.agents.scripted_engine import Turn, scripted_server

pytestmark = [pytest.mark.agents, pytest.mark.timeout(200)]

OPTIONS = (
    "--model", "openai/tiny", "--edit-format", "diff", "--yes-always", "--no-check-update", "--no-show-release-notes",
    "--analytics-disable", "--no-show-model-warnings", "--no-gitignore",
)  # fmt: skip
EDIT = """I fix the greeting.

hello.txt
```
<<<<<<< SEARCH
Helo
=======
Hello
>>>>>>> REPLACE
```
"""


def make_aider(folder: Path, url: str) -> Agent:
    """aider with the settings of docs/CLIENTS.md, in a git repository."""
    aider = make_agent(
        "aider",
        folder,
        {"OPENAI_API_BASE": f"{url}/v1", "OPENAI_API_KEY": "none", "LITELLM_LOCAL_MODEL_COST_MAP": "True"},
    )
    for arguments in (
        ("init", "-q"),
        ("config", "user.name", "A"),
        ("config", "user.email", "a@example.com"),
        ("commit", "-q", "--allow-empty", "-m", "empty"),
    ):
        subprocess.run(["git", *arguments], cwd=aider.project, check=True)
    return aider


def test_an_edit_is_applied_and_committed(tmp_path: Path) -> None:
    script = [Turn("commit message", "fix: greeting"), Turn("Fix the greeting", EDIT)]
    with no_network() as network, scripted_server(script) as server:
        aider = make_aider(tmp_path, server.url)
        file = aider.project / "hello.txt"
        file.write_text("Helo\n")
        ended = aider.run(*OPTIONS, "--message", "Fix the greeting in hello.txt.", "hello.txt", proxy=network.url)
        version = aider.run("--version", proxy=network.url).output.split()[-1]
    assert ended.status == 0 and "Applied edit to hello.txt" in ended.output, ended.output + ended.errors
    assert file.read_text() == "Hello\n"
    log = subprocess.run(["git", "log", "-1", "--format=%s"], cwd=aider.project, capture_output=True, text=True)
    assert log.stdout.strip() == "fix: greeting"
    # it asks LiteLLM's repository for the lengths and prices of known models, and goes on without
    assert set(network.wanted) <= {"CONNECT raw.githubusercontent.com:443"}
    assert {request.status for request in server.requests} == {200}
    record("aider", version, server.requests, aider.folders)
