"""A mean with its uncertainty, and whether two of them differ by more than noise (Welch 1947, Biometrika 34)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tinyvllm.bench.spread import Spread

# Student's t for 95 %, two-sided, by degrees of freedom from 1; beyond the last, the normal distribution's.
T_95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13)
T_NORMAL = 1.96


@dataclass(frozen=True)
class Estimate:
    """`error`: one standard error of `value`; 0 if unknown, as for a single measurement. `freedom`: its degrees of
    freedom."""

    value: float
    error: float = 0.0
    freedom: float = math.inf

    @classmethod
    def of_spread(cls, spread: Mapping[str, Any], scale: float = 1.0) -> Estimate:
        """Of a spread's JSON (mean, std, count), in units of 1 / scale."""
        count = spread["count"]
        if count < 2:
            return cls(spread["mean"] * scale)
        return cls(spread["mean"] * scale, spread["std"] * scale / math.sqrt(count), count - 1)

    @classmethod
    def of_values(cls, values: Sequence[float]) -> Estimate:
        """Of repeated measurements."""
        spread = Spread.of(values)
        return cls.of_spread({"mean": spread.mean, "std": spread.std, "count": spread.count})

    @property
    def margin(self) -> float:
        """Half of the 95 % confidence interval."""
        return t_95(self.freedom) * self.error

    def at_least_as_unsure_as(self, other: Estimate) -> Estimate:
        """This value, with the wider of both intervals."""
        if other.margin <= self.margin:
            return self
        return Estimate(self.value, other.error, other.freedom)


def t_95(freedom: float) -> float:
    """How many standard errors a mean is off by chance in 5 % of all cases (two-sided)."""
    place = math.floor(min(freedom, 1e9))
    return T_95[max(1, place) - 1] if place <= len(T_95) else T_NORMAL


def noise(before: Estimate, after: Estimate) -> float:
    """The difference that chance alone would exceed in 5 % of all cases, with Welch and Satterthwaite's degrees of
    freedom."""
    one, two = before.error**2, after.error**2
    if one + two == 0:
        return 0.0
    weights = one**2 / before.freedom + two**2 / after.freedom
    freedom = (one + two) ** 2 / weights if weights else math.inf
    return t_95(freedom) * math.sqrt(one + two)
