"""`tinyvllm serve` with engines and front-ends in processes of their own, from its flags to its exit code."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.builders import write_byte_tokenizer
from tests.forking import forked
from tests.server.fake_load import ANSWER
from tinyvllm.cli import server_flags
from tinyvllm.cli.server_flags import ProcessFlags, default_front_ends
from tinyvllm.config import CORES_VARIABLE, EngineConfig
from tinyvllm.errors import TinyvllmError
from tinyvllm.server.engine_placement import place_engines

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc to see which process did what")

ROOT = Path(__file__).parents[2]

# The command line, whose engines have a fake device. Its processes are forked: tests/server/test_supervisor.py has real
# ones.
PROGRAM = """
import functools
from tests.forking import fork_children
from tinyvllm.cli import main
from tinyvllm.server import supervisor

fork_children()
supervisor.ServePlan = functools.partial(supervisor.ServePlan, load="tests.server.fake_load:answering")
main()
"""


@contextlib.contextmanager
def serving(model: Path, *flags: str) -> Iterator[tuple[subprocess.Popen[str], list[str]]]:
    """The process, and the two lines with which it greets."""
    write_byte_tokenizer(model)
    (model / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with forked(
        PROGRAM,
        ["serve", str(model), "--port", "0", *flags],
        {**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
    ) as process:
        try:
            assert process.stdout is not None
            yield process, [process.stdout.readline(), process.stdout.readline()]
        finally:
            process.kill()


def test_it_greets_answers_logs_records_and_stops_cleanly(tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    model = tmp_path / "model"
    model.mkdir()
    with serving(model, "--api-server-count", "2", "--trace", str(trace)) as (process, (greeting, curl)):
        assert "model is served on http://127.0.0.1:" in greeting
        words = shlex.split(curl)
        answers = [httpx.post(words[1], json=json.loads(words[-1])).json() for _ in range(4)]
        assert {answer["choices"][0]["message"]["content"] for answer in answers} == {ANSWER}
        process.send_signal(signal.SIGTERM)
        log = process.communicate()[1]
        assert process.returncode == 0, log
    for name in ("front-end 0", "front-end 1"):
        assert any(f" INFO {name}: [" in line and "POST /v1/chat/completions" in line for line in log.splitlines())
    rows = [event["args"]["name"] for event in json.loads(trace.read_text())["traceEvents"] if event["ph"] == "M"]
    assert {"engine 0", "front-end 0", "front-end 1"} <= {row.partition(" (")[0] for row in rows}


@pytest.mark.sweep  # tests/server/test_supervisor.py has the death and its message
def test_a_dead_engine_is_an_error_of_the_command(tmp_path: Path) -> None:
    with serving(tmp_path, "--api-server-count", "1") as (process, (greeting, _)):
        text = httpx.get(greeting.split("served on ")[1].split()[0] + "/metrics").text
        assert 'process="engine 0"' in text
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[0]), signal.SIGKILL)  # engines are started first
        log = process.communicate()[1]
        assert process.returncode == 1
        assert "error: engine 0 was killed by SIGKILL" in log.splitlines()[-1]


# ---- Flags ----


@pytest.mark.parametrize(
    ("num_cores", "expected"), [(1, 0), (2, 0), (4, 0), (5, 1), (8, 2), (12, 3), (16, 4), (192, 4)]
)
def test_front_ends_follow_the_cores(num_cores: int, expected: int) -> None:
    assert default_front_ends(num_cores) == expected


def test_replicas_and_restarts_need_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_flags, "usable_cores", lambda: 2)
    assert ProcessFlags().num_front_ends() == 0
    assert ProcessFlags(data_parallel_size=2).num_front_ends() == 1
    assert ProcessFlags(restart_engine=True).num_front_ends() == 1
    assert ProcessFlags(api_server_count=3).num_front_ends() == 3
    for flags, name in (
        (ProcessFlags(api_server_count=0, data_parallel_size=2), "--data-parallel-size"),
        (ProcessFlags(api_server_count=0, restart_engine=True), "--restart-engine"),
        (ProcessFlags(api_server_count=-1), "--api-server-count"),
        (ProcessFlags(data_parallel_size=0), "--data-parallel-size"),
    ):
        with pytest.raises(TinyvllmError, match=name):
            flags.num_front_ends()


def test_each_engine_gets_a_device_or_a_share(monkeypatch: pytest.MonkeyPatch) -> None:
    config = EngineConfig("tiny")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    gpus = place_engines(config, 2, "CUDA")
    assert [place.environment for place in gpus] == [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in "35"]
    assert place_engines(config, 1, "CUDA")[0].environment == {}
    monkeypatch.delenv(CORES_VARIABLE, raising=False)  # which parallel workers set
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3}, raising=False)
    one, two = place_engines(config, 2, "CPU")
    assert (one.cores, two.cores) == ((0, 1), (2, 3)) and one.config.cpu_cores == 2
    assert one.config.gpu_memory_utilization == 0.25  # of memory that both take at the same time
    assert place_engines(config, 2, "METAL")[1].config.gpu_memory_utilization == 0.4


def test_engines_take_only_gpus_that_are_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    config = EngineConfig("tiny")
    for value in ("1", "3,", ""):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
        with pytest.raises(TinyvllmError, match=f"CUDA_VISIBLE_DEVICES='{value}' .* 2 engines: .*--data-parallel-size"):
            place_engines(config, 2, "CUDA")
    for value, expected in (("1,1", "11"), ("4, 2,0", "42")):  # two engines may share a GPU
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
        places = place_engines(config, 2, "CUDA")
        assert [place.environment for place in places] == [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in expected]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert [place.environment["CUDA_VISIBLE_DEVICES"] for place in place_engines(config, 2, "CUDA")] == ["0", "1"]
