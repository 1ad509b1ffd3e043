"""Numbers as a person reads them."""

from __future__ import annotations

import math


def rounded(value: float, digits: int = 3) -> str:
    """With `digits` significant digits, but all digits before the point: 4.61, 0.0131, 3,350."""
    if not value:
        return "0"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{decimals}f}"
