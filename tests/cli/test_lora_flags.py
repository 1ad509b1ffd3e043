"""The flags of adapters, and what is wrong with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.adapters import write_adapter
from tests.builders import TinyLlama
from tinyvllm.cli.flags import EngineFlags, TerminalEngineFlags
from tinyvllm.config import EngineConfig, LoraModule
from tinyvllm.errors import TinyvllmError


def test_modules_are_given_as_names_and_paths_or_as_json() -> None:
    given = ["sql=/a=b", '{"name": "poet", "path": "/c", "base_model_name": "m"}']
    config = EngineFlags(enable_lora=True, lora_modules=given, max_loras=2).make_config("m")
    assert config.lora_modules == (LoraModule("sql", "/a=b"), LoraModule("poet", "/c", "m"))
    assert (config.max_loras, config.max_lora_rank, config.max_cpu_loras) == (2, 16, None)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"lora_modules": ["sql=/a"]}, "names 'sql', but adapters are off: give --enable-lora"),
        ({"enable_lora": True, "lora_modules": ["sql"]}, "give name=path, or an object"),
        ({"max_loras": 2}, "--max-loras is 2, but adapters are off: give --enable-lora"),
        ({"max_lora_rank": 32}, "--max-lora-rank is 32, but adapters are off"),
        ({"max_cpu_loras": 2}, "--max-cpu-loras is 2, but adapters are off"),
        ({"enable_lora": True, "lora_modules": ["a,b=c"]}, "names 'a,b', which has a comma"),
        ({"enable_lora": True, "lora_modules": ["{"]}, "--lora-modules is not JSON"),
        ({"enable_lora": True, "lora_modules": ['{"name": ' + "[" * 100_000]}, "--lora-modules is not JSON"),
        ({"enable_lora": True, "lora_modules": ['{"name": "a", "path": "b", "rank": 1}']}, "unknown key 'rank'"),
        ({"enable_lora": True, "lora_modules": ["a=b", "a=c"]}, "names 'a' twice"),
        ({"enable_lora": True, "max_lora_rank": 12}, "--max-lora-rank is 12: choose one of 8, 16, 32"),
        ({"enable_lora": True, "max_loras": 0}, "--max-loras is 0"),
        (
            {"enable_lora": True, "max_loras": 3, "max_cpu_loras": 2},
            r"--max-cpu-loras is 2: give at least --max-loras \(3\)",
        ),
    ],
)
def test_what_is_wrong_is_named(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(TinyvllmError, match=message):
        EngineFlags(**flags).make_config("m")


def test_no_adapter_has_the_name_of_the_model() -> None:
    with pytest.raises(TinyvllmError, match="names 'm', which is the model's own name"):
        EngineFlags(enable_lora=True, lora_modules=["m=/a"]).make_config("path", served_model_name="m")


def test_the_terminal_s_adapter_has_slots_of_its_rank(tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "mine", TinyLlama(), ("q_proj",), 4, ranks={"q_proj": 20})
    config = TerminalEngineFlags(lora=str(path)).make_config("m")
    assert config == EngineConfig(
        "m", enable_lora=True, lora_modules=(LoraModule("mine", str(path)),), max_lora_rank=32
    )
    assert TerminalEngineFlags(lora=str(path), max_lora_rank=64).make_config("m").max_lora_rank == 64
    with pytest.raises(TinyvllmError, match="is not a directory"):
        TerminalEngineFlags(lora=str(tmp_path / "absent")).make_config("m")
