"""Where a run's CPU seconds went, by folder and file. A test's are those of its process since the test before it ended,
and of the children that ended meanwhile; fixtures that several tests share are the first one's."""

from __future__ import annotations

import os
from collections import defaultdict
from typing import Any

import pytest

NAME = "cpu_s"
NUM_FILES = 25


def used_s() -> float:
    """Of this process and of its children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


class CpuSeconds:
    """A plugin: notes each test's in its report, and where the slowest tests are asked for (--durations), says which
    folders and files they add up in."""

    def __init__(self) -> None:
        self._before_s = used_s()
        self._by_file: defaultdict[str, float] = defaultdict(float)

    @pytest.hookimpl(trylast=True)
    def pytest_collection_finish(self) -> None:
        self._before_s = used_s()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, call: pytest.CallInfo[None]) -> Any:
        report: pytest.TestReport = yield
        if call.when == "teardown":
            now_s = used_s()
            report.user_properties.append((NAME, now_s - self._before_s))
            self._before_s = now_s
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Also of tests that ran in another process."""
        if report.when == "teardown":
            noted = dict(report.user_properties).get(NAME)
            if isinstance(noted, float):
                self._by_file[report.nodeid.split("::")[0]] += noted

    def pytest_terminal_summary(self, terminalreporter: Any, config: pytest.Config) -> None:
        if config.option.durations is None:
            return
        folders: defaultdict[str, float] = defaultdict(float)
        for file, seconds in self._by_file.items():
            folders["/".join(file.split("/")[:2])] += seconds
        terminalreporter.section(f"CPU seconds: {sum(folders.values()):.0f}")
        for sums, count in ((folders, len(folders)), (self._by_file, NUM_FILES)):
            for place in sorted(sums, key=sums.__getitem__, reverse=True)[:count]:
                terminalreporter.line(f"{sums[place]:7.1f} {place}")
