"""Repeated measurements, summarized."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    """Statistics of `count` values, in their unit. `std`: sample standard deviation (count - 1), 0 for one value."""

    count: int
    mean: float
    std: float
    median: float
    min: float
    p95: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Raises ValueError if there are no values."""
        return cls(
            count=len(values),
            mean=statistics.fmean(values),
            std=statistics.stdev(values) if len(values) > 1 else 0.0,
            median=statistics.median(values),
            min=min(values),
            p95=percentile(values, 95),
            p99=percentile(values, 99),
        )


def percentile(values: Sequence[float], percent: float) -> float:
    """The value that `percent` of the values lie below. Interpolates linearly between neighbors, like NumPy."""
    if not values:
        raise ValueError("a percentile needs at least one value")
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)
