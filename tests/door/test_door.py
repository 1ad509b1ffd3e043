"""Several models behind one door: requests that wait, models that come and go, and what clients hear of it."""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.door.fake_models import GO_VARIABLE, model, running_door
from tests.patience import PATIENCE_S, until
from tests.server.client import exchange
from tests.server.fake_load import ANSWER
from tinyvllm.door.fields import LARGE_BYTES

CHAT = {"messages": [{"role": "user", "content": "hi"}]}


async def ask(client: httpx.AsyncClient, name: str | None, **fields: Any) -> httpx.Response:
    body = {**CHAT, **fields} if name is None else {**CHAT, "model": name, **fields}
    return await client.post("/v1/chat/completions", json=body)


def text_of(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["message"]["content"])


async def test_models_are_loaded_at_their_first_request_and_make_room_for_each_other() -> None:
    models = (model("one", aliases=("gpt",)), model("two"), model("org/three"))
    with running_door(*models, door={"max_loaded": 2, "keep_alive_s": 60.0}) as door:
        async with door.client() as client:
            cards = (await client.get("/v1/models")).json()["data"]
            assert [(card["id"], card["state"]) for card in cards] == [
                (name, "unloaded") for name in ("one", "gpt", "two", "org/three")
            ]
            assert (await client.get("/ready")).json()["models"] == dict.fromkeys(
                ("one", "two", "org/three"), "unloaded"
            )
            assert door.states() == dict.fromkeys(("one", "two", "org/three"), "unloaded")  # listing loads nothing

            assert text_of(await ask(client, None)) == ANSWER  # the first model is the default
            assert text_of(await ask(client, "gpt:latest")) == ANSWER
            ollama = await client.post("/api/chat", json={**CHAT, "model": "two", "stream": False, "keep_alive": 1e300})
            assert ollama.json()["message"]["content"] == ANSWER
            packed = gzip.compress(json.dumps({**CHAT, "model": "one"}).encode())
            headers = {"content-type": "application/json", "content-encoding": "gzip"}
            assert text_of(await client.post("/v1/chat/completions", content=packed, headers=headers)) == ANSWER
            claude = await client.post("/v1/messages", json={**CHAT, "model": "one", "max_tokens": 50})
            assert claude.json()["content"][0]["text"] == ANSWER and claude.json()["model"] == "one"
            expiry = {each["name"]: each["expires_at"][:4] for each in (await client.get("/api/ps")).json()["models"]}
            assert expiry["two:latest"] == "2318" > expiry["one:latest"]

            stored = (await client.post("/v1/responses", json={"model": "one", "input": "hi"})).json()
            assert (await client.get(f"/v1/responses/{stored['id']}")).json()["id"] == stored["id"]
            follow_up = {"previous_response_id": stored["id"], "input": "and?", "store": False}
            assert (await client.post("/v1/responses", json=follow_up)).json()["model"] == "one"
            missing = await client.get("/v1/responses/resp_nobody")
            assert missing.status_code == 404 and missing.json()["error"]["code"] == "response_not_found"

            assert (await client.get("/tokenizer_info", params={"model": "org/three"})).status_code == 200
            assert door.states() == {"one": "ready", "two": "unloaded", "org/three": "ready"}

            unknown = await ask(client, "four")
            assert unknown.status_code == 404 and "'gpt'" in unknown.json()["error"]["message"]
            unknown = await client.post("/api/chat", json={"model": "four"})
            assert unknown.status_code == 404 and unknown.json()["error"].startswith("model 'four' not found")
            assert (await client.post("/v1/nothing", json={})).status_code == 404
            assert (await client.get("/v1/chat/completions")).status_code == 405

            await check_metrics(client)
            await check_times(client)
            unload = await client.post("/api/generate", json={"model": "one", "keep_alive": 0})
            assert unload.json()["done_reason"] == "unload"
            await until(lambda: door.states()["one"] == "unloaded")
            again = await client.post("/api/generate", json={"model": "one", "keep_alive": 0})
            assert again.json()["done_reason"] == "unload" and door.states()["one"] == "unloaded"


async def check_times(client: httpx.AsyncClient) -> None:
    """Where the time of a request went: the wait for the model is the door's, the rest its server's."""
    answer = await ask(client, "one")
    timing = answer.headers["server-timing"]
    assert "relay;dur=" in timing and "prefill;dur=" in timing and "total;dur=" in timing
    found = (await client.get(f"/requests/{answer.headers['x-request-id']}")).json()
    assert found["route"] == "/v1/chat/completions" and found["verdict"]["because"]
    listed = (await client.get("/requests", params={"last": 1000})).json()["requests"]
    assert found["id"] == listed[0]["id"] and len({one["id"] for one in listed}) == len(listed) > 3
    assert (await client.get("/requests/nobody")).status_code == 404
    url = str(client.base_url)
    body = {**CHAT, "model": "one", "stream": True}
    raw = await asyncio.to_thread(exchange, url, "/v1/chat/completions", body, "TE: trailers\r\n")
    assert b"\r\ntrailer: server-timing" in raw and b"\r\n0\r\nserver-timing: parse;dur=" in raw


async def check_metrics(client: httpx.AsyncClient) -> None:
    text = (await client.get("/metrics")).text
    lines = text.splitlines()
    assert len(lines) == len(set(lines))  # no sample and no family twice
    assert 'tinyvllm:model_state{model_name="two",state="unloaded"} 1.0' in lines
    assert 'tinyvllm:model_loads_total{model_name="one"} 1.0' in lines
    assert 'tinyvllm:model_unloads_total{model_name="two",reason="evicted"} 1.0' in lines
    chats = 'http_requests_total{handler="/v1/chat/completions",method="POST",status="2xx",model_name="one"} 3.0'
    assert chats in lines
    assert re.search(r'^vllm:prompt_tokens_total\{engine="0",model_name="one"\} \d', text, re.MULTILINE)
    assert re.search(r'^process_resident_memory_bytes\{model_name="one"\} \d', text, re.MULTILINE)


async def test_the_door_checks_access_and_names_and_loads_nothing_for_it() -> None:
    with running_door(model("one"), model("two"), api_keys=("secret-key",)) as door:
        async with door.client() as client:
            assert (await client.head("/health")).status_code == (await client.get("/ready")).status_code == 200
            assert (await client.get("/v1/models")).status_code == 401
            client.headers["x-api-key"] = "secret-key"
            claude = (await client.get("/v1/models", headers={"anthropic-version": "2023-06-01"})).json()
            assert [card["id"] for card in claude["data"]] == ["one", "two"] and claude["has_more"] is False
            assert (await client.get("/v1/models/two:latest")).json()["state"] == "unloaded"
            assert (await client.get("/v1/models/three")).status_code == 404
            shown = (await client.get("/engine/state", params={"model": "two"})).json()
            assert (shown["status"], shown["model"]) == ("unloaded", "two")
            large = json.dumps({"prompt": "x" * 2 * LARGE_BYTES, "model": "three"}).encode()
            for body, headers in ((large, {}), (gzip.compress(large), {"content-encoding": "gzip"})):
                unknown = await client.post("/v1/completions", content=body, headers=headers)
                assert unknown.status_code == 404 and "'three' does not exist" in unknown.text
            ollama = await client.post("/api/chat", json={**CHAT, "model": "three"})
            assert ollama.status_code == 404 and "model 'three' not found" in ollama.json()["error"]
            assert (await client.post("/api/delete", json={"model": "one"})).status_code >= 400
            assert door.states() == {"one": "unloaded", "two": "unloaded"}


async def test_requests_wait_for_their_model_while_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go = tmp_path / "go"
    monkeypatch.setenv(GO_VARIABLE, str(go))
    models = (model("quick"), model("slow"), model("broken"))
    with running_door(*models, keepalive_s=0.1, max_num_queued_requests=4) as door:
        async with door.client() as client:
            assert text_of(await ask(client, "quick")) == ANSWER
            told: list[list[str]] = [[], [], []]
            paths = ("/v1/chat/completions", "/v1/messages", "/api/chat")
            streams = [
                asyncio.create_task(read_lines(client, path, lines)) for path, lines in zip(paths, told, strict=True)
            ]
            whole = asyncio.create_task(ask(client, "slow"))
            await until(lambda: door.fleet.num_waiting("slow") == 4)
            full = await ask(client, "slow")
            assert full.status_code == 429 and "4 requests wait until 'slow' is loaded" in full.text
            assert text_of(await ask(client, "quick")) == ANSWER
            whole.cancel()  # it leaves, and nobody else with it
            await until(lambda: door.fleet.num_waiting("slow") == 3)
            last = asyncio.create_task(ask(client, "slow"))
            await until(lambda: told[0] and told[1])  # that it goes on
            go.touch()
            assert text_of(await last) == ANSWER
            await asyncio.gather(*streams)
            chat, claude, ollama = told
        assert chat[0] == claude[0] == ": keep-alive" and chat[-1] == "data: [DONE]"
        assert "event: message_stop" in claude
        assert all(json.loads(line) for line in ollama) and json.loads(ollama[-1])["done"]

        async with door.client() as client:
            waiting = [asyncio.create_task(ask(client, "broken")) for _ in range(2)]
            lines: list[str] = []
            stream = asyncio.create_task(read_lines(client, "/v1/messages", lines, model="broken"))
            for response in [await each for each in waiting]:
                assert response.status_code == 503 and response.json()["error"]["code"] == "model_load_failed"
                assert "'broken' could not be loaded: its file is damaged" in response.text
            await stream
            errors = [line for line in lines if "error" in line]
            assert errors and "its file is damaged" in errors[-1]


async def read_lines(client: httpx.AsyncClient, path: str, lines: list[str], **fields: Any) -> None:
    """Append a stream's lines, as they come."""
    body = {**CHAT, "model": "slow", "stream": True, "max_tokens": 50, **fields}
    async with client.stream("POST", path, json=body) as response:
        async for line in response.aiter_lines():
            lines += [line] if line else []


async def test_what_does_not_fit_is_refused_and_what_dies_is_started_again() -> None:
    models = (model("endless", "endless size 40", pinned=True), model("large", "size 70"), model("failing"))
    with running_door(*models) as door:
        await until(lambda: door.states()["endless"] == "ready")  # without a request
        async with door.client() as client:
            refused = await ask(client, "large")
            assert refused.status_code == 503 and refused.headers["retry-after"]
            error = refused.json()["error"]
            assert error["code"] == "model_does_not_fit"
            assert "'large' needs 70.00 GiB" in error["message"] and "'endless' (" in error["message"]
            await until(lambda: list(door.pids()) == ["endless"])

            body = {**CHAT, "stream": True, "ignore_eos": True, "max_tokens": 200}
            seen: list[str] = []
            async with client.stream("POST", "/v1/chat/completions", json=body) as response:
                async for line in response.aiter_lines():
                    seen += [line] if line else []
                    if len(seen) == 3:
                        first = door.pids()["endless"]
                        os.kill(first, signal.SIGKILL)
            assert seen[-1] == "data: [DONE]" and json.loads(seen[-2][6:])["error"]["code"] == "model_gone"
            assert (await ask(client, "endless", max_tokens=2)).status_code == 200
            assert door.pids()["endless"] != first
            assert door.fleet.counts["endless"].unloads["died"] == 1

            for _ in range(3):  # failed steps, after which an engine gives up
                assert (await ask(client, "failing")).status_code >= 500
            await until(lambda: door.fleet.counts["failing"].unloads["died"] == 1)


async def test_a_client_that_leaves_ends_its_request_and_a_stop_lets_the_others_finish(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go = tmp_path / "go"
    monkeypatch.setenv(GO_VARIABLE, str(go))
    models = (model("endless"), model("held"), model("slow"))
    with running_door(*models, shutdown_timeout_s=PATIENCE_S) as door:
        async with door.client() as client:
            body = {**CHAT, "stream": True, "max_tokens": 100}
            async with client.stream("POST", "/v1/chat/completions", json=body) as response:
                await anext(response.aiter_lines())
                assert door.fleet.num_running("endless") == 1
            await until(lambda: door.fleet.num_running("endless") == 0)

            running = asyncio.create_task(ask(client, "held", max_tokens=60))
            await until(lambda: door.fleet.num_running("held") == 1)
            waiting = asyncio.create_task(ask(client, "slow"))
            await until(lambda: door.fleet.num_waiting("slow") == 1)
            pids = door.pids()
            door.stop()
            assert (await waiting).json()["error"]["code"] == "server_draining"
            late = await ask(client, "endless")
            assert late.status_code == 503 and (await client.get("/ready")).status_code == 503
            go.touch()
            assert text_of(await running) == ANSWER
        await until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids.values()))


def test_a_stop_at_once_logs_no_error(caplog: pytest.LogCaptureFixture) -> None:
    with running_door(model("one")):
        pass  # its end is two signals
    assert not [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
