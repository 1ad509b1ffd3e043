"""docs/SERVING.md names all flags, routes, metrics and codes, and no others."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families
from typer.main import get_command

from tests.server.fake_engine import FakeEngine
from tinyvllm.cli.commands import app as cli
from tinyvllm.door.metrics import ModelsCollector
from tinyvllm.server.app import make_app
from tinyvllm.server.failures import _STATES

PAGE = (Path(__file__).parents[2] / "docs" / "SERVING.md").read_text(encoding="utf-8")


def _flags_of(command: str) -> set[str]:
    params = get_command(cli).commands[command].params  # type: ignore[attr-defined]
    return {option for parameter in params for option in parameter.opts if option.startswith("--")}


def test_flags() -> None:
    flags = _flags_of("serve")
    named = set(re.findall(r"(?<!\w)--[a-z][a-z-]+", PAGE)) - {"--unix-socket"}  # curl's
    assert named - flags - _flags_of("why") - {"--no-access-log"} == set()
    # aliases: vLLM's spelling, and llama.cpp's
    assert flags - named == {"--max-num-queued-reqs", "--cache-type-k", "--cache-type-v"}


def test_routes() -> None:
    paths = set(make_app(FakeEngine()).openapi()["paths"])  # type: ignore[arg-type]
    named = set(re.findall(r"(?:GET|POST|DELETE)[a-z ]*`? ?`?(/[\w/{}]*)", PAGE))
    assert named - paths == {"/"} and paths <= named


async def test_metrics() -> None:
    engine = FakeEngine()
    engine.config = replace(engine.config, kv_offloading_size=1.0)
    app = make_app(engine)  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        await client.post("/v1/completions", json={"prompt": "x"})
        text = (await client.get("/metrics")).text
    families = {
        f"{family.name}_total" if family.type == "counter" else family.name
        for family in text_string_to_metric_families(text)
        if not family.name.startswith(("process_", "python_")) and not family.name.endswith("_created")
    }
    fleet: Any = SimpleNamespace(counts={})  # of several models
    families |= {
        f"{family.name}_total" if family.type == "counter" else family.name
        for family in ModelsCollector(fleet).collect()
    }
    named = set(re.findall(r"`((?:tiny)?vllm:\w+|http_\w+)`", PAGE))
    assert named == families


def test_codes() -> None:
    for _, status, _, code, _ in _STATES:
        assert re.search(rf"^\| {status} \|.*`{code}`", PAGE, re.MULTILINE), code
