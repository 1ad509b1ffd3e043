"""Cases that leave the default run, which has one of each kind: `pytest -m sweep` runs the others."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any

import hypothesis
import pytest

is_sweeping = False  # set by conftest.py: the run's -m does not leave the sweep out


def examples(default: int, full: int) -> Callable[[Any], Any]:
    """The number of random examples of a test: `default` ones in the default run, `full` in the sweep."""

    def decorate(test: Any) -> Any:
        if is_sweeping:
            return pytest.mark.sweep(hypothesis.settings(max_examples=full)(test))
        return hypothesis.settings(max_examples=default)(test)

    return decorate


def length(default: int, full: int) -> int:
    """How long a test's random traffic is: `full` in the sweep, which has all cases of such a test (`in_both`)."""
    return full if is_sweeping else default


def in_both(test: Any) -> Any:
    """Leave no case of the test out of the sweep, where it goes on for longer."""
    return pytest.mark.sweep(test) if is_sweeping else test


def swept(cases: Iterable[Any], default: Collection[Any]) -> list[Any]:
    """All of the cases as parameters, a tuple for several. `default` has one of each kind; the others are swept."""
    every = [*cases]
    missing = [case for case in default if case not in every]
    assert not missing, f"the default has a case that does not exist: {missing}"
    return [
        pytest.param(
            *(case if isinstance(case, tuple) else (case,)), marks=() if case in default else pytest.mark.sweep
        )
        for case in every
    ]
