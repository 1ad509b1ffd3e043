"""Real models behind the door: one makes room for another, and their memory is given back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.builders import write_tiny_hf_llama
from tests.door.fake_models import ROOT, running_door
from tests.engine.requests import SETTINGS
from tinyvllm.config import EngineConfig
from tinyvllm.door.settings import ModelSettings
from tinyvllm.door.specs import EXAMINE
from tinyvllm.server.specs import LOAD_ENGINE

REAL = {"examine": EXAMINE, "load": LOAD_ENGINE}
# those of tests/engine, whose programs serve here, too
LIMITS: dict[str, Any] = {**SETTINGS, "decode_buckets": (4,)}


def tiny(directory: Path, name: str, seed: int) -> ModelSettings:
    write_tiny_hf_llama(directory / name, seed=seed)
    return ModelSettings(
        name=name,
        config=EngineConfig(str(directory / name), served_model_name=name, warm_up="background", **LIMITS),
    )


@pytest.mark.sweep  # by default, fake models make room behind the same door: test_door.py
async def test_a_real_model_makes_room_for_another(tmp_path: Path) -> None:
    models = tiny(tmp_path, "a", 0), tiny(tmp_path, "b", 1)
    # not forked: tests before may have opened the device, whose memory and threads no fork can use
    with running_door(*models, door={"max_loaded": 1}, plan=REAL, is_forked=False) as door:
        async with door.client() as client:
            answers = [await complete(client, name) for name in "ab"]
            assert answers[0] != answers[1]
            assert list(door.pids()) == ["b"] and door.states() == {"a": "unloaded", "b": "ready"}
            unloaded, loaded = door.fleet.models()
            assert loaded.num_device_bytes and loaded.max_model_len == 64 and unloaded.num_device_bytes is None
            too_long = await client.post("/v1/completions", json={"model": "b", "prompt": "x" * 100})
            assert too_long.json()["error"]["code"] == "context_length_exceeded"


async def complete(client: httpx.AsyncClient, name: str) -> str:
    body = {"model": name, "prompt": "hello", "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    response = await client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["text"])


@pytest.mark.slow
def test_fifty_swaps_give_their_memory_back(tmp_path: Path) -> None:
    """pytest -m slow tests/door/test_real_models.py -s: some minutes."""
    models = [str(tmp_path / name) for name in "ab"]
    for seed, path in enumerate(models):
        write_tiny_hf_llama(Path(path), seed=seed)
    file, flags = tmp_path / "swaps.json", "--max-model-len 64 --max-num-seqs 1 --max-num-batched-tokens 16"
    script = [sys.executable, "scripts/swap_models.py", *models, "--swaps", "50", "--json", str(file), "--"]
    subprocess.run([*script, *flags.split()], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)
    _, early, *_, late = json.loads(file.read_text())
    assert late["swaps"] == 50
    assert all(late[name] == early[name] for name in ("processes", "descriptors"))
    assert late["door"] < early["door"] + 4  # MiB
    assert late["models"] < 1.1 * early["models"]
