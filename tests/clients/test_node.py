"""JavaScript clients: npm's openai, @anthropic-ai/sdk and ollama, and Vercel's AI SDK, which parses every chunk
strictly.

npm install --prefix tests/clients && pytest -m clients tests/clients/test_node.py
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

pytestmark = [pytest.mark.clients, pytest.mark.model, pytest.mark.timeout(300)]

HERE = Path(__file__).parent


@pytest.mark.parametrize("script", ["openai.mjs", "ai_sdk.mjs", "anthropic.mjs", "ollama.mjs"])
def test_script(server_url: str, script: str) -> None:
    """The script checks the answers itself, and exits with an error code if one is wrong."""
    environment = {**os.environ, "BASE_URL": server_url, "MODEL": "smol"}
    done = subprocess.run(
        ["node", str(HERE / script)], env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip().endswith("ok")
