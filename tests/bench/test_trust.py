"""Grades of trust: what the machine did, how repeats differ, and which of them decides."""

from __future__ import annotations

from pathlib import Path

import pytest

from tinyvllm.bench import trust
from tinyvllm.bench.estimate import Estimate
from tinyvllm.bench.trust import GRADES, LIMITS, Clock, ConditionsWatch, grade, is_noisy

QUIET = {"others_share": 0.0, "stolen_share": 0.0, "throttled_share": 0.0}


def of_noise(share: float) -> Estimate:
    """A mean whose 95 % interval is ± share of it."""
    return Estimate(10.0, 10.0 * share / 1.96)


@pytest.mark.parametrize("name", LIMITS)
@pytest.mark.parametrize("place", range(3))
def test_each_part_alone_decides_the_grade_at_its_limits(name: str, place: int) -> None:
    limit = LIMITS[name][place]
    for share, wanted in ((limit * 0.99, place), (limit * 1.01, place + 1)):
        noise = of_noise(share if name == "noise" else 0.001)
        given = QUIET if name == "noise" else QUIET | {f"{name}_share": share}
        found = grade(noise, **given)
        assert found.grade == GRADES[wanted]
        assert bool(found.why) == (wanted > 0)


def test_a_single_measurement_is_at_best_a_c() -> None:
    found = grade(Estimate(5.0), **QUIET)
    assert (found.grade, found.why, found.noise_share) == ("C", "it was measured once", None)
    assert grade(Estimate(5.0), others_share=0.9).grade == "D"


def test_the_worst_parts_are_named() -> None:
    found = grade(of_noise(0.04), others_share=0.5, stolen_share=0.2)
    assert found.grade == "D"
    assert found.doubt == f"the grade of trust is D: {found.why}"
    assert found.why == "other processes took 50% of the cores; the hypervisor took 20% of the cores"


def test_only_noise_asks_for_more_repeats() -> None:
    assert not is_noisy(of_noise(0.049)) and is_noisy(of_noise(0.051)) and not is_noisy(Estimate(0.0, 1.0))


def test_a_watch_adds_up_its_intervals_and_leaves_out_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two cores for 10 s and 10 s: this process uses 12 s of 40, others 10, and the hypervisor 2."""
    clocks = iter(
        [
            Clock(0, 0, 100, 5, 1), Clock(10, 6, 110, 5, 1),
            Clock(50, 9, 150, 7, 2), Clock(60, 15, 162, 9, 4),
        ]
    )  # fmt: skip
    monkeypatch.setattr(Clock, "read", lambda: next(clocks))
    watch = ConditionsWatch(num_cores=2)
    for _ in range(2):
        with watch:
            pass
    found = watch.trust(of_noise(0.01))
    assert (found.others_share, found.stolen_share, found.throttled_share) == (10 / 40, 2 / 40, 2 / 20)
    assert found.grade == "C" and not found.doubt
    alone = watch.trust(of_noise(0.01), counts_others=False)  # what is measured is another process
    assert (alone.others_share, alone.stolen_share, alone.grade) == (None, 2 / 40, "C")


def test_the_clocks_of_this_machine_are_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stat, quota = tmp_path / "stat", tmp_path / "cpu.stat"
    stat.write_text("cpu  100 200 300 4000 50 6 4 80 0 0\ncpu0 1 2 3\n")
    quota.write_text("usage_usec 5\nthrottled_usec 1500000\n")
    monkeypatch.setattr(trust, "STAT", stat)
    monkeypatch.setattr(trust, "QUOTA_STAT", quota)
    monkeypatch.setattr("os.sysconf", lambda name: 100)
    clock = Clock.read()
    assert (clock.busy_s, clock.stolen_s, clock.throttled_s) == (6.1, 0.8, 1.5)
    monkeypatch.setattr(trust, "QUOTA_STAT", tmp_path / "none")
    assert Clock.read().throttled_s == 0.0
    monkeypatch.setattr(trust, "STAT", tmp_path / "none")
    watch = ConditionsWatch()
    with watch:
        assert Clock.read().busy_s is None
    assert watch.trust(of_noise(0.01)).others_share is None
