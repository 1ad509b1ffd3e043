"""Whether a regular expression of a model's tokenizer may take the library's engine (Oniguruma) too long, or too much
memory.

It backtracks: repeats of repeats (`(a+)+`) take exponential time, a few repeats in a row polynomial time, and counted
repeats of counted repeats (`(a{999}){999}`) expand to a program of their product. The patterns that split words for
language models have none of these.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

MAX_PATTERN = 8192  # characters; the longest known pattern has 500
MAX_DEPTH = 16  # of groups and of sets in sets
MAX_REPEATS = 1000  # of counted repeats, multiplied where they are nested
MAX_LOOPS = 8  # unbounded repeats in one alternative; the most known are 5
COUNT = re.compile(r"\{(\d*)(,?)(\d*)\}")
BRACED = re.compile(r"\\(?:[pPxou]\{[^}]*\}|.)", re.DOTALL)  # an escape: \p{L}, \x{3000}, \s
# What calls back, recurs or changes the syntax: references, conditions, absent groups, free spacing
SPECIAL = re.compile(r"\\[1-9kgKGR]|\(\?[(~&R0-9|]|\(\?\w*x|\(\?<?\w*@|\(\*|\(\?\{")
UNBOUNDED = 1 << 30


@dataclass
class _Group:
    """What was read of a group so far: of the current alternative, and the maximum over all alternatives."""

    loops: int = 0
    most_loops: int = 0
    repeats: int = 1  # the largest product of counted repeats in it


class _RiskError(Exception):
    """The pattern has this risk."""


def find_risk(pattern: str) -> str:
    """What in the pattern may take long, as the end of a sentence; "" if nothing."""
    if SPECIAL.search(pattern):
        return "refers to itself"
    try:
        _scan(pattern)
    except _RiskError as risk:
        return str(risk)
    return ""


def _scan(pattern: str) -> None:
    stack = [_Group()]
    last = _Group()  # what a quantifier would repeat
    at = 0
    while at < len(pattern):
        character = pattern[at]
        repeat = _repeat(pattern, at)
        if repeat is not None:
            at, most = repeat
            _apply(stack[-1], last, most)
            last = _Group(loops=1, most_loops=1) if most >= UNBOUNDED else _Group(repeats=max(most, 1))
            continue
        last = _Group()
        if character == "\\":
            escape = BRACED.match(pattern, at)
            at = escape.end() if escape else len(pattern)
        elif character == "[":
            at = _end_of_set(pattern, at)
        elif character == "(":
            stack.append(_Group())
            if len(stack) > MAX_DEPTH:
                raise _RiskError(f"has more than {MAX_DEPTH} groups in each other")
            at = _start_of_group(pattern, at)
        elif character == ")" and len(stack) > 1:
            last = stack.pop()
            last.most_loops = max(last.most_loops, last.loops)
            _add(stack[-1], last)
            at += 1
        else:
            if character == "|":
                stack[-1].most_loops = max(stack[-1].most_loops, stack[-1].loops)
                stack[-1].loops = 0
            at += 1


def _add(outer: _Group, inner: _Group) -> None:
    outer.loops += inner.most_loops
    outer.repeats = max(outer.repeats, inner.repeats)
    if outer.loops > MAX_LOOPS:
        raise _RiskError(f"has more than {MAX_LOOPS} repeats in a row")


def _apply(outer: _Group, repeated: _Group, most: int) -> None:
    """Count a quantifier of up to `most` times, of a group that `outer` has counted already."""
    if most > 1 and repeated.most_loops:
        raise _RiskError("repeats what has a repeat in it")
    if most >= UNBOUNDED:
        _add(outer, _Group(most_loops=1))
        return
    outer.repeats = max(outer.repeats, repeated.repeats * most)
    if outer.repeats > MAX_REPEATS:
        raise _RiskError(f"repeats more than {MAX_REPEATS} times")


def _repeat(pattern: str, at: int) -> tuple[int, int] | None:
    """(its end, the most times) of the quantifier at `at`; None if there is none."""
    if pattern[at] in "*+?":
        most, end = 1 if pattern[at] == "?" else UNBOUNDED, at + 1
        return end + (pattern[end : end + 1] in ("?", "+")), most  # lazy, possessive
    count = COUNT.match(pattern, at)
    if count is None or not (count[1] or count[3]):
        return None
    if len(count[1]) > 6 or len(count[3]) > 6:
        raise _RiskError(f"repeats more than {MAX_REPEATS} times")
    least, most = int(count[1] or 0), int(count[3] or 0)
    most = max(least, most) if count[3] or not count[2] else UNBOUNDED
    if most >= UNBOUNDED and least > MAX_REPEATS:
        raise _RiskError(f"repeats more than {MAX_REPEATS} times")
    return count.end() + (pattern[count.end() : count.end() + 1] == "?"), most


def _end_of_set(pattern: str, at: int) -> int:
    """The index after the set of characters at `at`; sets may have sets in them."""
    depth = 0
    while at < len(pattern):
        if pattern[at] == "\\":
            at += 2
            continue
        if pattern[at] == "[":
            depth += 1
            at += 1 + (pattern[at + 1 : at + 2] == "^")
            at += pattern[at : at + 1] == "]"  # at the start, it is a member
        else:
            depth -= pattern[at] == "]"
            at += 1
        if depth == 0:
            return at
        if depth > MAX_DEPTH:
            break
    raise _RiskError("has sets of characters that do not end")


def _start_of_group(pattern: str, at: int) -> int:
    """The index after a group's opening: "(", "(?:", "(?i:", "(?<=", "(?<name>"."""
    opening = re.compile(r"\((?:\?(?:#[^)]*|<?[=!]|>|<\w*>|[-\w]*:|[-\w]*(?=\))))?").match(pattern, at)
    return opening.end() if opening else at + 1
