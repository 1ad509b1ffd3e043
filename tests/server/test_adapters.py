"""Adapters through all APIs of a server with a tiny real model: chosen by `model`, listed, loaded and unloaded."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx

from tests.adapters import write_adapter
from tests.builders import TinyLlama, write_tiny_hf_llama
from tests.engine.test_adapters import ENGINE as ENGINE_OF_ADAPTERS
from tests.engine.write_qwen3_reference import NUMBERS
from tests.server.client import client_of
from tests.server.fake_engine import FakeEngine
from tinyvllm.config import EngineConfig, LoraModule
from tinyvllm.engine.async_engine import AsyncEngine
from tinyvllm.server.app import make_app
from tinyvllm.server.settings import ServerSettings

# Those of tests/engine/test_adapters.py, whose compiled programs serve here, too.
ENGINE: dict[str, Any] = {**ENGINE_OF_ADAPTERS, "warm_up": "idle"}


@asynccontextmanager
async def serving(folder: Path, **settings: Any) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a server whose adapters `one` and `two` differ, of which `one` is loaded."""
    files = write_tiny_hf_llama(folder / "tiny", **NUMBERS)
    for seed, name in enumerate(("one", "two", "three")):
        write_adapter(folder / name, TinyLlama(**NUMBERS), seed=seed, lora_alpha=16)
    config = EngineConfig(str(files.path), lora_modules=(LoraModule("one", str(folder / "one")),), **ENGINE)
    engine = AsyncEngine.start(config)
    await engine.wait_ready()
    transport = httpx.ASGITransport(make_app(engine, ServerSettings(**settings)))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client
    await engine.shutdown()


async def complete(client: httpx.AsyncClient, model: str, answering: str = "") -> str:
    """The text of a greedy completion. answering: the name in the answer, if it is not `model`."""
    body = {"model": model, "prompt": "two are company", "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    answer = await client.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["model"] == (answering or model)
    return str(answer.json()["choices"][0]["text"])


async def _whole(folder: Path) -> None:
    async with serving(folder, allow_runtime_lora=True) as client:
        base, one = [await complete(client, name) for name in ("tiny", "one")]
        assert base != one
        listed = {card["id"]: card for card in (await client.get("/v1/models")).json()["data"]}
        assert (listed["one"]["parent"], listed["one"]["root"]) == ("tiny", "one") and listed["tiny"]["parent"] is None
        assert (await client.get("/v1/models/one")).json()["parent"] == "tiny"
        await _look_up(client)
        # two more: with two slots, they take turns
        for name in ("two", "three"):
            given = {"lora_name": name, "lora_path": str(folder / name)}
            loaded = await client.post("/v1/load_lora_adapter", json=given)
            assert loaded.text == f"Success: LoRA adapter '{name}' added successfully."
        names = ("tiny", "one", "two", "three")
        first = await asyncio.gather(*[complete(client, name) for name in names])
        assert len(set(first)) == 4 and first[:2] == [base, one]
        assert await asyncio.gather(*[complete(client, name) for name in reversed(names)]) == first[::-1]
        await _ask_other_apis(client)
        await _refuse(client, folder)
        gone = await client.post("/v1/unload_lora_adapter", json={"lora_name": "two"})
        assert gone.text == "Success: LoRA adapter 'two' removed successfully."
        assert (await client.post("/v1/completions", json={"model": "two", "prompt": "a"})).status_code == 404
        # the same name for other files: nothing of the old one's keys and values is found
        replacing: dict[str, Any] = {"lora_name": "one", "lora_path": str(folder / "two"), "load_inplace": True}
        assert (await client.post("/v1/load_lora_adapter", json=replacing)).status_code == 200
        assert await complete(client, "one") == first[2]
        metrics = (await client.get("/metrics")).text
        assert 'vllm:lora_requests_info{max_lora="2",running_lora_adapters="",waiting_lora_adapters=""} 1.' in metrics


async def _look_up(client: httpx.AsyncClient) -> None:
    """A prompt that was computed with an adapter is found with this adapter only."""
    ids = list(range(3, 36))
    body = {"model": "one", "prompt": ids, "max_tokens": 1}
    assert (await client.post("/v1/completions", json=body)).status_code == 200
    for name, num_cached in (("one", 32), ("tiny", 0)):
        found = await client.post("/prefix_cache", json={"model": name, "prompt": ids})
        assert found.json()["cached_tokens"] == num_cached, (name, found.text)


async def _ask_other_apis(client: httpx.AsyncClient) -> None:
    messages = [{"role": "user", "content": "hi"}]
    chat = {"model": "one", "messages": messages, "max_tokens": 4}
    for path, body, field in (
        ("/v1/messages", chat, "model"),
        ("/v1/responses", {"model": "one", "input": "hi", "max_output_tokens": 4}, "model"),
        ("/api/generate", {"model": "one", "prompt": "hi", "stream": False, "raw": True}, "model"),
    ):
        answer = await client.post(path, json=body)
        if answer.status_code == 400 and "template" in answer.text:  # the model has none
            continue
        assert answer.status_code == 200 and answer.json()[field] == "one", answer.text
    tags = (await client.get("/api/tags")).json()["models"]
    assert {model["name"] for model in tags} >= {"tiny:latest", "one:latest"}


async def _refuse(client: httpx.AsyncClient, folder: Path) -> None:
    for given, part in (
        ({"lora_name": "one", "lora_path": str(folder / "two")}, "adapter 'one' is already loaded"),
        ({"lora_name": "x,y", "lora_path": str(folder / "two")}, "adapter name 'x,y' has a comma"),
        ({"lora_name": "tiny", "lora_path": str(folder / "two")}, "the model's own name"),
        ({"lora_name": "x", "lora_path": str(folder / "absent")}, "is not a directory"),
        ({"lora_name": "x\nINFO y", "lora_path": str(folder / "two")}, "'x\\nINFO y' has characters that cannot be"),
    ):
        answer = await client.post("/v1/load_lora_adapter", json=given)
        assert answer.status_code == 400 and part in answer.json()["error"]["message"], answer.text
    unknown = await client.post("/v1/unload_lora_adapter", json={"lora_name": "nobody"})
    assert unknown.status_code == 404 and "loaded: one, two, three" in unknown.text
    # a request may name `one` with Ollama's tag, but only if no adapter has just this name
    tagged = {"lora_name": "one:latest", "lora_path": str(folder / "two")}
    assert await complete(client, "one:latest", "one") == await complete(client, "one")
    assert (await client.post("/v1/unload_lora_adapter", json=tagged)).status_code == 404
    assert (await client.post("/v1/load_lora_adapter", json=tagged)).status_code == 200
    assert await complete(client, "one:latest") == await complete(client, "two")
    assert (await client.post("/v1/unload_lora_adapter", json=tagged)).status_code == 200


def test_adapters_are_chosen_listed_loaded_and_unloaded(tmp_path: Path) -> None:
    asyncio.run(_whole(tmp_path))


def test_loading_must_be_allowed() -> None:
    async def ask() -> httpx.Response:
        async with client_of(FakeEngine()) as client:
            return await client.post("/v1/load_lora_adapter", json={"lora_name": "a", "lora_path": "/"})

    answer = asyncio.run(ask())
    assert answer.status_code == 403 and "--allow-runtime-lora" in answer.text
