"""`tinyvllm doctor` lists every check, and a remedy for each problem."""

from __future__ import annotations

import json
import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from tinyvllm.bench import doctor
from tinyvllm.bench.doctor import BAD, GOOD, ODD, Check
from tinyvllm.cli.commands import app
from tinyvllm.config import ModelFiles
from tinyvllm.device.program_limits import ProgramFacts

FLAGS = ["--max-num-seqs", "1", "--max-num-batched-tokens", "8", "--log-level", "error", "--json", "-"]


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["doctor", *arguments, *FLAGS])


def checks_of(result: Any) -> dict[str, dict[str, str]]:
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["ok"] == (result.exit_code == 0)
    return {check["name"]: check for check in found["checks"]}


def test_a_model_that_runs_is_looked_at_from_all_sides(tiny_gguf_files: ModelFiles) -> None:
    result = run(str(tiny_gguf_files.path))
    assert result.exit_code == 0, result.output
    checks = checks_of(result)
    assert list(checks) == [
        "tinyvllm", "tinygrad", "system", "compiler", "load", "model", "device", "weights", "KV cache", "start",
        "kernels", "fused kernels", "programs", "smoke",
    ]  # fmt: skip
    assert checks["weights"]["value"] == "qkv, attention_out, gate_up, down, embedding, head: Q4_1"
    assert checks["fused kernels"]["value"] == "cover every operation"
    assert checks["kernels"]["status"] == ODD and "tinyvllm tune" in checks["kernels"]["remedy"]
    assert "tok/s" in checks["smoke"]["value"] and "predicted" in checks["smoke"]["value"]
    assert all(check["remedy"] for check in checks.values() if check["status"] != GOOD)


def test_a_model_that_is_not_there_ends_the_list_with_how_to_get_it(tmp_path: Path) -> None:
    result = run(str(tmp_path / "nothing.gguf"))
    assert result.exit_code == 1
    checks = checks_of(result)
    assert list(checks)[-1] == "start" and checks["start"]["status"] == BAD
    assert "nothing.gguf" in checks["start"]["remedy"]


def test_a_checkout_that_is_not_installed_is_examined_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def requires(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(doctor, "requires", requires)
    own, tinygrad, *_ = doctor.software()
    assert own.name == "tinyvllm" and tinygrad.name == "tinygrad"


def test_another_tinygrad_than_ours_is_bad(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "version", lambda name: "0.1.0" if name == "tinygrad" else version(name))
    check = list(doctor.software())[1]
    assert (check.status, check.value) == (BAD, "0.1.0") and check.remedy.startswith("pip install tinygrad==")


def test_a_missing_compiler_and_a_busy_machine_are_worth_a_look(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    monkeypatch.setattr(os, "getloadavg", lambda: (1000.0, 0.0, 0.0))
    by_name = {check.name: check for check in doctor.machine()}
    assert by_name["compiler"].status == by_name["load"].status == ODD
    assert "no-such-compiler" in by_name["compiler"].value


def test_a_program_over_a_limit_is_named() -> None:
    class Inspector:
        runner = SimpleNamespace(device="METAL")

        def programs(self) -> list[ProgramFacts]:
            return [ProgramFacts("fine", 5, 32, 0), ProgramFacts("greedy", 40, 32, 0)]

    (check,) = doctor.programs(Inspector())  # type: ignore[arg-type]
    assert check.status == BAD and "greedy: 40 arguments, METAL has 31" in check.remedy and "fine" not in check.remedy


def test_json_is_ok_unless_something_is_bad() -> None:
    assert doctor.as_json([Check("a", GOOD, "x"), Check("b", ODD, "y", "z")])["ok"]
    assert not doctor.as_json([Check("a", BAD, "x", "y")])["ok"]
