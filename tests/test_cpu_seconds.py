"""The report says where CPU seconds went."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tests.cpu_seconds import NAME, CpuSeconds, used_s


def ended(nodeid: str, when: str, *properties: tuple[str, object]) -> Any:
    return SimpleNamespace(nodeid=nodeid, when=when, user_properties=list(properties))


def test_a_test_has_what_its_process_used_since_the_one_before() -> None:
    plugin, reports = CpuSeconds(), []
    plugin.pytest_collection_finish()
    start_s = used_s()
    while used_s() < start_s + 0.05:
        sum(range(10_000))
    for when in ("setup", "call", "teardown"):
        wrapper = plugin.pytest_runtest_makereport(SimpleNamespace(when=when))  # type: ignore[arg-type]
        next(wrapper)
        with pytest.raises(StopIteration):
            wrapper.send(report := ended("tests/a/test_b.py::test_c", when))
        reports.append(report)
    assert [len(report.user_properties) for report in reports] == [0, 0, 1]
    assert dict(reports[-1].user_properties)[NAME] > 0.04


@pytest.mark.parametrize("durations", [None, 25])
def test_folders_and_files_are_shown_by_what_they_used_where_durations_are_asked_for(durations: int | None) -> None:
    plugin = CpuSeconds()
    lines: list[str] = []
    for nodeid, seconds in (
        ("tests/a/b/test_c.py::test_d[1]", 2.0),
        ("tests/a/test_e.py::test_f", 1.5),
        ("tests/g/h.py::i", 3.0),
    ):
        plugin.pytest_runtest_logreport(ended(nodeid, "call"))
        plugin.pytest_runtest_logreport(ended(nodeid, "teardown", ("other", "x"), (NAME, seconds)))
    plugin.pytest_runtest_logreport(ended("tests/g/h.py::skipped", "teardown"))
    reporter = SimpleNamespace(section=lines.append, line=lines.append)
    plugin.pytest_terminal_summary(reporter, SimpleNamespace(option=SimpleNamespace(durations=durations)))  # type: ignore[arg-type]
    expected = ["CPU seconds: 6", "3.5 tests/a", "3.0 tests/g", "3.0 tests/g/h.py", "2.0 tests/a/b/test_c.py"]
    assert [line.strip() for line in lines[:5]] == ([] if durations is None else expected)
