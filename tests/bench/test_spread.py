"""Statistics of repeats: against NumPy's."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyvllm.bench.spread import Spread, percentile

VALUES = st.lists(st.floats(0, 1e6), min_size=1, max_size=50)


@given(VALUES, st.floats(0, 100))
def test_percentile_interpolates_as_numpy_does(values: list[float], percent: float) -> None:
    assert percentile(values, percent) == pytest.approx(np.percentile(values, percent))


def test_percentile_lies_between_two_values() -> None:
    assert percentile([1.0, 2.0, 3.0, 4.0], 95) == pytest.approx(3.85)


@given(VALUES)
def test_spread_has_the_sample_deviation(values: list[float]) -> None:
    spread = Spread.of(values)
    assert spread.count == len(values) and spread.min == min(values)
    assert spread.mean == pytest.approx(np.mean(values)) and spread.median == pytest.approx(np.median(values))
    assert spread.std == pytest.approx(np.std(values, ddof=1) if len(values) > 1 else 0.0, abs=1e-6)
    assert (spread.p95, spread.p99) == pytest.approx((np.percentile(values, 95), np.percentile(values, 99)))


def test_no_values_have_no_percentile() -> None:
    with pytest.raises(ValueError, match="at least one value"):
        percentile([], 50)
