"""The shell scripts: that they parse, and that the facts they repeat are those of the package."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tinyvllm.storage.catalog import DEFAULT_MODEL

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted([*ROOT.glob("scripts/*.sh"), ROOT / ".ci" / "run"])


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_script_parses(path: Path) -> None:
    result = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_scripts_fetch_the_default_model() -> None:
    match = re.search(
        r"^default_model=(\S+)$", (ROOT / "scripts" / "setup.sh").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert match is not None
    assert match[1] == DEFAULT_MODEL


def test_readme_names_only_files_that_exist() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"\b(?:scripts|docs|tests)/[\w/.]*\w\.\w+", text))
    assert named, "README.md names no file"
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []
