"""The agents with a real model, which is too small for their tools: two answers each, and prefix-cache hits.

Their settings leave out the tools and most of the instructions, as the prompts would take minutes on a CPU:

scripts/fetch_agents.sh /tmp/agents && TINYVLLM_AGENTS=/tmp/agents pytest -m agents tests/agents/test_real_model.py
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.agents.recorder import Recorder, Request
from tests.agents.running import NoNetwork, no_network
from tests.agents.test_claude_code import make_claude
from tests.agents.test_codex import make_codex
from tests.agents.test_opencode import make_opencode
from tests.server.fake_engine import serving_app
from tinyvllm.config import EngineConfig, ModelFiles
from tinyvllm.engine.async_engine import AsyncEngine
from tinyvllm.server.app import make_app
from tinyvllm.server.settings import ServerSettings

pytestmark = [pytest.mark.agents, pytest.mark.model, pytest.mark.timeout(500)]

QUESTIONS = ("What is the capital of France?", "And of Italy?")
ROLE = "You answer in one short sentence."


@pytest.fixture(scope="module")
def engine(smollm2_files: ModelFiles) -> Iterator[AsyncEngine]:
    config = EngineConfig(str(smollm2_files.path), served_model_name="tiny", max_model_len=4096, max_num_seqs=2)
    engine = AsyncEngine.start(config)
    asyncio.run(engine.wait_ready())
    yield engine
    asyncio.run(engine.shutdown())


def ask_claude(folder: Path, url: str, network: NoNetwork) -> list[str]:
    claude = make_claude(folder, url, CLAUDE_CODE_MAX_OUTPUT_TOKENS="40")
    short = ("--bare", "--tools", "", "--system-prompt", ROLE)
    first, second = QUESTIONS
    ended = [
        claude.run("-p", first, *short, proxy=network.url),
        claude.run("-p", "--continue", second, *short, proxy=network.url),
    ]
    assert [one.status for one in ended] == [0, 0], ended
    return [one.output for one in ended]


def ask_codex(folder: Path, url: str, network: NoNetwork) -> list[str]:
    codex = make_codex(folder, url)
    (folder / "role.md").write_text(ROLE)
    config = codex.home / ".codex" / "config.toml"
    features = "[features]\ngoals = false\nshell_tool = false\nunified_exec = false\n[agents]\nenabled = false\n"
    config.write_text(f'model_instructions_file = "{folder / "role.md"}"\n{config.read_text()}\n{features}')
    first, second = QUESTIONS
    ended = [
        codex.run("exec", "--skip-git-repo-check", first, proxy=network.url),
        codex.run("exec", "--skip-git-repo-check", "resume", "--last", second, proxy=network.url),
    ]
    assert [one.status for one in ended] == [0, 0], ended
    return [one.output for one in ended]


def ask_opencode(folder: Path, url: str, network: NoNetwork) -> list[str]:
    opencode = make_opencode(folder, url)
    settings = json.loads(opencode.environment["OPENCODE_CONFIG_CONTENT"])
    settings["agent"] = {"build": {"prompt": ROLE, "tools": {"*": False}}}
    settings["provider"]["tinyvllm"]["models"]["tiny"]["limit"] = {"context": 4096, "output": 40}
    opencode.environment["OPENCODE_CONFIG_CONTENT"] = json.dumps(settings)
    first, second = QUESTIONS
    ended = [
        opencode.run("run", "--title", "Capitals", first, proxy=network.url),
        opencode.run("run", "--continue", second, proxy=network.url),
    ]
    assert [one.status for one in ended] == [0, 0], ended
    return [one.output for one in ended]


def usage_of(request: Request) -> tuple[int, int]:
    """The prompt's tokens and those among them from the cache, as the stream's end says."""
    lines = [line.removeprefix("data: ") for line in request.answer.splitlines() if line.startswith("data: {")]
    for event in reversed([json.loads(line) for line in lines]):
        usage = event.get("usage") or event.get("response", {}).get("usage")
        if usage is None:
            continue
        if "cache_read_input_tokens" in usage:
            num_cached = usage["cache_read_input_tokens"]
            return usage["input_tokens"] + num_cached, num_cached
        if "prompt_tokens" in usage:
            return usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"]
        return usage["input_tokens"], usage["input_tokens_details"]["cached_tokens"]
    raise AssertionError(f"no usage in {request.answer[-500:]}")


@pytest.mark.parametrize("ask", [ask_claude, ask_codex, ask_opencode])
def test_two_answers_of_which_the_second_finds_the_first_in_the_cache(
    ask: Callable[[Path, str, NoNetwork], list[str]],
    engine: AsyncEngine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # greedy, as at temperature 1 the model's answers are noise without an end
    defaults = dataclasses.replace(engine.generation_defaults, temperature=0.0)
    monkeypatch.setattr(AsyncEngine, "generation_defaults", defaults)
    recorder = Recorder(make_app(engine, ServerSettings()))
    with no_network() as network, serving_app(recorder) as url:
        answers = ask(tmp_path, url, network)
    assert all(answer.strip() for answer in answers)
    assert {request.status for request in recorder.requests} == {200}
    (num_first, _), (num_second, num_cached) = (usage_of(request) for request in recorder.requests)
    print(f"{num_first} tokens, then {num_second} with {num_cached} from the cache")
    assert num_cached > num_first - 40
