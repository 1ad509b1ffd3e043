"""`bench compare`, `diff`, `ledger` and `across` of files that are cut off, foreign or edited: a sentence, never a
traceback."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.bench.test_compare import make_run
from tests.sweeps import in_both, is_sweeping, length
from tinyvllm.cli.commands import app

COMMANDS = (("compare", "{}", "{}"), ("diff", "{}", "{}"), ("ledger", "{}"), ("across", "{}"))


def check(path: Path, commands: Sequence[tuple[str, ...]] = COMMANDS) -> None:
    for command in commands:
        result = CliRunner().invoke(app, ["bench", *(part.format(path) for part in command)])
        error = result.exception
        assert result.exit_code == 0 or isinstance(error, SystemExit), (path, command, repr(error))


@pytest.mark.parametrize(
    "text", ["", "null", "[]", "[null]", "{}", "[" * 100_000, "\ufeff{}", '[{"phase": 1, "tok_s": 2}]']
)
def test_what_is_not_a_result_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "result.json"
    path.write_text(text, encoding="utf-8")
    check(path)


@in_both
def test_what_has_no_end_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "device.json").symlink_to("/dev/zero")
    paths = (tmp_path / "pipe.json", tmp_path / "device.json", tmp_path, tmp_path / "missing.json")
    for number, path in enumerate(paths):
        check(path, COMMANDS if is_sweeping else COMMANDS[number : number + 1])


@in_both
def test_a_field_may_be_missing_or_of_another_type(tmp_path: Path) -> None:
    run = make_run()
    places = [(part, name) for part in (run, run["cases"][0], *parts(run["cases"][0])) for name in part]
    for number, (part, name) in enumerate(places[:: length(6, 1)]):
        kept: Any = part.pop(name)
        if number % 2:
            part[name] = {"a": 1} if isinstance(kept, float | int) else 7
        (path := tmp_path / f"{number}.json").write_text(json.dumps(run))
        check(path, (COMMANDS[number // 2 % 2],))  # in turn, each with fields that are missing and changed
        part[name] = kept


def parts(case: dict[str, Any]) -> list[dict[str, Any]]:
    return [case["tpot_s"], case["stages"], case["stages"]["decode"], case["per_step"], case["per_step"]["decode"]]
