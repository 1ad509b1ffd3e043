"""Open WebUI, which takes models from OpenAI's API and from Ollama's, through its own API and in a browser.

scripts/fetch_agents.sh /tmp/agents open-webui && pip install playwright && apt-get install chromium
TINYVLLM_AGENTS=/tmp/agents pytest -m agents tests/agents/test_open_webui.py
"""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.agents.recordings import record
from tests.agents.running import Agent, make_agent, no_network
from tests.agents.scripted_engine import Turn, call, loop, scripted_server

pytestmark = [pytest.mark.agents, pytest.mark.timeout(400)]

START_S = 180.0
SETTINGS = {
    "OPENAI_API_BASE_URL": "http://127.0.0.1:8000/v1",
    "OPENAI_API_KEY": "none",
    "OLLAMA_BASE_URL": "http://127.0.0.1:8000",
    "WEBUI_AUTH": "False",
}
DOCUMENTS = {
    "RAG_EMBEDDING_ENGINE": "openai",
    "RAG_OPENAI_API_BASE_URL": "http://127.0.0.1:8000/v1",
    "RAG_OPENAI_API_KEY": "none",
    "RAG_EMBEDDING_MODEL": "tiny",
}


def make_open_webui(folder: Path, url: str) -> Agent:
    """Open WebUI with the settings of docs/CLIENTS.md."""
    settings = {name: value.replace("http://127.0.0.1:8000", url) for name, value in (SETTINGS | DOCUMENTS).items()}
    offline = {"OFFLINE_MODE": "True", "HF_HUB_OFFLINE": "1", "WEBUI_SECRET_KEY": "none"}
    return make_agent("open-webui", folder, {**settings, **offline, "DATA_DIR": str(folder / "home" / "data")})


@contextlib.contextmanager
def started(agent: Agent, proxy: str) -> Iterator[httpx.Client]:
    """A client of Open WebUI, signed in as its only user."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [str(agent.program), "serve", "--host", "127.0.0.1", "--port", str(port)]
    with open(agent.home / "log", "wb") as log:
        process = subprocess.Popen(
            command, cwd=agent.project, env=agent.variables(proxy), stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60.0, trust_env=False) as client:
            wait_for(client, process)
            token = client.post("/api/v1/auths/signin", json={"email": "", "password": ""}).json()["token"]
            client.headers["authorization"] = f"Bearer {token}"
            yield client
    finally:
        process.terminate()
        process.wait()


def wait_for(client: httpx.Client, process: subprocess.Popen[bytes]) -> None:
    end_s = time.monotonic() + START_S
    while time.monotonic() < end_s and process.poll() is None:
        with contextlib.suppress(httpx.TransportError):
            if client.get("/health").status_code == 200:
                return
        time.sleep(1.0)
    raise AssertionError("Open WebUI does not start: see its log in the home directory")


def ask(client: httpx.Client, model: str, *, stream: bool) -> str:
    """The text that Open WebUI's API answers."""
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    answer = client.post("/api/chat/completions", json={"model": model, "messages": messages, "stream": stream})
    assert answer.status_code == 200, answer.text
    if not stream:
        return str(answer.json()["choices"][0]["message"]["content"])
    lines = (line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: {"))
    choices = [choice for line in lines for choice in json.loads(line)["choices"]]
    return "".join(choice["delta"].get("content") or "" for choice in choices)


def ask_about(client: httpx.Client, text: str, question: str) -> str:
    """The answer to a question about a document, which Open WebUI cuts up, embeds and searches."""
    file = client.post("/api/v1/files/", files={"file": ("note.txt", text, "text/plain")}).json()
    for _ in range(60):
        if client.get(f"/api/v1/files/{file['id']}/process/status").json().get("status") == "completed":
            break
        time.sleep(0.5)
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": question}],
        "files": [{"type": "file", "id": file["id"]}],
        "stream": False,
    }
    answer = client.post("/api/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["message"]["content"])


def ask_in_browser(url: str, text: str, reply: str) -> None:
    """Type a message on the page, and wait for the reply."""
    from playwright.sync_api import sync_playwright  # imported here: other test runs need not have it

    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with sync_playwright() as driver:
        # --no-sandbox: containers run tests as root, and only a page on loopback is loaded
        browser = driver.chromium.launch(executable_path=found, args=["--no-sandbox"])
        page: Any = browser.new_page()
        page.goto(url)
        page.get_by_text("Let's Go!").click(timeout=60_000)  # closes the news of this version
        page.click("#chat-input")
        page.keyboard.type(text)
        page.keyboard.press("Enter")
        page.get_by_text(reply).wait_for(timeout=60_000)
        browser.close()


def test_models_of_both_apis_answer_and_the_page_calls_a_tool(tmp_path: Path) -> None:
    script = [
        Turn("capital of France", "Paris, of course."),
        Turn(lambda prompt: "The password is" in prompt and "What is the password?" in prompt, "Swordfish."),
        *loop("Tell me the time", call("get_current_timestamp"), "It is late."),
    ]
    with no_network() as network, scripted_server(script) as server:
        server.engine.model_config.pooling = "last"
        agent = make_open_webui(tmp_path, server.url)
        with started(agent, network.url) as client:
            version = client.get("/api/version").json()["version"]
            models = {model["id"] for model in client.get("/api/models").json()["data"]}
            assert {"tiny", "tiny:latest"} <= models
            for model in ("tiny", "tiny:latest"):
                assert [ask(client, model, stream=stream) for stream in (False, True)] == ["Paris, of course."] * 2
            listed = client.get("/ollama/api/tags").json()["models"]
            assert [model["name"] for model in listed] == ["tiny:latest"]
            assert ask_about(client, "The password is swordfish.", "What is the password?") == "Swordfish."
            ask_in_browser(str(client.base_url), "Tell me the time.", "It is late.")
            time.sleep(3.0)  # for what the page asks afterwards: a title, tags, what to ask next
    assert {request.status for request in server.requests} == {200}
    assert any(request.path == "/v1/embeddings" for request in server.requests)
    asked = [request for request in server.requests if "Tell me the time" in json.dumps(request.body)]
    assert any(message["role"] == "tool" for request in asked for message in request.body["messages"])
    record("open_webui", version, distinct(server.requests), agent.folders)


def distinct(requests: list[Any]) -> list[Any]:
    """Without those that repeat an earlier one: the page asks for the lists of models again and again."""
    return list({json.dumps(request.sent(), sort_keys=True): request for request in requests}.values())
