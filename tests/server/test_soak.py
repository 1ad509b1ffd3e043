"""Rough traffic leaves nothing behind, and a stop signal during it loses no answer silently.

The long test uses a real model with random weights, and prints its figures:

    pytest -m slow tests/server/test_soak.py -s
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.builders import write_tiny_hf_llama
from tests.server.soak import check_nothing_is_left, run_traffic, serving_process, stop_under_load

KINDS = {"complete", "streamed", "left in the middle", "left before an answer", "refused as bad"}


async def test_rough_traffic_leaves_nothing_behind(tmp_path: Path) -> None:
    model = tmp_path / "tiny.gguf"
    model.write_bytes(b"GGUF")  # the fake device does not read it
    with serving_process("fake", str(model), tmp_path / "log", "--async-scheduling") as process:
        figures = await run_traffic(process, num_requests=80, concurrency=32, has_grammar=True)
        check_nothing_is_left(figures)
        assert set(figures.outcomes) >= KINDS and sum(figures.outcomes.values()) == 80
        outcomes = await stop_under_load(process, concurrency=16)
    assert sum(outcomes.values()) == 16 and outcomes["complete"]
    assert "Traceback" not in (tmp_path / "log").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("flag", ["--no-async-scheduling", "--async-scheduling"])
async def test_two_thousand_rough_requests_leave_nothing_behind(tmp_path: Path, flag: str) -> None:
    model = write_tiny_hf_llama(tmp_path / "tiny")
    with serving_process("model", str(model.path), tmp_path / "log", flag) as process:
        figures = await run_traffic(process, num_requests=2000, concurrency=32, has_grammar=True)
        print(f"\n{figures.lines()}")
        check_nothing_is_left(figures)
        assert set(figures.outcomes) >= KINDS | {"refused as too many"} and sum(figures.outcomes.values()) == 2000
        _, first_quarter, *_, last = (report["rss_mib"] for report in figures.reports)
        assert last < first_quarter + 8, "memory grows"  # MiB: caches fill in the first quarter, then it is flat
        outcomes = await stop_under_load(process, concurrency=32)
        print(f"SIGTERM under load: {dict(outcomes)}")
    assert sum(outcomes.values()) == 32 and outcomes["complete"]
    assert "Traceback" not in (tmp_path / "log").read_text(encoding="utf-8")
