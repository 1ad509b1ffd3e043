"""Tests on METAL, simulated where there is none, in a process of their own: its DEV is METAL, and tinygrad reads its
settings once per process. That process is another pytest. It starts before the first test, and runs beside the tests of
other folders; with pytest-xdist the worker that was given these tests starts it, and the other workers run the rest.
What it reports is reported here. On a Mac, or with `-p tests.metal.plugin`, the tests run where they are."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.metal import plugin_name, reports_variable

IS_METAL = os.environ["DEV"].split(":")[0].upper() == "METAL"
if sys.platform == "darwin":
    # what is tested there is this folder's simulator, or needs its computer
    collect_ignore = [f"test_{name}.py" for name in ("simulator", "commands", "limits", "live_objects", "memory")]


def pytest_collection_finish(session: pytest.Session) -> None:
    is_worker = hasattr(session.config, "workerinput")  # pytest-xdist's, which collects tests that others run
    if not IS_METAL and not is_worker and not session.config.option.collectonly:
        start_process(session)


def start_process(session: pytest.Session, first: pytest.Item | None = None) -> None:
    """Start the other pytest with the tests of this folder, from `first` on."""
    wanted = [item.nodeid for item in session.items if item.path.is_relative_to(Path(__file__).parent)]
    wanted = wanted[wanted.index(first.nodeid) :] if first else wanted
    if wanted:
        session.stash[PROCESS] = MetalProcess(wanted, session.config)


@pytest.hookimpl(tryfirst=True)
def pytest_timeout_set_timer(item: pytest.Item) -> bool | None:
    """Set no limit here where the other process runs the test, and has its limit: this one may wait for it to start."""
    return None if IS_METAL or not item.path.is_relative_to(Path(__file__).parent) else True


def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    if IS_METAL or not item.path.is_relative_to(Path(__file__).parent):  # this hook is called for every test
        return None
    session = item.session
    if PROCESS not in session.stash:
        start_process(session, item)
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

    def __init__(self, node_ids: list[str], config: pytest.Config) -> None:
        read_end, write_end = os.pipe()
        self._output = tempfile.TemporaryFile("w+")  # noqa: SIM115  (closed in close)
        marks = config.option.markexpr  # they have been selected, but tests.sweeps must know whether this is the sweep
        command = [sys.executable, "-m", "pytest", "-p", plugin_name, "-m", marks, "-q", *node_ids]
        self._process = subprocess.Popen(
            command,
            cwd=config.rootpath,
            env=os.environ | {"DEV": "METAL", reports_variable: str(write_end)},
            pass_fds=[write_end],
            stdout=self._output,
            stderr=subprocess.STDOUT,
        )
        os.close(write_end)
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        # a pipe holds few reports: somebody must read while other tests run here
        self._reader = threading.Thread(target=self._read, args=(read_end,), daemon=True)
        self._reader.start()

    def _read(self, descriptor: int) -> None:
        with os.fdopen(descriptor) as lines:
            for line in lines:
                self._lines.put(line)
        self._lines.put("")  # the end

    def reports(self, item: pytest.Item) -> Iterator[pytest.TestReport]:
        """Those of one test: setup, call, teardown. A failure where the process ended before it."""
        while line := self._lines.get():
            data: dict[str, Any] = json.loads(line)
            report = pytest.TestReport._from_json(data)
            assert report.nodeid == item.nodeid, f"{report.nodeid} was reported, but {item.nodeid} is next"
            yield report
            if report.when == "teardown":
                return
        self._lines.put("")  # for the tests after this one
        self._process.wait()
        self._output.seek(0)
        tail = "".join(self._output.readlines()[-40:])
        message = f"the METAL tests' process ended with {self._process.returncode}:\n{tail}"
        yield pytest.TestReport(item.nodeid, item.location, {}, "failed", message, "call")

    def close(self) -> None:
        """End the process, should it still run."""
        if self._process.poll() is None:
            self._process.terminate()
        self._process.wait()
        self._reader.join()
        self._output.close()


PROCESS = pytest.StashKey[MetalProcess]()


@pytest.fixture(scope="session")
def simulator() -> Any:
    """The simulated computer's settings; None on a Mac."""
    from tests.metal.plugin import settings

    return settings
