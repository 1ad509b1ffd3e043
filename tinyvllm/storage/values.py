"""Named values of a model's own files, checked as they are read."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from tinyvllm.errors import ModelError, UnsupportedModelError


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object. Raises ModelError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read {path}: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds a {type(value).__name__}, not a JSON object")
    return value


class Values:
    """Named values of one file, checked when they are read: an error names the file, the key and the value.

    A key with the value null counts as absent. `prefix` is part of every key, and left out by callers.
    """

    def __init__(self, source: Path, values: Mapping[str, Any], prefix: str = "") -> None:
        self.source = source
        self.values = values
        self.prefix = prefix

    def get(self, key: str) -> Any:
        return self.values.get(self.prefix + key)

    def refuse(self, key: str, limit: str) -> NoReturn:
        if self.get(key) is None:
            raise ModelError(f"{self.source} has no {self.prefix}{key}: it must be {limit}")
        raise ModelError(f"{self.source}: {self.prefix}{key} is {self.get(key)!r}: it must be {limit}")

    def unsupported(self, key: str, known: str) -> NoReturn:
        raise UnsupportedModelError(
            f"{self.source}: {self.prefix}{key} is {self.get(key)!r}, which is not supported; known: {known}"
        )

    def optional_integer(self, key: str, at_least: int = 1) -> int | None:
        value = self.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
            self.refuse(key, f"a whole number of at least {at_least}")
        return value

    def integer(self, key: str, default: int | None = None, at_least: int = 1) -> int:
        value = self.optional_integer(key, at_least)
        if value is None:
            value = default
        if value is None:
            self.refuse(key, f"a whole number of at least {at_least}")
        return value

    def integers(self, key: str, count: int, at_least: int = 1) -> list[int]:
        """A list of `count` whole numbers, or one number for all of them."""
        value = self.get(key)
        if not isinstance(value, list):
            return [self.integer(key)] * count
        if len(value) != count or any(isinstance(i, bool) or not isinstance(i, int) or i < at_least for i in value):
            self.refuse(key, f"a whole number of at least {at_least}, or a list of {count} of them")
        return value

    def optional_number(self, key: str) -> float | None:
        value = self.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
            self.refuse(key, "a number that is not negative")
        return float(value)

    def positive(self, key: str, default: float | None = None) -> float:
        value = self.optional_number(key)
        if value is None:
            value = default
        if not value:
            self.refuse(key, "a number above 0")
        return value

    def numbers(self, key: str, count: int) -> tuple[float, ...]:
        """A list of `count` numbers above 0."""
        value = self.get(key)
        if not isinstance(value, list) or len(value) != count or not all(map(_is_positive, value)):
            self.refuse(key, f"a list of {count} numbers above 0")
        return tuple(float(item) for item in value)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            self.refuse(key, "true or false")
        return value

    def token_ids(self, key: str) -> tuple[int, ...]:
        """An id, a list of ids or nothing."""
        value = self.get(key)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if any(isinstance(item, bool) or not isinstance(item, int) or item < 0 for item in ids):
            self.refuse(key, "a token id or a list of them")
        return tuple(ids)

    def inner(self, key: str) -> Values | None:
        """An object inside this one."""
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            self.refuse(key, "an object")
        return Values(self.source, value)


def _is_positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value > 0
