"""The load generator: its figures for answers with known times, and its requests to a real server."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from tests.engine.fakes import FakeModelRunner, make_loaded
from tests.server.fake_engine import serving
from tinyvllm.bench.load import Answer, Load, LoadWork, Target, find_model, measure_load, summarize
from tinyvllm.bench.plots import draw_load
from tinyvllm.cli import app
from tinyvllm.config import EngineConfig
from tinyvllm.engine.async_engine import AsyncEngine
from tinyvllm.errors import TinyvllmError
from tinyvllm.scheduling.plan import StepStats

TARGET = Target("http://server", "tiny")
WORK = LoadWork(num_requests=3, num_warmup=2, input_len=16, output_len=4)


def ignore(stage: str, done: int, total: int) -> None:
    """Progress is not shown."""


def answer(sent_s: float, *text_s: float, num_output: int | None = None) -> Answer:
    return Answer(sent_s, list(text_s), num_input=10, num_output=num_output)


# -- figures ---------------------------------------------------------------------------------------------------------


def test_times_are_defined_as_vllm_defines_them() -> None:
    one = answer(1.0, 1.5, 1.6, 2.0)
    assert one.ttft_ms == pytest.approx(500)
    assert one.e2e_ms == pytest.approx(1000)
    assert one.tpot_ms == pytest.approx(250)  # (E2E - TTFT) / (n - 1)
    assert one.itl_ms == pytest.approx([100, 400])
    merged = answer(1.0, 1.5, 2.0, num_output=6)  # two pieces of text, six tokens as counted by the server
    assert merged.tpot_ms == pytest.approx(100) and merged.itl_ms == pytest.approx([500])
    assert answer(1.0, 1.5).tpot_ms is None


def test_row_counts_tokens_over_the_time_from_first_request_to_last_token() -> None:
    failed = Answer(0.0, error="429: too many")
    row = summarize(TARGET, WORK, Load(4), [answer(0.5, 1.0, 2.0), answer(1.0, 1.5, 2.5, num_output=8), failed])
    assert row["duration_s"] == pytest.approx(2.5)
    assert (row["requests"], row["errors"]) == (3, {"429: too many": 1})
    assert row["request_s"] == pytest.approx(2 / 2.5)
    assert (row["input_tokens"], row["output_tokens"]) == (20, 10)
    assert row["output_tok_s"] == pytest.approx(4) and row["total_tok_s"] == pytest.approx(12)
    assert row["ttft_ms"]["count"] == 2 and row["ttft_ms"]["median"] == pytest.approx(500)
    assert row["goodput_share"] is None


def test_goodput_counts_requests_that_keep_every_limit() -> None:
    work = LoadWork(slo_ms={"ttft": 600, "itl": 300})
    slow_start, slow_gap, good = answer(0, 0.9, 1.0), answer(0, 0.5, 0.6, 1.0), answer(0, 0.5, 0.75, 1.0)
    row = summarize(TARGET, work, Load(1), [slow_start, slow_gap, good, Answer(0.0, error="gone")])
    assert row["goodput_share"] == pytest.approx(1 / 4)  # a failed request is not good
    assert row["goodput_request_s"] == pytest.approx(1.0)


def test_level_without_a_success_is_an_error() -> None:
    with pytest.raises(TinyvllmError, match=r"all 2 requests.*503: busy"):
        summarize(TARGET, WORK, Load(1), [Answer(0.0, error="503: busy")] * 2)


def test_no_two_prompts_begin_alike() -> None:
    prompts = [WORK.prompt(number) for number in range(60)]
    assert len({prompt[:4] for prompt in prompts}) == 60
    assert {len(prompt) for prompt in prompts} == {round(16 * 4.4)}


# -- loops -----------------------------------------------------------------------------------------------------------


class Server(httpx.AsyncBaseTransport):
    """Answers each request with two pieces of text when told to. Records how many were open at once."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.num_open = self.most_open = 0

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.bodies.append(json.loads(request.content))
        self.num_open += 1
        self.most_open = max(self.most_open, self.num_open)
        for _ in range(20):  # let the others arrive
            await asyncio.sleep(0)
        self.num_open -= 1
        events = [{"choices": [{"text": "a"}]}, {"choices": [{"text": "b"}]}, {"choices": [], "usage": USAGE}]
        lines = [f"data: {json.dumps(event)}\n\n" for event in events]
        return httpx.Response(200, text="".join([*lines, "data: [DONE]\n\n"]))


USAGE = {"prompt_tokens": 5, "completion_tokens": 2}


def send(load: Load, work: LoadWork) -> tuple[Server, dict[str, Any]]:
    server = Server()
    target = Target("http://server", "tiny", transport=server)
    (row,) = asyncio.run(measure_load(target, work, [load], ignore))
    return server, row


@pytest.mark.parametrize("concurrency", [1, 3])
def test_closed_loop_keeps_as_many_open_as_asked_for(concurrency: int) -> None:
    server, row = send(Load(concurrency), LoadWork(num_requests=9, num_warmup=2, output_len=2))
    assert server.most_open == concurrency
    assert (len(server.bodies), row["requests"]) == (2 + 9, 9)  # warm-up requests are not counted
    assert len({body["prompt"] for body in server.bodies}) == 11


def test_open_loop_sends_at_random_times_whatever_is_open(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    sleep = asyncio.sleep

    async def note(seconds: float) -> None:
        if seconds:
            waits.append(seconds)
        await sleep(0)

    monkeypatch.setattr(asyncio, "sleep", note)
    server, row = send(Load(rate=1000.0), LoadWork(num_requests=400, num_warmup=0, output_len=2, seed=1))
    assert row["requests"] == 400 and (row["rate"], row["concurrency"]) == (1000.0, None)
    gaps = [after - before for before, after in itertools.pairwise([0.0, *waits])]
    assert len(waits) == 400 and len(set(gaps)) == 400
    assert server.most_open > 1


# -- against the real server -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine() -> Iterator[AsyncEngine]:
    runner = FakeModelRunner(num_blocks=256, max_num_seqs=4)
    runner.choose = lambda request, digest: 97 + digest % 26
    runner.before_step = lambda plan: time.sleep(0.002)  # otherwise several tokens arrive as one piece of text
    engine = AsyncEngine.start(
        EngineConfig("tiny", served_model_name="tiny"), load=lambda config, progress: make_loaded(runner)
    )
    asyncio.run(engine.wait_ready())
    yield engine
    asyncio.run(engine.shutdown())


@pytest.fixture(scope="module")
def url(engine: AsyncEngine) -> Iterator[str]:
    with serving(engine) as address:
        yield address


def test_load_waits_until_the_server_is_warm(url: str, engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    left = iter(range(40, 0, -1))  # read several times per request
    monkeypatch.setattr(engine, "stats", lambda: StepStats(num_captures_to_come=next(left, 0)))
    monkeypatch.setattr("tinyvllm.bench.load.POLL_S", 0.0)
    stages: list[tuple[str, int, int]] = []
    rows = asyncio.run(measure_load(Target(url, "tiny"), WORK, [Load(1)], lambda *stage: stages.append(stage)))
    assert rows[0]["requests"] == 3
    warm = [(done, total) for name, done, total in stages if name == "warm-up"]
    assert len(warm) > 2 and warm == sorted(warm)
    assert warm[0][0] < warm[0][1] and warm[-1][0] == warm[-1][1]


@pytest.mark.parametrize("api", ["completions", "chat"])
def test_every_token_of_every_answer_is_counted(url: str, api: str) -> None:
    target = Target(url, "tiny", api=api)
    rows = asyncio.run(measure_load(target, WORK, [Load(1), Load(2)], ignore))
    for row, concurrency in zip(rows, (1, 2), strict=True):
        assert (row["concurrency"], row["requests"], row["errors"]) == (concurrency, 3, {})
        assert row["output_tokens"] == 3 * 4 and row["input_tokens"] > 0
        assert 0 < row["itl_ms"]["count"] <= 3 * 3
        assert 0 < row["ttft_ms"]["median"] <= row["e2e_ms"]["median"]


def test_refused_requests_are_counted_by_their_reason(url: str) -> None:
    too_long = LoadWork(num_requests=2, num_warmup=0, input_len=16, output_len=100_000)
    with pytest.raises(TinyvllmError, match=r"all 2 requests.*400: "):
        asyncio.run(measure_load(Target(url, "tiny"), too_long, [Load(2)], ignore))


def test_key_is_sent(engine: AsyncEngine) -> None:
    with serving(engine, api_keys=("secret",)) as url:
        rows = asyncio.run(measure_load(Target(url, "tiny", api_key="secret"), WORK, [Load(1)], ignore))
        assert rows[0]["errors"] == {}
        with pytest.raises(TinyvllmError, match="401"):
            asyncio.run(measure_load(Target(url, "tiny"), WORK, [Load(1)], ignore))


def test_model_is_found_and_a_missing_server_is_said(url: str) -> None:
    assert asyncio.run(find_model(Target(url, ""))) == "tiny"
    with pytest.raises(TinyvllmError, match=r"no OpenAI server answers at http://127\.0\.0\.1:9"):
        asyncio.run(find_model(Target("http://127.0.0.1:9", "")))


def test_command_prints_levels_and_writes_them(url: str, tmp_path: Path) -> None:
    path = tmp_path / "load.json"
    flags = "--num-prompts 3 --warmup 1 --input-len 16 --output-len 4 --concurrency 1,2 --goodput ttft:100000"
    arguments = ["bench", "serve", "--url", f"{url}/v1", *flags.split(), "--json", str(path)]
    result = CliRunner().invoke(app, [*arguments, "--plot", str(tmp_path / "load.svg")])
    assert result.exit_code == 0, result.output
    assert "1 at once" in result.stdout and "2 at once" in result.stdout and "100%" in result.stdout
    rows = json.loads(path.read_text(encoding="utf-8"))
    assert [row["concurrency"] for row in rows] == [1, 2] and rows[0]["environment"]["seed"] == 0
    draw_load([row | {"rate": row["concurrency"] * 1.5} for row in rows], str(tmp_path / "rates.html"))
    assert "requests at once" in (tmp_path / "load.svg").read_text(encoding="utf-8")
    markdown = CliRunner().invoke(app, [*arguments, "--markdown"])
    assert markdown.stdout.startswith("| load | requests/s |")


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ("--api assistants", "choose from completions, chat"),
        ("--concurrency none", "there is no load"),
        ("--concurrency 0", "--concurrency is 0"),
        ("--rate fast", "--rate has 'fast'"),
        ("--rate 0", "--rate is 0"),
        ("--goodput speed:3", "choose from ttft, tpot, itl, e2e"),
        ("--max-concurrency 3", "give --rate too"),
        ("--output-len 1", "--output-len is 1"),
    ],
)
def test_bad_flag_is_one_line(flags: str, text: str) -> None:
    result = CliRunner().invoke(app, ["bench", "serve", "--model", "tiny", *flags.split()])
    assert result.exit_code == 1 and text in result.stderr and "Traceback" not in result.stderr
