"""`keep_alive`: how long a model stays loaded after a request. A number of seconds, or a duration as Go writes it."""

from __future__ import annotations

import contextlib
import math
import re
from typing import Annotated

from pydantic import BeforeValidator

_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_PART = r"(\d+(?:\.\d*)?|\.\d+)(ns|us|µs|μs|ms|s|m|h)"
_DURATION = re.compile(rf"[+-]?(?:{_PART})+")
_PARTS = re.compile(_PART)
MAX_CHARS = 100
FOREVER_S = 2**63 / 1e9  # Go's longest duration, 292 years


def read_duration(value: object) -> object:
    """Seconds. Infinite for a negative duration, which means forever, and for more than Go can count. None for null,
    which means the server's default.

    Accepts a number of seconds, also as a string, and Go's durations: "5m", "1h30m", "300ms".
    """
    if value is None:
        return None
    if isinstance(value, str) and len(value) <= MAX_CHARS:
        text = value.strip()
        if _DURATION.fullmatch(text):
            seconds = sum(float(number) * _UNITS[unit] for number, unit in _PARTS.findall(text))
            return _in_reach(-seconds if text.startswith("-") else seconds)
        with contextlib.suppress(ValueError):
            value = float(text)
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
        raise ValueError('give a number of seconds, or a duration such as "5m" or "1h30m"; -1: forever')
    return _in_reach(value)


def _in_reach(seconds: float) -> float:
    """Compared before it is converted, because an int of 400 digits does not fit into a float."""
    return float(seconds) if 0 <= seconds <= FOREVER_S else math.inf


KeepAlive = Annotated[float | None, BeforeValidator(read_duration, json_schema_input_type=str | float | None)]
