"""The blocks of docs/CLIENTS.md for SDKs, run as they are written, with a server that answers by a script.

pip install -e '.[test,clients]' && npm install --prefix tests/clients && pytest -m clients tests/clients/test_page.py
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.agents.scripted_engine import Turn, scripted_server
from tests.clients.page import Block, blocks

pytestmark = [pytest.mark.clients, pytest.mark.timeout(300)]

HERE = Path(__file__).parent
SDKS = [block for block in blocks() if block.language in ("python", "js") or block.section == "curl"]


def environment(folder: Path) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {"PATH": path, "HOME": str(folder), "LITELLM_LOCAL_MODEL_COST_MAP": "True"}


def run(command: list[str], folder: Path, cwd: Path | None = None) -> str:
    done = subprocess.run(
        command, cwd=cwd or folder, env=environment(folder), capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("block", SDKS, ids=lambda block: f"{block.section}-{block.language}")
def test_sdk(block: Block, tmp_path: Path) -> None:
    with scripted_server([Turn("capital of France", "Paris, of course.")], model_aliases=("local",)) as server:
        server.engine.model_config.pooling = "last"  # for rerank
        text = block.text.replace("http://127.0.0.1:8000", server.url)
        match block.language:
            case "python":
                output = run([sys.executable, "-c", text], tmp_path)
            case "js":
                # beside its packages, because that is where Node looks for them
                output = run(["node", "--input-type=module", "-e", text], tmp_path, cwd=HERE)
            case _:
                output = run(["bash", "-c", text], tmp_path)
        assert "Paris" in output, output
        assert {request.status for request in server.requests} == {200}


def test_llm(tmp_path: Path) -> None:
    settings, commands = [block for block in blocks() if block.section == "llm"]
    with scripted_server([Turn("capital of France", "Paris, of course.")], model_aliases=("local",)) as server:
        folder = tmp_path / ".config" / "io.datasette.llm"
        folder.mkdir(parents=True)
        text = settings.text.replace("http://127.0.0.1:8000", server.url)
        (folder / "extra-openai-models.yaml").write_text(text)
        assert "Paris, of course." in run(["bash", "-c", commands.text], tmp_path)
