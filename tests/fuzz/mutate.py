"""Seeded mutations of JSON-like values, texts and bytes, for the fuzzers of model files.

A mutated value is still of the right form for its container: a fuzzer that only flips bytes is stopped by the parser,
and never tests the code behind it. All choices come from the caller's `random.Random`, so a seed names a case.
"""

from __future__ import annotations

import json
import math
from random import Random
from typing import Any

BITS = (8, 15, 16, 31, 32, 53, 63, 64)
INTEGERS: tuple[int, ...] = (0, 1, 2, 3, 7, *(2**bits for bits in BITS), *(2**bits - 1 for bits in BITS), 10**400)
INTEGERS += (-1, -2, -(2**31), -(2**63))
FLOATS: tuple[float, ...] = (0.0, -0.0, 0.5, 1.0, 1.5, 1e-46, 5e-324, 1e38, 1e39, 1.7e308, -1.0, -1e-7)
FLOATS += (math.nan, math.inf, -math.inf)
TEXTS: tuple[str, ...] = ("", " ", "\0", "a\0b", "\ud800", "\udfff x", "\u00e9", "\u2581", "\r\n", "\ufffe", "a" * 5000)
TEXTS += ("../outside", "/etc/passwd", "/dev/zero", "%s%n", "None", "NaN", "0", "-1", "1e999", "0" * 400, "<0x00>")
TEXTS += ("{{", "{% for %}", "{% for i in range(10**9) %}x{% endfor %}", "<|im_end|>")


class Raw(str):
    """JSON text that `dump_json` writes as it is: numbers and nesting that Python's own values cannot express."""

    __slots__ = ()


RAWS: tuple[str, ...] = (
    "1e400",
    "-1e400",
    "1e-400",
    "1E+99999",
    "1" * 5000,
    "-0",
    "0.1e1",
    "NaN",
    "Infinity",
    "-Infinity",
)
RAWS += ('"\\ud800"', '"\\udc00\\ud800"', '{"a":1,"a":2}', "[[[[[[]]]]]]")
DEPTHS = (100, 1000, 20_000)


def strange_value(rng: Random, *, with_raw: bool = True) -> Any:
    """A value of any kind, often an extreme one."""
    kinds: list[Any] = [
        lambda: None,
        lambda: rng.random() < 0.5,
        lambda: rng.choice(INTEGERS),
        lambda: rng.choice(FLOATS),
        lambda: rng.choice(TEXTS),
        lambda: [],
        lambda: {},
        lambda: [strange_value(rng, with_raw=with_raw) for _ in range(rng.choice((1, 1, 2, 3, 17)))],
        lambda: {rng.choice(TEXTS): strange_value(rng, with_raw=with_raw) for _ in range(rng.choice((1, 1, 2, 5)))},
        lambda: [rng.choice(INTEGERS)] * rng.choice((1, 100, 10_000)),
    ]
    if with_raw:
        kinds.append(lambda: Raw(rng.choice(RAWS)))
        kinds.append(lambda: deep(rng))
    return rng.choice(kinds)()


def deep(rng: Random) -> Raw:
    """JSON nested more deeply than a recursive reader survives."""
    opening, closing = rng.choice((("[", "]"), ('{"a":', "}")))
    depth = rng.choice(DEPTHS)
    return Raw(opening * depth + "1" + closing * depth)


def mutate_number(rng: Random, value: float) -> float:
    """A number near the given one, or an extreme one of the same kind."""
    whole = isinstance(value, int)
    near = (value + 1, value - 1, value * 2, -value, 0 if whole else 0.0)
    return rng.choice(near) if rng.random() < 0.5 else rng.choice(INTEGERS if whole else FLOATS)


def mutate_text(rng: Random, text: str) -> str:
    """A text with a part cut, doubled, replaced or inserted; or another text."""
    place = rng.randrange(len(text) + 1)
    return rng.choice(
        (
            text[:place],
            text[place:],
            text + text,
            text[:place] + rng.choice(TEXTS) + text[place:],
            text[:place] + chr(rng.choice((0, 0x20, 0x7F, 0xFF, 0xD800, 0xFFFD, 0x10FFFF))) + text[place + 1 :],
            rng.choice(TEXTS),
        )
    )


def mutate_list(rng: Random, items: list[Any], other: Any) -> list[Any]:
    """A list with one item dropped, doubled, moved or replaced by `other`, or cut to a part of its length."""
    place = rng.randrange(len(items) + 1)
    moved = list(items)
    rng.shuffle(moved)
    return rng.choice(
        (
            [],
            items[:place],
            [*items[:place], *items[place + 1 :]],
            [*items[:place], *items[max(place - 1, 0) :]],
            [*items[:place], other, *items[place + 1 :]],
            [*items, other],
            moved,
        )
    )


def mutate_value(rng: Random, value: Any, *, with_raw: bool = True) -> Any:
    """A value like the given one, or a strange one: half of each."""
    other = strange_value(rng, with_raw=with_raw)
    if rng.random() < 0.5 or value is None or isinstance(value, Raw):
        return other
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return mutate_number(rng, value)
    if isinstance(value, str):
        return mutate_text(rng, value)
    if isinstance(value, list):
        return mutate_list(rng, value, other)
    return mutate_keys(rng, value, other)


def mutate_keys(rng: Random, values: dict[str, Any], other: Any) -> dict[str, Any]:
    """An object without one of its keys, with one more, or with one renamed."""
    changed = dict(values)
    key = rng.choice(list(values)) if values else ""
    held = changed.pop(key, other)
    if (choice := rng.randrange(3)) == 1:
        changed |= {key: held, rng.choice(TEXTS): other}
    elif choice == 2:
        changed[mutate_text(rng, key)] = held
    return changed


def mutate_json(rng: Random, tree: Any, num_changes: int = 1) -> Any:
    """A copy of a JSON value with `num_changes` mutations, each at a random place at any depth."""
    for _ in range(num_changes):
        tree = _mutate_at(rng, tree)
    return tree


def _mutate_at(rng: Random, tree: Any) -> Any:
    """One mutation: here, or in one of the parts. Objects are rarely replaced whole, for then nothing else is read."""
    is_leaf = not isinstance(tree, (dict, list)) or not tree
    if is_leaf or rng.random() < (0.1 if isinstance(tree, dict) else 0.3):
        return mutate_value(rng, tree)
    if isinstance(tree, dict):
        key = rng.choice(list(tree))
        return {**tree, key: _mutate_at(rng, tree[key])}
    place = rng.randrange(len(tree))
    return [*tree[:place], _mutate_at(rng, tree[place]), *tree[place + 1 :]]


def dump_json(value: Any) -> bytes:
    """JSON of a mutated value. Lone surrogates are escaped, `Raw` is written as it is, NaN as Python writes it."""
    return _dump(value).encode()


def _dump(value: Any) -> str:
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(str(key))}: {_dump(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_dump, value)) + "]"
    return json.dumps(value)


def mutate_bytes(rng: Random, data: bytes, *, within: int | None = None) -> bytes:
    """Bytes with a few flipped, cut off, removed, inserted or overwritten; in the first `within` of them, if given."""
    end = min(within or len(data), len(data))
    begin = rng.randrange(end + 1)
    length = rng.choice((1, 2, 4, 8, 100))
    choice = rng.randrange(6)
    if choice == 0:
        return data[:begin]
    if choice == 1:
        return data[:begin] + data[begin + length :]
    if choice == 2:
        return data[:begin] + rng.randbytes(length) + data[begin:]
    if choice == 3:
        return data[:begin] + data[max(begin - length, 0) :]
    if choice == 4:
        extreme = rng.choice((b"\xff", b"\0", b"\x7f", b"\x80")) * length
        return data[:begin] + extreme + data[begin + length :]
    flipped = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8)) if flipped else 0):
        flipped[rng.randrange(max(end, 1))] ^= 1 << rng.randrange(8)
    return bytes(flipped)
