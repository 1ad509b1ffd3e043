"""docs/CLIENTS.md has the settings and versions of the agents' tests, and the server takes the host names it names."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from tests.agents import test_aider, test_claude_code, test_codex, test_continue, test_open_webui, test_opencode
from tests.agents.recordings import DATA, load
from tests.agents.running import Agent
from tests.clients.page import PAGE, blocks
from tests.server.client import client_of
from tests.server.fake_engine import FakeEngine
from tinyvllm.cli.server_flags import ListenFlags, ServerFlags

URL = "http://127.0.0.1:8000"
SECTIONS = {
    "aider": "aider",
    "claude_code": "Claude Code",
    "codex": "Codex",
    "continue": "Continue",
    "open_webui": "Open WebUI",
    "opencode": "opencode",
}
Make = Callable[[ModuleType, str], Agent]


def block(section: str, language: str) -> str:
    return next(one.text for one in blocks() if (one.section, one.language) == (section, language))


def exported(*sections: str) -> dict[str, str]:
    """The environment that the sections' shell commands make."""
    texts = [one.text for one in blocks() if one.section in sections and one.language == "sh"]
    lines = [line for text in texts for line in text.splitlines() if line.startswith("export ")]
    return dict(shlex.split(line, comments=True)[1].split("=", 1) for line in lines)


def renamed(value: Any) -> Any:
    """The tests' model is called tiny, the page's local."""
    return json.loads(re.sub(r'\btiny\b(?!vllm)(?=")', "local", json.dumps(value)))


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Make:
    """Calls the function of an agent's test that makes the agent, as if it were installed."""

    def make_agent(name: str, folder: Path, environment: Mapping[str, str]) -> Agent:
        home, project = folder / "home", folder / "project"
        home.mkdir()
        project.mkdir()
        return Agent(Path(name), home, project, dict(environment))

    def make(module: ModuleType, function: str) -> Agent:
        monkeypatch.setattr(module, "make_agent", make_agent)
        folder = tmp_path / function
        folder.mkdir()
        agent: Agent = getattr(module, function)(folder, URL)
        return agent

    return make


def test_agents_run_with_the_settings_of_the_page(make: Make) -> None:
    assert exported("Claude Code") == renamed(make(test_claude_code, "make_claude").environment)
    config = (make(test_codex, "make_codex").home / ".codex" / "config.toml").read_text()
    assert tomllib.loads(block("Codex", "toml")) == renamed(tomllib.loads(config))
    ran = json.loads(make(test_opencode, "make_opencode").environment["OPENCODE_CONFIG_CONTENT"])
    page = json.loads(block("opencode", "json"))
    assert page["model"] == "tinyvllm/local"
    (run_model,), (page_model,) = (one["provider"]["tinyvllm"].pop("models").values() for one in (ran, page))
    assert page["provider"] == ran["provider"] and page_model == renamed(run_model)
    assert exported("aider").items() <= make(test_aider, "make_aider").environment.items()
    command = block("aider", "sh").splitlines()[-1].split()
    assert command == ["aider", *renamed(test_aider.OPTIONS[:1]), "openai/local", *test_aider.OPTIONS[2:4]]
    assert yaml.safe_load(block("Continue", "yaml")) == renamed(yaml.safe_load(test_continue.CONFIG))
    settings = test_open_webui.SETTINGS | test_open_webui.DOCUMENTS
    assert exported("Open WebUI") == renamed(settings)
    assert settings.items() <= make(test_open_webui, "make_open_webui").environment.items()


@pytest.mark.parametrize("file", sorted(DATA.glob("*.json")), ids=lambda file: file.stem)
def test_the_page_names_the_versions_that_were_run(file: Path) -> None:
    recording = load(file)
    name = next(name for name in SECTIONS if recording.agent.startswith(name))
    section = PAGE.partition(f"\n## {SECTIONS[name]}\n")[2].partition("\n## ")[0]
    assert recording.version in section
    assert recording.version in (Path(__file__).parents[2] / "scripts" / "fetch_agents.sh").read_text()


@pytest.mark.parametrize(
    ("listen", "flags", "status"),
    [
        (ListenFlags(), ServerFlags(), 403),
        (ListenFlags(), ServerFlags(allowed_hosts=["host.docker.internal"]), 200),
        (ListenFlags(host="172.17.0.1"), ServerFlags(), 200),
        (ListenFlags(host="0.0.0.0"), ServerFlags(api_key=["a-long-key"]), 200),
    ],
)
async def test_a_container_reaches_the_server_as_the_page_says(
    listen: ListenFlags, flags: ServerFlags, status: int
) -> None:
    settings = flags.settings(local_host=listen.local_host)
    async with client_of(FakeEngine(), allowed_hosts=settings.allowed_hosts, api_keys=settings.api_keys) as client:
        headers = {"host": "host.docker.internal:8000", "authorization": "Bearer a-long-key"}
        response = await client.get("/v1/models", headers=headers)
    assert response.status_code == status
