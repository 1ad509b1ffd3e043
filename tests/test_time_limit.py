"""The time limit of tests ends what it cannot fail."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent

HANG = """
import signal, time

def test_that_hangs():
    signal.signal(signal.SIGALRM, signal.SIG_IGN)  # the limit's own
    time.sleep(600)
"""

RUN = """
import sys
import tests.conftest as conftest
import pytest

conftest.GRACE_S = 0.5
sys.exit(pytest.main(sys.argv[1:], plugins=[conftest]))
"""


def test_a_call_that_never_returns_ends_the_run_and_shows_where(tmp_path: Path) -> None:
    path = tmp_path / "test_hang.py"
    path.write_text(HANG, encoding="utf-8")
    options = ["-c", "pyproject.toml", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning"]
    command = [sys.executable, "-c", RUN, str(path), "--timeout", "0.5", *options]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "Timeout (0:00:01)!" in result.stderr
    assert "in test_that_hangs" in result.stderr


def test_a_worker_that_dies_fails_its_test_and_the_run_goes_on_to_its_end(tmp_path: Path) -> None:
    for number in range(6):
        (tmp_path / f"test_{number}.py").write_text("def test_one(): pass\ndef test_two(): pass\n", encoding="utf-8")
    dies = "import os, time\ndef test_dies():\n    time.sleep(1)  # the other does the rest\n    os._exit(3)\n"
    (tmp_path / "test_6.py").write_text(dies, encoding="utf-8")
    options = ["-c", "pyproject.toml", "-p", "no:cacheprovider", "-W", "ignore", "-n", "2", "-q"]
    command = [sys.executable, "-c", RUN, str(tmp_path), *options]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "1 failed, 12 passed" in result.stdout and "test_6.py::test_dies" in result.stdout, result.stdout
