"""Routes that are imported when a request or the schema needs them, or when the server is idle."""

from __future__ import annotations

import asyncio

import httpx
import pytest
from fastapi import APIRouter, FastAPI

from tests.forking import printed_by
from tests.server.fake_engine import FakeEngine
from tinyvllm.server import routes
from tinyvllm.server.app import make_app
from tinyvllm.server.routes import LATE, ROUTES, late_routes, load_when_idle
from tinyvllm.server.settings import ServerSettings


def client_of(app: FastAPI) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost")


def count_late(late: routes.LateRoutes) -> int:
    return len(late.names)


def test_late_routes_are_routes() -> None:
    assert set(ROUTES) > LATE


def test_a_start_imports_none_of_them() -> None:
    code = (
        "import sys\n"
        "from tests.server.fake_engine import FakeEngine\n"
        "from tinyvllm.server.app import make_app\n"
        "make_app(FakeEngine())\n"
        "late = {'anthropic.messages', 'openai.responses', 'openai.protocol.responses', 'openai.rerank', 'ollama.wire',"
        " 'ollama.protocol'}\n"
        "print(sorted(name for name in late if f'tinyvllm.server.{name}' in sys.modules))\n"
    )
    assert printed_by(code).strip() == "[]"


async def test_a_request_that_no_other_route_takes_brings_them() -> None:
    app = make_app(FakeEngine())  # type: ignore[arg-type]
    late = late_routes(app)
    async with client_of(app) as client:
        assert (await client.get("/health")).status_code == 200
        assert (await client.get("/v1/models")).status_code == 200
        assert (await client.get("/v1/models", headers={"anthropic-version": "2023-06-01"})).json()["has_more"] is False
        assert count_late(late) == len(LATE)
        assert "version" in (await client.get("/api/version")).json()
        assert count_late(late) == 0
        assert (await client.get("/v1/messages")).status_code == 405


async def test_an_unknown_path_names_them_too() -> None:
    async with client_of(make_app(FakeEngine())) as client:  # type: ignore[arg-type]
        answer = await client.get("/nothing")
    assert answer.status_code == 404 and "/v1/responses" in answer.text


def test_the_schema_has_them() -> None:
    paths = make_app(FakeEngine()).openapi()["paths"]  # type: ignore[arg-type]
    assert {"/v1/responses", "/v1/messages", "/v1/chat/completions"} <= set(paths)


def test_those_of_other_apis_are_left_out() -> None:
    app = make_app(FakeEngine(), ServerSettings(apis=("openai",)))  # type: ignore[arg-type]
    assert count_late(late_routes(app)) == sum(name.startswith("openai.") for name in LATE)


async def test_an_idle_server_adds_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """And waits while requests run."""
    monkeypatch.setattr(routes, "IDLE_POLL_S", 0.001)
    late, asked = late_routes(make_app(FakeEngine())), 0  # type: ignore[arg-type]

    def is_idle() -> bool:
        nonlocal asked
        asked += 1
        if asked == 5:
            assert count_late(late) == len(LATE)
        return asked >= 5

    await asyncio.wait_for(load_when_idle(late, is_idle), 30)
    assert count_late(late) == 0


async def test_a_route_that_cannot_be_loaded_is_logged_at_once_and_tried_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(routes, "IDLE_POLL_S", 0.001)
    late, router = late_routes(make_app(FakeEngine())), routes._router  # type: ignore[arg-type]

    def fail(name: str) -> APIRouter:
        raise MemoryError("no room")

    monkeypatch.setattr(routes, "_router", fail)
    await asyncio.wait_for(load_when_idle(late, lambda: True), 30)
    (record,) = caplog.records
    assert "anthropic.messages, openai.responses" in record.message and "status 500" in record.message
    assert record.exc_info is not None and "no room" in str(record.exc_info[1])
    assert count_late(late) == len(LATE)
    monkeypatch.setattr(routes, "_router", router)
    late.load()
    assert count_late(late) == 0
