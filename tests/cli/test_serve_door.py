"""`tinyvllm serve` with several models: its flags, its TOML file, and its processes when the door is killed."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.builders import write_byte_tokenizer
from tests.server.test_control import wait_until_gone
from tinyvllm.cli.door_flags import DoorFlags, split_name
from tinyvllm.cli.flags import EngineFlags
from tinyvllm.cli.server_flags import ProcessFlags
from tinyvllm.config import SpeculativeConfig
from tinyvllm.door.settings import DoorSettings
from tinyvllm.errors import TinyvllmError

ROOT = Path(__file__).parents[2]

# The command line, whose models have a fake device.
PROGRAM = """
import functools
from tinyvllm.cli import main
from tinyvllm.door import fleet

fleet.Plan = functools.partial(
    fleet.Plan, examine="tests.door.fake_models:examine", load="tests.door.fake_models:load"
)
main()
"""
TOML = """
keep-alive = "10m"
max_loaded = 1

[[models]]
model = "{0}/a.gguf"
name = "first"
aliases = ["gpt"]
keep_alive = -1
max_model_len = 128
gpu_memory_utilization = 0.25
device = "CPU:1"

[[models]]
model = "{0}/b.gguf"
"""


@pytest.fixture
def files(tmp_path: Path) -> Path:
    for name in "ab":
        (tmp_path / f"{name}.gguf").write_bytes(b"GGUF")
    (tmp_path / "models.toml").write_text(TOML.format(tmp_path))
    return tmp_path


def settings_of(*models: str, names: tuple[str, ...] = (), **flags: Any) -> DoorSettings:
    assert DoorFlags(**flags).applies(models) or names
    return DoorFlags(**flags).settings(models, names, EngineFlags(max_num_seqs=3, seed=7), 0)


def test_flags_and_tables_become_settings(files: Path) -> None:
    found = settings_of(config=str(files / "models.toml"))
    first, second = found.models
    assert (first.names, second.names) == (("first", "gpt"), ("b",))
    assert (found.keep_alive_s, found.max_loaded, found.num_slots) == (600.0, 1, 1)
    assert (first.keep_alive_s, found.keep_alive_of(second)) == (math.inf, 600.0)
    assert (first.memory_share, first.environment, second.memory_share) == (0.25, {"DEV": "CPU:1"}, None)
    assert (first.config.max_model_len, first.config.served_model_name) == (128, "first")
    assert [(model.config.seed, model.config.max_num_seqs) for model in found.models] == [(7, 3)] * 2

    drafting = files / "drafts.toml"
    tables = f"[[models]]\nmodel='{files}/a.gguf'\n[models.speculative-config]\nnum-speculative-tokens=3\n"
    drafting.write_text(f"{tables}[[models]]\nmodel='{files}/b.gguf'\nspeculative_config='{{}}'")
    wanted = [model.config.speculative_config for model in settings_of(config=str(drafting)).models]
    assert wanted == [SpeculativeConfig(num_speculative_tokens=3), SpeculativeConfig()]

    a, b = str(files / "a.gguf"), str(files / "b.gguf")
    given = settings_of(f"x={a}", b, keep_alive="90s", max_loaded=2, load_timeout=5.0, pin=["b"])
    assert [(model.name, model.pinned) for model in given.models] == [("x", False), ("b", True)]
    assert (given.keep_alive_s, given.load_timeout_s) == (90.0, 5.0)
    assert settings_of(a, names=("x", "y")).models[0].names == ("x", "y")
    more = settings_of(b.replace("b.gguf", "a.gguf"), config=str(files / "models.toml"), keep_alive="0")
    assert [model.name for model in more.models] == ["first", "b", "a"] and more.keep_alive_s == 0.0


def test_a_name_is_told_from_a_path(tmp_path: Path) -> None:
    assert split_name("A=b/c") == ("A", "b/c") and split_name("b/c") == (None, "b/c")
    assert split_name("/x/y=z/model.gguf") == (None, "/x/y=z/model.gguf")


def test_what_is_wrong_is_named(files: Path) -> None:
    a, b, file = str(files / "a.gguf"), str(files / "b.gguf"), files / "bad.toml"
    for text, expected in (
        ("models = 1", "has no models"),
        ("[[models]]\nmodel='x'\nspeed=1", "unknown key 'speed': the keys are model, name, aliases, pinned"),
        ("port=1\n[[models]]\nmodel='x'", "unknown key 'port'"),
        ("[[models]]\nname='x'", "no key 'model'"),
        (f"[[models]]\nmodel='{a}'\nmax_num_seqs='many'", "max_num_seqs is 'many'"),
        (f"[[models]]\nmodel='{a}'\nkeep_alive='soon'", "keep_alive is 'soon'"),
        (f"[[models]]\nmodel='{a}'\nblock_size=7", "--block-size is 7"),
        (f"[[models]]\nmodel='{a}'\ngpu_memory_utilization=7", "--gpu-memory-utilization is 7"),
        ("[[models", "cannot be read"),
    ):
        file.write_text(text)
        with pytest.raises(TinyvllmError, match=expected):
            settings_of(config=str(file))
    for models, flags, expected in (
        ((a, a), {}, "two models have the name 'a'"),
        ((a, f"a:latest={b}"), {}, "two models have the name 'a:latest'"),
        ((a, b), {"max_loaded": 0}, "--max-loaded is 0"),
        ((a, b), {"pin": ["c"]}, "--pin names c"),
        ((a, b), {"pin": ["a"], "max_loaded": 1}, "leaves no room for the others"),
        ((a, b), {"keep_alive": "soon"}, "keep_alive is 'soon'"),
        ((a, b), {"names": ("x",)}, "write NAME=MODEL"),
        (("nobody", b), {}, "nobody"),
    ):
        with pytest.raises(TinyvllmError, match=expected):
            settings_of(*models, **flags)
    with pytest.raises(TinyvllmError, match="--data-parallel-size"):
        ProcessFlags(data_parallel_size=2).num_front_ends_each()


def test_an_adapter_belongs_to_one_model(files: Path) -> None:
    a, b = str(files / "a.gguf"), str(files / "b.gguf")

    def settings(*modules: str) -> DoorSettings:
        return DoorFlags().settings((a, b), (), EngineFlags(enable_lora=True, lora_modules=list(modules)), 0)

    module = '{"name": "sql", "path": "/x", "base_model_name": "b"}'
    found = settings(module)
    assert [model.adapters for model in found.models] == [(), ("sql",)]
    owner = found.find("sql:latest")
    assert owner is not None and owner.name == "b" and found.find("nobody") is None
    with pytest.raises(TinyvllmError, match=r"does not say which of a, b 'sql' belongs to: give '\{"):
        settings("sql=/x")
    with pytest.raises(TinyvllmError, match="belongs to 'c', which is not served: give one of a, b"):
        settings(module.replace('"b"', '"c"'))
    with pytest.raises(TinyvllmError, match="two models have the name 'a'"):
        settings(module.replace("sql", "a"))


@pytest.mark.sweep  # by default, with one model and a compiler: tests/server/test_ends.py
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc to see which process has ended")
def test_every_process_ends_with_a_door_that_is_killed(files: Path) -> None:
    a, b = str(files / "a.gguf"), files / "b"
    b.mkdir()
    write_byte_tokenizer(b)  # which front-ends read by themselves
    (b / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "serve", a, f"two={b}", "--port", "0", "--api-server-count", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    ) as door:
        try:
            assert door.stdout is not None and door.stderr is not None
            greeting = door.stdout.readline()
            assert greeting.startswith("a, two are served on http://")
            url = greeting.split("served on ")[1].split(";")[0].split()[0]
            body = {"model": "two", "prompt": "x", "max_tokens": 3}
            assert httpx.post(f"{url}/v1/completions", json=body).json()["model"] == "two"
            below = descendants(door.pid)
            assert len(below) >= 3  # the model's supervisor, its engine and its front-end
            door.kill()
            log = door.communicate()[1]
        finally:
            door.kill()
    wait_until_gone(below)
    assert " INFO two front-end 0: " in log and " INFO two: loaded in " in log


def descendants(pid: int) -> list[int]:
    children = [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [each for child in children for each in (child, *descendants(child))]


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
