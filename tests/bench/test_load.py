"""The load generator: its figures for answers with known times, and its requests to a real server."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.bench.event_server import EventServer, serving_events
from tests.engine.fakes import FakeModelRunner, make_loaded
from tests.server.fake_engine import serving
from tinyvllm.bench.load import Load, LoadWork, Target
from tinyvllm.bench.load_answers import Answer, Share
from tinyvllm.bench.load_measure import find_model, find_vocab_size, measure_load
from tinyvllm.bench.load_rows import spread_of, summarize
from tinyvllm.bench.load_tables import load_markdown, warn_of_generator
from tinyvllm.bench.plots import draw_load
from tinyvllm.bench.spread import Spread
from tinyvllm.bench.trust import GRADES
from tinyvllm.cli.commands import app
from tinyvllm.config import EngineConfig
from tinyvllm.engine.async_engine import AsyncEngine
from tinyvllm.errors import TinyvllmError
from tinyvllm.scheduling.plan import StepStats

TARGET = Target("http://server", "tiny")
WORK = LoadWork(num_requests=3, num_warmup=2, input_len=16, output_len=4)


def ignore(stage: str, done: int, total: int) -> None:
    """Progress is not shown."""


def answer(sent_s: float, *text_s: float, num_output: int | None = None) -> Answer:
    return Answer(sent_s, array("d", text_s), num_input=10, num_output=num_output)


def row_of(load: Load, *answers: Answer, work: LoadWork = WORK, cpu_s: float = 0.1) -> dict[str, Any]:
    """The row of answers that two processes have timed."""
    shares = [Share(list(answers[:1]), cpu_s / 2, array("d")), Share(list(answers[1:]), cpu_s, array("d", [0.003]))]
    return summarize(TARGET, work, load, shares)


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
    row = row_of(Load(4), answer(0.5, 1.0, 2.0), answer(1.0, 1.5, 2.5, num_output=8), failed)
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
    row = row_of(Load(1), slow_start, slow_gap, good, Answer(0.0, error="gone"), work=work)
    assert row["goodput_share"] == pytest.approx(1 / 4)  # a failed request is not good
    assert row["goodput_request_s"] == pytest.approx(1.0)


def test_level_without_a_success_is_an_error() -> None:
    with pytest.raises(TinyvllmError, match=r"all 2 requests.*503: busy"):
        row_of(Load(1), *[Answer(0.0, error="503: busy")] * 2)


def test_lumps_show_in_the_events_per_answer_and_in_the_gaps_between_reads() -> None:
    smooth = row_of(Load(1), answer(0, 0.1, 0.2, 0.3, 0.4))
    in_one_read = row_of(Load(1), answer(0, 0.1, 0.1, 0.3, 0.3))
    merged = row_of(Load(1), answer(0, 0.1, 0.3, num_output=4))
    assert smooth["events"] == smooth["output_tokens"] == in_one_read["events"] == 4
    assert (merged["events"], merged["output_tokens"], merged["events_per_answer"]["mean"]) == (2, 4, 2)
    assert smooth["itl_ms"]["median"] == pytest.approx(100) == smooth["read_gap_ms"]["median"]
    assert (in_one_read["itl_ms"]["median"], in_one_read["itl_ms"]["count"]) == (0, 3)
    assert in_one_read["read_gap_ms"]["median"] == pytest.approx(200) and in_one_read["read_gap_ms"]["count"] == 1
    assert smooth["event_s"] == pytest.approx(4 / 0.4)


def test_cost_of_the_generator_is_reported_and_a_busy_one_is_a_warning() -> None:
    idle = row_of(Load(3), answer(0, 0.5, 1.0), answer(0, 0.5, 1.0), cpu_s=0.2)
    assert (idle["load_processes"], idle["load_cpu_s"], idle["load_busy_share"]) == (2, pytest.approx(0.3), 0.2)
    assert idle["load_late_ms"]["median"] == pytest.approx(3) and warn_of_generator(idle) is None
    busy = row_of(Load(3), answer(0, 0.5, 1.0), answer(0, 0.5, 1.0), cpu_s=0.9)
    assert "3 at once: one of 2 load processes was busy 90%" in str(warn_of_generator(busy))


def test_numpy_gives_the_same_spread() -> None:
    for values in ([3.0], [3.0, 1.0], [float(n * n % 17) for n in range(50)]):
        assert spread_of(values) == pytest.approx(vars(Spread.of(values)))
    assert spread_of([]) is None


def test_no_two_prompts_begin_alike() -> None:
    prompts = [WORK.prompt(number) for number in range(60)]
    assert len({prompt[:4] for prompt in prompts}) == 60
    assert {len(prompt) for prompt in prompts} == {round(16 * 4.4)}


# -- loops -----------------------------------------------------------------------------------------------------------


def send(load: Load, work: LoadWork, num_processes: int = 1) -> tuple[EventServer, dict[str, Any]]:
    """Send the load to a server that answers only when as many requests are open as can be."""
    total = work.num_warmup + work.num_requests
    server = EventServer(hold=load.concurrency or 0, total=total)
    with serving_events(server) as url:
        (row,) = measure_load(Target(url, "tiny"), work, [load], ignore, num_processes)
    return server, row


@pytest.mark.parametrize(
    ("concurrency", "num_processes"),
    [(1, 1), (3, 2), pytest.param(3, 1, marks=pytest.mark.sweep), pytest.param(5, 5, marks=pytest.mark.sweep)],
)
def test_closed_loop_keeps_as_many_open_as_asked_for(concurrency: int, num_processes: int) -> None:
    work = LoadWork(num_requests=3 * concurrency, num_warmup=0, output_len=2)
    server, row = send(Load(concurrency), work, num_processes)
    assert server.most_open == concurrency
    assert server.num_connections == concurrency + 1  # each carries one request after another; one is for /ready
    assert (row["requests"], row["errors"], row["load_processes"]) == (3 * concurrency, {}, num_processes)


def test_warmup_requests_are_sent_first_and_not_counted() -> None:
    server, row = send(Load(1), LoadWork(num_requests=9, num_warmup=2, output_len=2))
    assert (len(server.bodies), row["requests"]) == (2 + 9, 9)
    assert len({body["prompt"] for body in server.bodies}) == 11


def test_token_ids_are_sent_with_exact_lengths() -> None:
    server, row = send(Load(1), LoadWork(num_requests=4, num_warmup=2, input_len=20, output_len=2, vocab_size=1000))
    prompts = [body["prompt"] for body in server.bodies]
    assert {len(prompt) for prompt in prompts} == {20} and row["input_tokens"] == 4 * 20
    assert len({tuple(prompt[:4]) for prompt in prompts}) == 6 and max(map(max, prompts)) < 1000


def test_every_event_is_counted_however_they_are_lumped() -> None:
    for lump in (1, 1000):
        with serving_events(EventServer(lump=lump)) as url:
            work = LoadWork(num_requests=6, num_warmup=0, output_len=500)
            (row,) = measure_load(Target(url, "tiny"), work, [Load(3)], ignore, 2)
        assert (row["errors"], row["events"], row["output_tokens"]) == ({}, 6 * 500, 6 * 500)
        assert row["itl_ms"]["count"] == 6 * 499


def test_arrivals_are_a_poisson_process_that_the_seed_decides() -> None:
    load = Load(rate=1000.0)
    times = load.arrivals(4000, seed=1)
    assert times == load.arrivals(4000, seed=1) != load.arrivals(4000, seed=2)
    assert times is not None and times == sorted(times) and len(set(times)) == 4000
    gaps = [after - before for before, after in itertools.pairwise([0.0, *times])]
    mean = sum(gaps) / 4000
    assert mean == pytest.approx(1e-3, rel=0.1)
    assert sum((gap - mean) ** 2 for gap in gaps) / 4000 == pytest.approx(mean**2, rel=0.2)  # of an exponential law
    assert Load(rate=float("inf")).arrivals(3, seed=0) == [0, 0, 0] and Load(3).arrivals(3, seed=0) is None


def test_open_loop_sends_whatever_is_open() -> None:
    work = LoadWork(num_requests=40, num_warmup=0, output_len=2, seed=1)
    with serving_events(EventServer(hold=40, total=40)) as url:  # answers when all of them are open
        (row,) = measure_load(Target(url, "tiny"), work, [Load(rate=1000.0)], ignore, 2)
    assert (row["requests"], row["errors"], row["rate"], row["concurrency"]) == (40, {}, 1000.0, None)
    assert row["load_processes"] == 2 and row["load_late_ms"]["count"] == 40


def test_open_loop_keeps_to_the_maximum_concurrency() -> None:
    work = LoadWork(num_requests=12, num_warmup=0, output_len=2)
    server, row = send(Load(3, rate=float("inf")), work, 2)
    assert (row["requests"], row["errors"], server.most_open) == (12, {}, 3)


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
    monkeypatch.setattr("tinyvllm.bench.load_measure.POLL_S", 0.0)
    stages: list[tuple[str, int, int]] = []
    rows = measure_load(Target(url, "tiny"), WORK, [Load(1)], lambda *stage: stages.append(stage))
    assert rows[0]["requests"] == 3
    warm = [(done, total) for name, done, total in stages if name == "warm-up"]
    assert len(warm) > 2 and warm == sorted(warm)
    assert warm[0][0] < warm[0][1] and warm[-1][0] == warm[-1][1]


@pytest.mark.parametrize("api", ["completions", "chat"])
def test_every_token_of_every_answer_is_counted(url: str, api: str) -> None:
    target = Target(url, "tiny", api=api)
    rows = measure_load(target, WORK, [Load(1), Load(2)], ignore)
    for row, concurrency in zip(rows, (1, 2), strict=True):
        assert (row["concurrency"], row["requests"], row["errors"]) == (concurrency, 3, {})
        assert row["output_tokens"] == 3 * 4 and row["input_tokens"] > 0
        assert 0 < row["itl_ms"]["count"] <= 3 * 3
        assert 0 < row["ttft_ms"]["median"] <= row["e2e_ms"]["median"]
        parts = {name: part["mean"] for name, part in row["server_ms"].items()}
        total = parts.pop("total")
        assert sum(parts.values()) == pytest.approx(total, abs=0.01) and {"queue", "prefill", "decode"} <= set(parts)


def test_refused_requests_are_counted_by_their_reason(url: str) -> None:
    too_long = LoadWork(num_requests=2, num_warmup=0, input_len=16, output_len=100_000)
    with pytest.raises(TinyvllmError, match=r"all 2 requests.*400: "):
        measure_load(Target(url, "tiny"), too_long, [Load(2)], ignore)


def test_key_is_sent(engine: AsyncEngine) -> None:
    with serving(engine, api_keys=("secret",)) as url:
        rows = measure_load(Target(url, "tiny", api_key="secret"), WORK, [Load(1)], ignore)
        assert rows[0]["errors"] == {}
        with pytest.raises(TinyvllmError, match="401"):
            measure_load(Target(url, "tiny"), WORK, [Load(1)], ignore)


def test_model_is_found_and_a_missing_server_is_said(url: str) -> None:
    assert find_model(Target(url, "")) == "tiny"
    with pytest.raises(TinyvllmError, match=r"no OpenAI server answers at http://127\.0\.0\.1:9"):
        find_model(Target("http://127.0.0.1:9", ""))


def test_vocabulary_is_found_or_asked_for(url: str, engine: AsyncEngine) -> None:
    assert find_vocab_size(Target(url, "tiny")) == engine.tokenizer.vocab_size
    with (
        serving_events(EventServer()) as other,
        pytest.raises(TinyvllmError, match=r"tokenizer_info answered 404: give --vocab-size"),
    ):
        find_vocab_size(Target(other, "tiny"))


def test_command_prints_levels_and_writes_them(url: str, tmp_path: Path) -> None:
    path = tmp_path / "load.json"
    flags = "--num-prompts 3 --warmup 1 --input-len 16 --output-len 4 --concurrency 1,2 --goodput ttft:100000"
    arguments = ["bench", "serve", "--url", f"{url}/v1", *flags.split(), "--json", str(path)]
    result = CliRunner().invoke(app, [*arguments, "--plot", str(tmp_path / "load.svg")])
    assert result.exit_code == 0, result.output
    assert "1 at once, in the server:" in result.stdout
    assert "1 at once" in result.stdout and "2 at once" in result.stdout and "100%" in result.stdout
    rows = json.loads(path.read_text(encoding="utf-8"))
    assert [row["concurrency"] for row in rows] == [1, 2] and rows[0]["environment"]["seed"] == 0
    for row in rows:  # the server's own work is none of others
        assert row["trust"]["grade"] in GRADES and row["trust"]["others_share"] is None
        assert row["trust"]["noise_share"] is not None
    draw_load([row | {"rate": row["concurrency"] * 1.5} for row in rows], str(tmp_path / "rates.html"))
    assert "requests at once" in (tmp_path / "load.svg").read_text(encoding="utf-8")
    markdown = CliRunner().invoke(app, [*arguments, "--markdown"])
    assert markdown.stdout.startswith("| load | requests/s |") and load_markdown(rows).count("\n") == 3


def test_command_sends_token_ids_from_several_processes(url: str) -> None:
    flags = "--num-prompts 4 --warmup 0 --input-len 24 --output-len 4 --concurrency 2 --prompt-ids"
    flags += " --load-processes 2 --new-connections"
    result = CliRunner().invoke(app, ["bench", "serve", "--url", url, *flags.split(), "--json", "-"])
    assert result.exit_code == 0, result.output
    (row,) = json.loads(result.stdout.splitlines()[-1])
    assert (row["input_tokens"], row["load_processes"], row["errors"]) == (4 * 24, 2, {})


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
        ("--load-processes 0", "--load-processes is 0"),
        ("--vocab-size 100", "give --prompt-ids too"),
        ("--prompt-ids --vocab-size 1", "--vocab-size is 1"),
        ("--prompt-ids --api chat", "a chat's messages are text"),
        ("--url ftp://server", "give http://HOST:PORT"),
    ],
)
def test_bad_flag_is_one_line(flags: str, text: str) -> None:
    result = CliRunner().invoke(app, ["bench", "serve", "--model", "tiny", *flags.split()])
    assert result.exit_code == 1 and text in result.stderr and "Traceback" not in result.stderr
