"""How large a regular expression is when its counted repetitions are written out, without compiling it."""

from __future__ import annotations

import re

MAX_SIZE = 50_000  # characters and classes; the compiler takes 0.1 s for so many, and each mask up to 10 ms

_PART = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\{(?P<low>\d*)(?P<upper>,(?P<high>\d*))?\}|.", re.DOTALL)
_MAX_DIGITS = 9  # of a count; the compiler refuses longer ones


def expanded_size(expression: str) -> int:
    """The number of characters and classes in the expression if `a{3}` is written as `aaa`. Never raises: parts that do
    not parse count as characters, because the compiler refuses them."""
    groups = [0]  # the sizes of the open groups so far, outermost first
    last = 0  # of the part that a repetition would apply to
    for found in _PART.finditer(expression):
        part = found[0]
        if part == "(":
            groups.append(0)
            last = 0
        elif part == ")" and len(groups) > 1:
            last = groups.pop()
            groups[-1] += last
        elif found["low"] or found["high"]:
            count = max(_count(found["low"]), _count(found["high"] or ""))
            groups[-1] += last * (count - 1)
            last *= count
        elif part not in "*+?|":
            last = 1
            groups[-1] += 1
    return sum(groups)


def _count(digits: str) -> int:
    return int(digits[: _MAX_DIGITS + 1] or 0)
