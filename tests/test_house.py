"""The maximum length of functions, and the script that prints the rooms."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

from tests.house import PACKAGE, ROOT, Function, read_package

MAX_FUNCTION_LINES = 60
# Longer functions, and why they are. An entry must be removed when its function becomes short enough.
LONG_FUNCTIONS: dict[str, str] = {}


def test_no_function_is_longer_than_a_screen() -> None:
    lengths = {
        f"{module.path}:{function.name}": function.num_lines
        for module in read_package()
        for function in module.functions
    }
    long = {name: length for name, length in lengths.items() if length > MAX_FUNCTION_LINES}
    unknown = {name: length for name, length in long.items() if name not in LONG_FUNCTIONS}
    assert not unknown, f"split these functions: {unknown}"
    stale = LONG_FUNCTIONS.keys() - long.keys()
    assert not stale, f"short enough now, or gone: remove these from LONG_FUNCTIONS: {stale}"


def test_the_length_of_a_function_includes_nested_ones(tmp_path: Path) -> None:
    source = "class A:\n    @property\n    def f(self):\n        def g():\n            return 1\n        return g\n"
    (tmp_path / "a.py").write_text(source)
    [module] = read_package(tmp_path)
    assert module.functions == (Function("A.f", 4), Function("A.f.g", 2))


def test_the_script_prints_every_file_in_one_room(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = str(ROOT / "scripts" / "house.py")

    def printed(*arguments: str) -> str:
        """In this process, which has read the package."""
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        runpy.run_path(script, run_name="__main__")
        return capsys.readouterr().out

    house = json.loads(printed("--json", "--functions", "3"))
    rooms = {room["room"]: room for room in house["rooms"]}
    files = [path for room in rooms.values() for path in room["files"]]
    assert sorted(files) == sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))
    assert "scheduling" in rooms["engine"]["imports"] and rooms["errors"]["imports"] == []
    assert [function["lines"] for function in house["functions"]] == sorted(
        (function["lines"] for function in house["functions"]), reverse=True
    )
    plain = printed("--functions", "3")
    assert f"{len(rooms)} rooms, {len(files)} files" in plain
    assert house["functions"][2]["function"] in plain
