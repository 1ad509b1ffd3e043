"""Where served time goes: the load's answers and the server's recordings become stages, tables, and JSON."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.server.device import Device
from tests.server.fake_engine import serving
from tinyvllm.bench.load import Load, LoadWork, Target
from tinyvllm.bench.served import ServedLevel, measure_served, running_server
from tinyvllm.bench.served_tables import served_markdown, summary_line
from tinyvllm.cli.bench_served import given_flags
from tinyvllm.cli.commands import app
from tinyvllm.cli.flags import RunnerFlags
from tinyvllm.config import EngineConfig, ModelFiles
from tinyvllm.engine.async_engine import AsyncEngine
from tinyvllm.errors import ProfilingError, TinyvllmError
from tinyvllm.profiling.recording_codec import decode_recordings
from tinyvllm.profiling.stage_rows import RESIDUAL, WALL, stage_rows

WORK = LoadWork(num_requests=6, num_warmup=1, input_len=16, output_len=4)


def ignore(stage: str, done: int, total: int) -> None:
    """Progress is not shown."""


@pytest.fixture
def url() -> Iterator[str]:
    """A server that may record, around a fake device."""
    device = Device()
    device.generate_endlessly(step_s=0.002)
    engine = AsyncEngine.start(EngineConfig("tiny", served_model_name="tiny"), load=device.load)
    asyncio.run(engine.wait_ready())
    with serving(engine, enable_profiling=True) as address:
        yield address
    asyncio.run(engine.shutdown())


def measure_level(url: str, concurrency: int) -> ServedLevel:
    [level] = measure_served(Target(url, "tiny"), WORK, [Load(concurrency)], ignore)
    return level


def test_every_request_of_the_load_is_followed(url: str) -> None:
    level = measure_level(url, concurrency=3)
    assert len(level.served.requests) == WORK.num_requests and level.served.num_left_out == 0
    assert {request.num_tokens for request in level.served.requests} == {WORK.output_len}
    rows = {row.stage: row for row in stage_rows(level.served.requests)}
    stages = [row for name, row in rows.items() if name != WALL]
    assert sum(row.share for row in stages) == pytest.approx(1)
    assert sum(row.mean_ms for row in stages) == pytest.approx(rows[WALL].mean_ms)
    assert sum(row.first_ms for row in stages) == pytest.approx(rows[WALL].first_ms)
    assert sum(row.token_ms for row in stages) == pytest.approx(rows[WALL].token_ms)
    assert rows["accept"].mean_ms > 0 and rows[RESIDUAL].share >= 0


def test_a_level_is_json_and_a_table(url: str) -> None:
    level = measure_level(url, concurrency=1)
    document = json.loads(json.dumps(level.as_json()))
    assert document["concurrency"] == 1 and document["requests"] == WORK.num_requests
    assert document["residual_share"] == document["stages"]["residual"]["share"]
    [process] = document["processes"]
    assert process["lock"]["probes"] > 0 and process["threads"]
    assert "residual" in summary_line(level)
    table = served_markdown([level])
    assert "| wall |" in table and "lock held" in table


def test_a_server_that_does_not_record_is_named() -> None:
    device = Device()
    engine = AsyncEngine.start(EngineConfig("tiny", served_model_name="tiny"), load=device.load)
    asyncio.run(engine.wait_ready())
    with serving(engine) as address, pytest.raises(TinyvllmError, match="--enable-profiling"):
        measure_level(address, concurrency=1)
    asyncio.run(engine.shutdown())


def test_the_command_measures_a_running_server(url: str, tmp_path: Path) -> None:
    figures, trace = tmp_path / "served.json", tmp_path / "trace.json"
    flags = "--concurrency 2 --num-prompts 4 --tokens 3 --input-len 16 --api completions"
    files = ["--json", str(figures), "--trace", str(trace)]
    result = CliRunner().invoke(app, ["bench", "breakdown", "--served", "--url", url, *flags.split(), *files])
    assert result.exit_code == 0, result.output
    assert "hop back" in result.stdout and "tinyvllm-engine" in result.stdout
    assert json.loads(figures.read_text())["levels"][0]["requests"] == 4
    assert {"request", "step"} <= {event["name"] for event in json.loads(trace.read_text())["traceEvents"]}


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ("--trace t.json", "--trace needs --served"),
        ("--served --csv c --plot p", "--csv, --plot is for the engine's breakdown"),
        ("--served --shape smollm2-135m", "cannot be served"),
        ("--served --concurrency none", "there is no load"),
    ],
)
def test_a_flag_of_the_other_kind_is_refused(flags: str, text: str) -> None:
    result = CliRunner().invoke(app, ["bench", "breakdown", *flags.split()])
    assert result.exit_code == 1 and text in result.stderr


def test_flags_of_the_engine_are_passed_on() -> None:
    flags = RunnerFlags(device="CPU", cpu_cores=1, async_scheduling=False, dequantize=True, compile_cache=False)
    assert given_flags(flags) == [
        *["--cpu-cores", "1", "--dequantize", "--no-compile-cache", "--device", "CPU", "--no-async-scheduling"],
    ]
    assert given_flags(RunnerFlags()) == []


def test_a_server_that_does_not_start_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(TinyvllmError, match="ended with code 1"), running_server("tiny", []):
        pass


def test_bytes_that_are_no_recordings_are_refused() -> None:
    with pytest.raises(ProfilingError, match="not recordings"):
        decode_recordings(b"\x01")


@pytest.mark.sweep  # by default, a server that runs
def test_the_command_starts_a_server_of_several_processes(tiny_hf_files: ModelFiles, tmp_path: Path) -> None:
    figures, trace = tmp_path / "served.json", tmp_path / "trace.json"
    flags = "--concurrency 2 --num-prompts 3 --tokens 3 --input-len 8 --api completions --max-num-batched-tokens 16"
    serve_flags = "--api-server-count 1 --max-num-seqs 2 --log-level warning"
    files = ["--serve-flags", serve_flags, "--json", str(figures), "--trace", str(trace)]
    result = CliRunner().invoke(
        app, ["bench", "breakdown", str(tiny_hf_files.path), "--served", *flags.split(), *files]
    )
    assert result.exit_code == 0, result.output
    [level] = json.loads(figures.read_text())["levels"]
    assert level["requests"] == 3 and {process["name"] for process in level["processes"]} >= {"engine 0", "front-end 0"}
    assert {"prefill", "decode", "hop", "hop back"} <= level["stages"].keys()
    events = json.loads(trace.read_text())["traceEvents"]
    rows = {event["args"]["name"].partition(" (")[0] for event in events if event["name"] == "process_name"}
    assert rows == {"engine 0", "engine 0, device", "front-end 0"}
