"""Tests on METAL, simulated where there is none, in a process of their own: its DEV is METAL, and tinygrad reads its
settings once a process. That process is another pytest, started with the first of these tests; what it reports is
reported here. On a Mac, or with `-p tests.metal.plugin`, the tests run where they are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.metal import plugin_name, reports_variable

IS_METAL = os.environ["DEV"].split(":")[0].upper() == "METAL"
if sys.platform == "darwin":
    # what is tested there is this folder's simulator, or needs its computer
    collect_ignore = ["test_simulator.py", "test_commands.py", "test_limits.py", "test_live_objects.py"]


def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    if IS_METAL or not item.path.is_relative_to(Path(__file__).parent):  # this hook is called for every test
        return None
    session = item.session
    if PROCESS not in session.stash:
        wanted = [other.nodeid for other in session.items if other.path.is_relative_to(Path(__file__).parent)]
        session.stash[PROCESS] = MetalProcess(wanted, str(session.config.rootpath))
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for report in session.stash[PROCESS].reports(item):
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


def pytest_sessionfinish(session: pytest.Session) -> None:
    if PROCESS in session.stash:
        session.stash[PROCESS].close()


class MetalProcess:
    """The other pytest. Owns the process and the pipe that its reports come through."""

    def __init__(self, node_ids: list[str], root: str) -> None:
        read_end, write_end = os.pipe()
        self._output = tempfile.TemporaryFile("w+")  # noqa: SIM115  (closed in close)
        command = [sys.executable, "-m", "pytest", "-p", plugin_name, "-m", "", "-q", *node_ids]
        self._process = subprocess.Popen(
            command,
            cwd=root,
            env=os.environ | {"DEV": "METAL", reports_variable: str(write_end)},
            pass_fds=[write_end],
            stdout=self._output,
            stderr=subprocess.STDOUT,
        )
        os.close(write_end)
        self._lines = os.fdopen(read_end)

    def reports(self, item: pytest.Item) -> Iterator[pytest.TestReport]:
        """Those of one test: setup, call, teardown. A failure where the process ended before it."""
        for line in self._lines:
            data: dict[str, Any] = json.loads(line)
            report = pytest.TestReport._from_json(data)
            assert report.nodeid == item.nodeid, f"{report.nodeid} was reported, but {item.nodeid} is next"
            yield report
            if report.when == "teardown":
                return
        self._process.wait()
        self._output.seek(0)
        tail = "".join(self._output.readlines()[-40:])
        message = f"the METAL tests' process ended with {self._process.returncode}:\n{tail}"
        yield pytest.TestReport(item.nodeid, item.location, {}, "failed", message, "call")

    def close(self) -> None:
        """End the process, should it still run."""
        self._lines.close()
        if self._process.poll() is None:
            self._process.terminate()
        self._process.wait()
        self._output.close()


PROCESS = pytest.StashKey[MetalProcess]()


@pytest.fixture(scope="session")
def simulator() -> Any:
    """The simulated computer's settings; None on a Mac."""
    from tests.metal.plugin import settings

    return settings
