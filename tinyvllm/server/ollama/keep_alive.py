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


def read_duration(value: object) -> object:
    """Seconds; infinite for a negative duration, which means forever; None for null, which means the server's default.

    Accepts a number of seconds, also as a string, and Go's durations: "5m", "1h30m", "300ms".
    """
    if value is None:
        return None
    if isinstance(value, str) and len(value) <= MAX_CHARS:
        text = value.strip()
        if _DURATION.fullmatch(text):
            seconds = sum(float(number) * _UNITS[unit] for number, unit in _PARTS.findall(text))
            return math.inf if text.startswith("-") else seconds
        with contextlib.suppress(ValueError):
            value = float(text)
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        raise ValueError('give a number of seconds, or a duration such as "5m" or "1h30m"; -1: forever')
    return math.inf if value < 0 else float(value)


KeepAlive = Annotated[float | None, BeforeValidator(read_duration, json_schema_input_type=str | float | None)]
