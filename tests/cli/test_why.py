"""`tinyvllm why` asks a server, and shows one request or a list."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from tests.server.device import Device
from tests.server.fake_engine import serving
from tinyvllm.cli.commands import app
from tinyvllm.cli.why import BAR_CELLS, draw_bar
from tinyvllm.config import EngineConfig
from tinyvllm.engine.async_engine import AsyncEngine


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["why", *arguments])


async def test_a_request_is_shown_with_its_stages_and_verdict() -> None:
    engine = AsyncEngine.start(EngineConfig("tiny", served_model_name="tiny"), load=Device().load)
    await engine.wait_ready()
    try:
        with serving(engine) as url:
            await asyncio.to_thread(check, url)
    finally:
        await engine.shutdown()


def check(url: str) -> None:
    empty = run("--url", url)
    assert empty.exit_code == 0 and "no request" in empty.stdout
    body = {"prompt": "abc", "max_tokens": 5}
    httpx.post(url + "/v1/completions", json=body, headers={"x-request-id": "mine"})
    shown = run("mine", "--url", url)
    assert shown.exit_code == 0, shown.output
    assert shown.stdout.startswith("verdict: ") and "output 5 tokens (length)" in shown.stdout
    for word in ("arrival", "parse", "first token", "further tokens", "delivery", "█"):
        assert word in shown.stdout
    listed = run("--url", url, "--slowest", "3")
    assert "mine" in listed.stdout and "/v1" not in listed.stdout
    document = json.loads(run("mine", "--url", url, "--json", "-").stdout)
    assert sum(stage["ms"] for stage in document["stages"]) == pytest.approx(document["total_ms"])
    unknown = run("another", "--url", url)
    assert unknown.exit_code == 1 and "404" in str(unknown.output) + str(unknown.exception)
    both = run("mine", "--url", url, "--last", "2")
    assert both.exit_code == 1


def test_bars_lie_where_their_stages_do() -> None:
    assert draw_bar(0.0, 1.0) == "█" * BAR_CELLS
    assert draw_bar(0.5, 0.25) == " " * (BAR_CELLS // 2) + "█" * (BAR_CELLS // 4)
    assert draw_bar(0.999, 1e-9) == " " * (BAR_CELLS - 1) + "▏"
    assert all(len(draw_bar(start / 10, share / 10)) <= BAR_CELLS for start in range(11) for share in range(11))


@pytest.mark.parametrize("arguments", [("\udcff",), ("a", "--api-key", "\udcff"), ("a", "--url", "http://\udcff:1")])
def test_bytes_that_are_no_text_are_refused(arguments: tuple[str, ...]) -> None:
    result = run(*arguments, *(() if "--url" in arguments else ("--url", "http://127.0.0.1:9")))
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit)
