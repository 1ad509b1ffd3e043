"""What a client of the HTTP server hears of a failure: an error body with a status, or an error as the last event of a
stream, in the format of its API; and the next request is answered."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

from tests.faults.rounds import start_fake_engine
from tests.patience import until
from tinyvllm.engine.async_engine import AsyncEngine
from tinyvllm.faults import ENGINE, POINTS, Fault, planned
from tinyvllm.server.app import make_app
from tinyvllm.server.board import NUM_REQUESTS
from tinyvllm.server.settings import ServerSettings

CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 12, "model": "tiny"}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
FORM = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
BODIES: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": ("/v1/chat/completions", CHAT | {"response_format": FORM}),
    "stream": ("/v1/chat/completions", CHAT | {"response_format": FORM, "stream": True}),
    "responses": ("/v1/responses", {"input": "hi", "max_output_tokens": 12, "stream": True}),
    "messages": ("/v1/messages", CHAT | {"stream": True}),
    "ollama": ("/api/chat", CHAT | {"options": {"num_predict": 12}}),
    "beams": ("/v1/completions", {"prompt": "hi", "max_tokens": 4, "n": 2, "use_beam_search": True}),
    "embeddings": ("/v1/embeddings", {"input": ["hi", "ho"]}),
}
# Where a request fails, and which of the bodies pass there.
FAULTS = (
    *[Fault(point, "memory") for point in ("text.encode", "engine.receive", "engine.schedule", "engine.launch")],
    *[Fault(point, "device") for point in ("engine.collect", "engine.commit", "engine.deliver", "hop.submit")],
    *[Fault(point, "os", at=2) for point in ("hop.arrive", "text.detokenize", "engine.deliver", "engine.collect")],
    Fault("text.render", "memory"),
    Fault("grammar.mask", "device", at=3),
    Fault("grammar.accept", "device", at=3),
    Fault("beam.round", "memory", at=2),
)


def ended_with_an_error(kind: str, response: httpx.Response) -> bool:
    """Whether the answer is an error, which must be well formed."""
    if response.status_code != 200:
        assert response.status_code in (500, 503), response.text
        assert response.json()["error"], response.text
        return True
    text = response.text
    if kind == "ollama":
        return "error" in json.loads(text.splitlines()[-1])
    if kind in ("chat", "beams", "embeddings"):
        return False
    events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    return ("error" in events[-1] and events[-1]["error"] is not None) or events[-1].get("type") == "response.failed"


async def test_every_api_tells_its_client_of_a_failure_and_answers_the_next() -> None:
    engine = start_fake_engine()
    await engine.wait_ready()
    app = make_app(engine, ServerSettings(model_aliases=("tiny",)))
    board = app.state.server.board
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:

        async def fails(kind: str) -> bool:
            path, body = BODIES[kind]
            return ended_with_an_error(kind, await client.post(path, json=body))

        for kind in BODIES:  # compiles the grammar
            assert not await fails(kind), kind
        num_tasks, seen = len(asyncio.all_tasks()), set()
        for fault in FAULTS:
            for kind in BODIES:
                with planned(fault) as plan:
                    has_failed = await fails(kind)
                assert has_failed or not plan.happened or POINTS[fault.point].ends == ENGINE, (fault, kind)
                if plan.happened:
                    seen.add(fault.point)
                    assert not await fails(kind), (fault, kind)
        assert seen == {fault.point for fault in FAULTS}
        await until(lambda: len(asyncio.all_tasks()) <= num_tasks)
        assert board.sum(NUM_REQUESTS) == 0
        [left] = await engine.audit()
        assert left["requests"] == left["owned_requests"] == 0 and left["free_blocks"] == left["all_blocks"]
    await engine.shutdown()


@pytest.mark.parametrize("point", ["pool.free"])
async def test_a_dead_engine_fails_readiness_and_says_so_to_everybody(point: str) -> None:
    engine: AsyncEngine = start_fake_engine()
    await engine.wait_ready()
    transport = httpx.ASGITransport(make_app(engine, ServerSettings()), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        assert (await client.get("/ready")).status_code == 200
        with planned(Fault(point)):
            path, body = BODIES["chat"]
            responses = await asyncio.gather(*(client.post(path, json=body) for _ in range(4)))
        assert [response.status_code for response in responses] == [503] * 4, [r.text for r in responses]
        assert (await client.get("/ready")).status_code == 503
        response = await client.post(path, json=body)
        assert response.status_code == 503 and "inconsistent" in response.json()["error"]["message"]
    await engine.shutdown()
