"""A pytest plugin that makes METAL a device of the test process, simulated where there is none:
DEV=METAL python -m pytest -p tests.metal.plugin -m gpu tests/ops

It also hands reports on to the process that started this one (conftest.py), where there is such.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.metal import reports_variable

if TYPE_CHECKING:
    from tests.metal.simulator import Settings

CACHE = Path(__file__).parents[2] / ".pytest_cache" / "d" / "metal-simulator"

# A kernel is compiled by rewriting millions of small objects, hardly any of them in cycles: with Python's own 700 the
# collector takes a quarter of the time.
gc.set_threshold(200_000, 20, 1000)

settings: Settings | None = None
if sys.platform != "darwin":
    os.environ["DEV"] = "METAL"
    from tests.metal.simulator import install

    settings = install(CACHE)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if descriptor := os.environ.get(reports_variable):
        try:
            os.write(int(descriptor), (json.dumps(report._to_json()) + "\n").encode())
        except BrokenPipeError:  # the process that wanted the reports is gone
            os._exit(1)
