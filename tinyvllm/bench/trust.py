"""How far a figure can be trusted: what else the machine did while it was measured, and how much its repeats differ.

A grade is the worst of its parts, by LIMITS. With A, differences between two figures mean something from 2 % on; with
B, from 5 %; with C, from 15 %. D: measure again when the machine is quiet.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from tinyvllm.bench.estimate import Estimate

GRADES = "ABCD"
# The maximum of each for grades A, B and C: the 95 % confidence interval of the mean, relative to the mean; the share
# of all cores' time that other processes took, and that the hypervisor gave to other machines; the share of wall time
# in which the container's CPU quota stopped this process.
LIMITS = {
    "noise": (0.02, 0.05, 0.15),
    "others": (0.05, 0.15, 0.40),
    "stolen": (0.01, 0.03, 0.10),
    "throttled": (0.01, 0.03, 0.10),
}
UNKNOWN_NOISE = 2  # the index in GRADES for a figure that was measured once
WORDS = {
    "noise": "repeats differ by ± {:.0%}",
    "others": "other processes took {:.0%} of the cores",
    "stolen": "the hypervisor took {:.0%} of the cores",
    "throttled": "a quota stopped the process for {:.0%} of the time",
}
STAT, QUOTA_STAT = Path("/proc/stat"), Path("/sys/fs/cgroup/cpu.stat")


@dataclass(frozen=True)
class Trust:
    """A figure's grade. Shares are None where the system does not report them; `why` is empty for an A."""

    grade: str
    why: str
    noise_share: float | None
    others_share: float | None
    stolen_share: float | None
    throttled_share: float | None

    @property
    def doubt(self) -> str:
        """Why nothing should be concluded from the figure; empty if something may."""
        return f"the grade of trust is {self.grade}: {self.why}" if self.grade == GRADES[-1] else ""

    def as_json(self) -> dict[str, Any]:
        return {name: round(value, 4) if isinstance(value, float) else value for name, value in vars(self).items()}


@dataclass
class Clock:
    """Processor time in seconds since the start of the machine, of all cores together, and wall time."""

    wall_s: float
    own_s: float
    busy_s: float | None = None
    stolen_s: float | None = None
    throttled_s: float | None = None

    @classmethod
    def read(cls) -> Clock:
        own = os.times()
        clock = cls(time.perf_counter(), own.user + own.system + own.children_user + own.children_system)
        try:
            ticks = [int(word) for word in STAT.read_text().split("\n", 1)[0].split()[1:]]
        except (OSError, ValueError):  # macOS has no such file
            return clock
        hertz = os.sysconf("SC_CLK_TCK")
        user, nice, system, _, _, irq, softirq, stolen = ticks[:8]
        clock.busy_s = (user + nice + system + irq + softirq) / hertz
        clock.stolen_s = stolen / hertz
        clock.throttled_s = _throttled_s()
        return clock


def _throttled_s() -> float:
    """0 without a quota."""
    try:
        lines = QUOTA_STAT.read_text().splitlines()
    except OSError:
        return 0.0
    found = dict(line.split() for line in lines if len(line.split()) == 2)
    return int(found.get("throttled_usec", 0)) / 1e6


class ConditionsWatch:
    """What the machine did during the intervals of `with watch:`."""

    def __init__(self, num_cores: int | None = None) -> None:
        self._cores = num_cores or os.cpu_count() or 1
        self._spent = Clock(0.0, 0.0, 0.0, 0.0, 0.0)
        self._start: Clock | None = None

    def __enter__(self) -> Self:
        self._start = Clock.read()
        return self

    def __exit__(self, *error: object) -> None:
        start, end, spent = self._start, Clock.read(), self._spent
        assert start is not None
        for name, before in vars(start).items():
            after, so_far = getattr(end, name), getattr(spent, name)
            known = None not in (before, after, so_far)
            setattr(spent, name, so_far + after - before if known else None)

    def trust(self, estimate: Estimate, *, counts_others: bool = True) -> Trust:
        """The trust in a figure that was measured in these intervals. counts_others: whether the work of other
        processes disturbs it; not if it is the figure of another process."""
        spent = self._spent
        capacity_s = spent.wall_s * self._cores
        is_known = counts_others and spent.busy_s is not None
        others = max(0.0, (spent.busy_s or 0.0) - spent.own_s) if is_known else None
        return grade(
            estimate,
            others_share=_share(others, capacity_s),
            stolen_share=_share(spent.stolen_s, capacity_s),
            throttled_share=_share(spent.throttled_s, spent.wall_s),
        )


def _share(seconds: float | None, of_s: float) -> float | None:
    return None if seconds is None else seconds / of_s if of_s else 0.0


def grade(
    estimate: Estimate,
    *,
    others_share: float | None = None,
    stolen_share: float | None = None,
    throttled_share: float | None = None,
) -> Trust:
    """The grade of a figure. One that was measured once cannot be better than a C."""
    noise = estimate.margin / abs(estimate.value) if estimate.error and estimate.value else None
    shares = {"noise": noise, "others": others_share, "stolen": stolen_share, "throttled": throttled_share}
    places = {name: place_of(name, share) for name, share in shares.items() if share is not None}
    reasons = {name: WORDS[name].format(shares[name]) for name in places}
    if noise is None:
        places["noise"], reasons["noise"] = UNKNOWN_NOISE, "it was measured once"
    worst = max(places.values())
    why = "; ".join(reasons[name] for name, place in places.items() if place == worst) if worst else ""
    return Trust(GRADES[worst], why, noise, others_share, stolen_share, throttled_share)


def place_of(name: str, share: float) -> int:
    """The best index in GRADES that one part allows."""
    return sum(share > limit for limit in LIMITS[name])


def is_noisy(estimate: Estimate) -> bool:
    """Whether the noise makes the grade a C or worse, so that more repeats may improve it."""
    return bool(estimate.value) and place_of("noise", estimate.margin / abs(estimate.value)) >= GRADES.index("C")
