"""Cases that leave the default run, which has one of each kind: `pytest -m sweep` runs the others."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


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
