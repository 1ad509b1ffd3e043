"""Ollama's routes about models: lists, descriptions, embeddings, pulls, and what is refused."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.builders import GGUFTweaks, write_tiny_gguf, write_tiny_hf_llama
from tests.patience import PATIENCE_S
from tests.server.client import client_of, get, post
from tests.server.fake_engine import FakeEngine
from tinyvllm.config import EngineConfig, ModelFiles
from tinyvllm.errors import DownloadError
from tinyvllm.server.ollama import pulls
from tinyvllm.server.ollama.model_details import human_count
from tinyvllm.text.fim import FillInTheMiddle

THINKER = "{% if tools %}{{ tools }}{% endif %}<think>{{ messages[0].content }}</think>"


def engine_of(model: str | Path, **settings: Any) -> FakeEngine:
    """An engine that says it runs the model at this path."""
    engine = FakeEngine()
    engine.config = EngineConfig(str(model), **settings)
    return engine


# ---- Lists ----


async def test_a_gguf_file_is_described_by_its_metadata(tmp_path: Path) -> None:
    metadata = {"tokenizer.chat_template": THINKER, "general.file_type": 15, "general.sampling.temp": 0.5}
    files = write_tiny_gguf(tmp_path / "a-secret" / "llama.gguf", tweaks=GGUFTweaks(metadata=metadata))
    engine = engine_of(files.path)
    tags, ps, shown = await answers(engine)
    (listed,), (running,) = tags["models"], ps["models"]
    assert listed["name"] == listed["model"] == "tiny:latest" and listed["size"] == files.path.stat().st_size
    assert listed["capabilities"] == shown["capabilities"] == ["completion", "tools", "thinking"]
    assert listed["details"] == shown["details"] == running["details"]
    assert listed["details"]["format"] == "gguf" and listed["details"]["quantization_level"] == "Q4_K_M"
    assert listed["details"]["family"] == "llama" and listed["details"]["families"] == ["llama"]
    assert listed["digest"] == running["digest"] and int(listed["digest"], 16) > 0 and len(listed["digest"]) == 64
    assert running["context_length"] == 1000 and running["expires_at"].startswith("2318-")
    info = shown["model_info"]
    assert info["general.architecture"] == "llama" and info["llama.context_length"] == 512
    assert info["general.parameter_count"] > 1000 and info["tokenizer.ggml.tokens"] == []
    assert "tokenizer.chat_template" not in info and shown["template"] == THINKER
    assert dict(line.split() for line in shown["parameters"].splitlines()) == {"num_ctx": "1000", "temperature": "0.5"}
    assert "FROM tiny" in shown["modelfile"] and "PARAMETER temperature 0.5" in shown["modelfile"]
    async with client_of(engine) as client:
        copilot = {"user-agent": "GitHubCopilotChat/0.30"}
        named = (await client.post("/api/show", json={"model": "tiny"}, headers=copilot)).json()
    assert named["model_info"] == {**info, "general.basename": "tiny"}
    verbose = (await post(engine, "/api/show", {"name": "tiny:latest", "verbose": True})).json()
    assert len(verbose["model_info"]["tokenizer.ggml.tokens"]) == info["llama.vocab_size"]
    assert {"name": "token_embd.weight", "type": "Q4_1", "shape": [64, 260]} in verbose["tensors"]
    assert "secret" not in json.dumps([tags, ps, shown, verbose])


async def test_a_directory_is_described_in_the_words_of_gguf(tmp_path: Path) -> None:
    files = write_tiny_hf_llama(tmp_path / "a-secret" / "llama", dtype="bfloat16")
    (files.path / "chat_template.jinja").write_text(THINKER)
    tags, ps, shown = await answers(engine_of(files.path, reasoning_parser="none"))
    details = tags["models"][0]["details"]
    assert details["format"] == "safetensors" and details["quantization_level"] == "BF16"
    assert tags["models"][0]["capabilities"] == ["completion", "tools"]
    info = shown["model_info"]
    assert info["general.architecture"] == "llama" and info["llama.context_length"] == 512
    assert {"llama.block_count", "llama.embedding_length", "llama.attention.head_count"} <= set(info)
    assert "secret" not in json.dumps([tags, ps, shown])


async def test_files_that_are_gone_or_damaged_leave_blanks(tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + b"\xff" * 50)
    for path in ("nothing-of-that-name", tmp_path / "bad.gguf"):
        tags, ps, shown = await answers(engine_of(path))
        assert tags["models"][0]["details"]["family"] == "" and ps["models"][0]["size"] == 0
        assert shown["model_info"] == {} and shown["modelfile"] == "FROM tiny\n"


async def answers(engine: FakeEngine) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """What /api/tags, /api/ps and /api/show say of the one model."""
    responses = [await get(engine, "/api/tags"), await get(engine, "/api/ps")]
    responses.append(await post(engine, "/api/show", {"model": "tiny"}))
    assert [response.status_code for response in responses] == [200] * 3
    tags, ps, shown = (response.json() for response in responses)
    return tags, ps, shown


async def test_each_alias_is_listed_and_a_loading_model_does_not_run() -> None:
    engine = FakeEngine(is_ready=False)
    async with client_of(engine, model_aliases=("other:8b", "org/name")) as client:
        names = [model["name"] for model in (await client.get("/api/tags")).json()["models"]]
        assert names == ["tiny:latest", "other:8b", "org/name:latest"]
        assert (await client.get("/api/ps")).json() == {"models": []}
        assert (await client.post("/api/show", json={"model": "org/name:latest"})).status_code == 200
        assert (await client.post("/api/show", json={"model": "nope"})).status_code == 404
        assert (await client.post("/api/show", json={})).status_code == 400
        assert (await client.post("/api/chat", json={"model": "tiny"})).status_code == 503


async def test_probes_are_answered() -> None:
    async with client_of(FakeEngine()) as client:
        for path in ("/", "/api/tags", "/api/ps", "/api/version"):
            assert (await client.head(path)).status_code == 200
        version = (await client.get("/api/version")).json()["version"]
    assert tuple(map(int, version.split("."))) > (0, 13, 4)  # which Codex asks for


def test_numbers_of_parameters_are_written_as_ollamas() -> None:
    counts = {7_615_616_512: "7.6B", 134_515_008: "134.52M", 70_000_000_000: "70B", 5_000_000: "5M", 12_345: "12K"}
    assert {count: human_count(count) for count in counts} == counts and human_count(17) == "17"


# ---- Embeddings, and the middle of a text ----


async def test_embed_takes_one_text_or_several() -> None:
    one = (await post(FakeEngine(), "/api/embed", {"model": "tiny", "input": "hi"})).json()
    assert one.pop("total_duration") >= one.pop("load_duration") > 0
    assert one == {"model": "tiny", "embeddings": [[2.0, 104.0, 105.0, 1.0]], "prompt_eval_count": 2}
    two = (await post(FakeEngine(), "/api/embed", {"model": "tiny", "input": ["hi", "abc"], "dimensions": 3})).json()
    assert [len(vector) for vector in two["embeddings"]] == [3, 3] and two["prompt_eval_count"] == 5
    assert all(sum(x * x for x in vector) == pytest.approx(1, abs=1e-5) for vector in two["embeddings"])
    empty: tuple[Any, ...] = ("", [], None)
    for text in empty:
        none = (await post(FakeEngine(), "/api/embed", {"model": "tiny", "input": text})).json()
        assert none["embeddings"] == [] and none["prompt_eval_count"] == 0


async def test_embed_cuts_texts_that_are_too_long() -> None:
    long = {"model": "tiny", "input": "ab" * 1000}
    assert (await post(FakeEngine(), "/api/embed", long)).json()["prompt_eval_count"] == 999
    small = {**long, "options": {"num_ctx": 10}}
    assert (await post(FakeEngine(), "/api/embed", small)).json()["prompt_eval_count"] == 9
    refused = await post(FakeEngine(), "/api/embed", {**long, "truncate": False})
    assert refused.status_code == 400 and "exceeds the context length" in refused.json()["error"]


async def test_the_older_route_embeds_one_prompt() -> None:
    answer = await post(FakeEngine(), "/api/embeddings", {"model": "tiny", "prompt": "hi"})
    assert answer.json() == {"embedding": [2.0, 104.0, 105.0, 1.0]}
    assert (await post(FakeEngine(), "/api/embeddings", {"model": "tiny"})).json() == {"embedding": []}


async def test_a_suffix_asks_for_the_text_before_it() -> None:
    engine, body = FakeEngine(), {"model": "tiny", "prompt": "a", "suffix": "b", "stream": False}
    refused = await post(engine, "/api/generate", body)
    assert refused.status_code == 400 and "suffix" in refused.json()["error"]
    engine.tokenizer.fim = FillInTheMiddle(1, 2, 3, is_suffix_first=False, end_ids=frozenset({1, 2, 3}))
    await post(engine, "/api/generate", body)
    assert engine.calls[-1].prompt_ids == [1, 97, 2, 98, 3] and engine.calls[-1].params.stop_token_ids == (1, 2, 3)
    for num_before, num_after in ((3000, 3000), (3000, 10), (10, 3000)):
        await post(engine, "/api/generate", {**body, "prompt": "a" * num_before, "suffix": "b" * num_after})
        prompt = engine.calls[-1].prompt
        assert 950 < len(prompt) < 1000 and min(prompt.count("a"), prompt.count("b")) >= 10


# ---- Pulls ----


def make_pull(monkeypatch: pytest.MonkeyPatch, run: Callable[[Callable[[str, int, int], None]], None]) -> list[str]:
    """Let downloads be `run`. Returns the list of names that will have been pulled."""
    pulled: list[str] = []

    def pull(name: str, directory: Path, progress: Callable[[str, int, int], None]) -> ModelFiles:
        pulled.append(name)
        run(progress)
        return ModelFiles("hf", directory, name)

    monkeypatch.setattr(pulls, "pull", pull)
    return pulled


def lines_of(response: httpx.Response) -> list[dict[str, Any]]:
    assert response.headers["content-type"] == "application/x-ndjson"
    return [json.loads(line) for line in response.text.splitlines()]


async def test_a_pull_reports_its_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    taken, line = threading.Semaphore(0), pulls.Pull._line

    def note(pull: pulls.Pull, *stages: Any) -> Any:
        taken.release()
        return line(pull, *stages)

    def run(report: Callable[[str, int, int], None]) -> None:
        for stage, done in (("download", 0), ("download", 50), ("check", 10), ("check", 100)):
            report(stage, done, 100)
            taken.acquire(timeout=PATIENCE_S)  # so that the loop sees each stage

    monkeypatch.setattr(pulls.Pull, "_line", note)
    pulled = make_pull(monkeypatch, run)
    lines = lines_of(await post(FakeEngine(), "/api/pull", {"model": "hf.co/org/name:latest"}))
    assert pulled == ["org/name"]
    assert [line["status"] for line in (lines[0], *lines[3:])] == [
        "pulling manifest",
        "verifying sha256 digest",
        "writing manifest",
        "it is on this machine, but not served: run `tinyvllm serve org/name`",
        "success",
    ]
    assert [(line["total"], line["completed"]) for line in lines[1:3]] == [(100, 0), (100, 50)]
    assert lines[1]["digest"].startswith("sha256:") and lines[1]["digest"][7:19] in lines[1]["status"]
    whole = await post(FakeEngine(), "/api/pull", {"name": "org/name", "stream": False})
    assert whole.json() == {"status": "success"}


async def test_two_requests_share_a_pull_and_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    may_end = threading.Event()

    def run(report: Callable[[str, int, int], None]) -> None:
        report("download", 1, 2)
        may_end.wait(PATIENCE_S)

    pulled = make_pull(monkeypatch, run)
    async with client_of(FakeEngine()) as client:
        both = [asyncio.create_task(client.post("/api/pull", json={"model": "org/name"})) for _ in range(2)]
        while not pulled:
            await asyncio.sleep(0.01)
        chat = await client.post("/api/chat", json={"model": "tiny", "messages": [{"role": "user", "content": "hi"}]})
        assert chat.status_code == 200 and not any(task.done() for task in both)
        may_end.set()
        for task in both:
            assert lines_of(await task)[-1] == {"status": "success"}
    assert pulled == ["org/name"]


async def test_a_pull_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(report: Callable[[str, int, int], None]) -> None:
        raise DownloadError("cannot put it into /home/someone/models: no space")

    make_pull(monkeypatch, run)
    first, last = lines_of(await post(FakeEngine(), "/api/pull", {"model": "org/name"}))
    assert first == {"status": "pulling manifest"}
    assert last == {"error": "cannot put it into (a file of the server): no space"}
    whole = await post(FakeEngine(), "/api/pull", {"model": "org/name", "stream": False})
    assert whole.status_code == 500 and list(whole.json()) == ["error"]


async def test_only_known_names_are_pulled(monkeypatch: pytest.MonkeyPatch) -> None:
    pulled = make_pull(monkeypatch, lambda report: None)
    for name in ("llama3.2", "org/name:Q4_K_M", "../../etc", "/etc/passwd", "a/b/c"):
        response = await post(FakeEngine(), "/api/pull", {"model": name})
        assert response.status_code == 404 and "not found" in response.json()["error"]
    served = lines_of(await post(FakeEngine(), "/api/pull", {"model": "tiny"}))
    assert served == [{"status": "pulling manifest"}, {"status": "success"}] and not pulled


# ---- What this server does not do ----


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("DELETE", "/api/delete", {"model": "tiny"}, 400),
        ("DELETE", "/api/delete", {"model": "nope"}, 404),
        ("POST", "/api/copy", {"source": "tiny", "destination": "b"}, 400),
        ("POST", "/api/copy", {"source": "nope", "destination": "b"}, 404),
        ("POST", "/api/create", {"model": "b", "from": "tiny"}, 400),
        ("POST", "/api/push", {"model": "tiny"}, 400),
        ("POST", "/api/blobs/sha256:00", {"a": "file"}, 400),
    ],
)
async def test_changes_are_refused_with_what_to_do(method: str, path: str, body: dict[str, str], status: int) -> None:
    async with client_of(FakeEngine()) as client:
        response = await client.request(method, path, json=body)
        assert (await client.head("/api/blobs/sha256:00")).status_code == 404
    assert response.status_code == status and list(response.json()) == ["error"]
    assert ("not supported: " if status == 400 else "not found") in response.json()["error"]
