"""Named values of a model's own files, checked as they are read."""

from __future__ import annotations

import reprlib
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeGuard

from tinyvllm.errors import ModelError, UnsupportedModelError
from tinyvllm.storage.strict_json import read_json

__all__ = ["MAX_INTEGER", "MAX_LAYERS", "MAX_SIZE", "Values", "read_json", "shown"]

MAX_INTEGER = 2**31 - 1  # of every count, size and id: kernels index with 32 bits
MAX_SIZE = 1 << 24  # of a vocabulary or of a vector: 64 times the largest known
MAX_LAYERS = 1024  # 8 times the most known: readers compare lists of layers with one another
# Of numbers, which kernels multiply in float32: beyond these they become infinite or zero
LARGEST, SMALLEST = 3e38, 1.2e-38
MAX_SHOWN = 300  # characters of a value in a message
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxdict, _SHORT.maxlist = 3, 16, 16
_SHORT.maxstring = _SHORT.maxlong = _SHORT.maxother = 120


def shown(value: Any) -> str:
    """A value in a message: one line, and short."""
    try:
        text = _SHORT.repr(value)
    except ValueError:  # Python prints no integers of more than 4300 digits
        return "an integer of thousands of digits"
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


class Values:
    """Named values of one file, checked when they are read: an error names the file, the key and the value.

    A key with the value null counts as absent. `prefix` is part of every key, and left out by callers. `inside`: the
    object that these values are in, for messages ("rope_scaling.").
    """

    def __init__(self, source: Path, values: Mapping[str, Any], prefix: str = "", inside: str = "") -> None:
        self.source = source
        self.values = values
        self.prefix = prefix
        self.inside = inside

    def get(self, key: str) -> Any:
        return self.values.get(self.prefix + key)

    def name(self, key: str) -> str:
        """The key as messages name it."""
        return self.inside + self.prefix + key

    def refuse(self, key: str, limit: str) -> NoReturn:
        if self.get(key) is None:
            raise ModelError(f"{self.source} has no {self.name(key)}: it must be {limit}")
        raise ModelError(f"{self.source}: {self.name(key)} is {shown(self.get(key))}: it must be {limit}")

    def unsupported(self, key: str, known: str) -> NoReturn:
        raise UnsupportedModelError(
            f"{self.source}: {self.name(key)} is {shown(self.get(key))}, which is not supported; known: {known}"
        )

    # --- Whole numbers -------------------------------------------------------------------------------------------

    def optional_integer(self, key: str, at_least: int = 1, at_most: int = MAX_INTEGER) -> int | None:
        value = self.get(key)
        if value is None:
            return None
        if not is_integer(value, at_least, at_most):
            self.refuse(key, _whole_number(at_least, at_most, value))
        return value

    def integer(self, key: str, default: int | None = None, at_least: int = 1, at_most: int = MAX_INTEGER) -> int:
        value = self.optional_integer(key, at_least, at_most)
        if value is None:
            value = default
        if value is None:
            self.refuse(key, _whole_number(at_least, at_most, value))
        return value

    def integers(self, key: str, count: int, at_least: int = 1, at_most: int = MAX_INTEGER) -> list[int]:
        """A list of `count` whole numbers, or one number for all of them."""
        value = self.get(key)
        if not isinstance(value, list):
            return [self.integer(key, at_least=at_least, at_most=at_most)] * count
        if len(value) != count or not all(is_integer(item, at_least, at_most) for item in value):
            self.refuse(key, f"{_whole_number(at_least, at_most, value)}, or a list of {count} of them")
        return value

    def indices(self, key: str, count: int, limit: str) -> set[int]:
        """The whole numbers of a list, below `count`; none if absent. `limit`: what the list must be, for messages."""
        value = self.get(key)
        if value is None:
            return set()
        if not isinstance(value, list) or not all(is_integer(item, 0, count - 1) for item in value):
            self.refuse(key, limit)
        return set(value)

    def token_ids(self, key: str, vocab_size: int | None = None) -> tuple[int, ...]:
        """An id, a list of ids or nothing."""
        value = self.get(key)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        last = MAX_INTEGER if vocab_size is None else vocab_size - 1
        if not all(is_integer(item, 0, last) for item in ids):
            known = "" if vocab_size is None else f", each below the size of the vocabulary ({vocab_size})"
            self.refuse(key, f"a token id or a list of them{known}")
        return tuple(ids)

    def token_id(self, key: str, vocab_size: int | None = None) -> int | None:
        """An id or nothing."""
        value = self.get(key)
        if value is not None and not is_integer(value, 0, MAX_INTEGER if vocab_size is None else vocab_size - 1):
            known = "" if vocab_size is None else f" below the size of the vocabulary ({vocab_size})"
            self.refuse(key, f"a token id{known}")
        return value

    # --- Numbers -------------------------------------------------------------------------------------------------

    def optional_number(self, key: str, at_most: float = LARGEST) -> float | None:
        value = self.get(key)
        if value is None:
            return None
        if not _is_number(value) or not 0 <= value <= at_most:
            self.refuse(key, f"a number that is not negative{_at_most(value, at_most)}")
        if 0 < value < SMALLEST:
            self.refuse(key, f"0, or a number of at least {SMALLEST:g}")
        return float(value)

    def positive(
        self, key: str, default: float | None = None, at_least: float = SMALLEST, at_most: float = LARGEST
    ) -> float:
        value = self.optional_number(key, at_most)
        if value is None:
            value = default
        if not value or value < at_least:
            self.refuse(key, "a number above 0" if at_least == SMALLEST else f"a number of at least {at_least:g}")
        return value

    def signed(self, key: str) -> float:
        """A number of either sign."""
        value = self.get(key)
        if not _is_number(value) or not -LARGEST <= value <= LARGEST:
            self.refuse(key, "a number")
        return float(value)

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

    def flags(self, key: str, counts: Collection[int], limit: str) -> tuple[bool, ...]:
        """A list of true and false, or of 1 and 0, of one of these lengths. `limit`: what it must be, for messages."""
        value = self.get(key)
        if not isinstance(value, list) or len(value) not in counts or not all(map(_is_flag, value)):
            self.refuse(key, limit)
        return tuple(map(bool, value))

    # --- Texts ---------------------------------------------------------------------------------------------------

    def optional_text(self, key: str) -> str | None:
        value = self.get(key)
        if value is not None and not isinstance(value, str):
            self.refuse(key, "a text")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        value = self.optional_text(key)
        if value is None:
            value = default
        if value is None:
            self.refuse(key, "a text")
        return value

    def texts(self, key: str) -> list[str]:
        """A list of texts; empty if absent."""
        value = self.get(key)
        if value is None:
            return []
        if not isinstance(value, list) or not set(map(type, value)) <= {str}:
            self.refuse(key, "a list of texts")
        return value

    def choice(self, key: str, choices: Iterable[str], default: str | None = None) -> str:
        """One of some texts. Raises UnsupportedModelError for another."""
        known = tuple(choices)
        value = self.get(key)
        if value is None:
            value = default
        if not isinstance(value, str) or value not in known:
            self.unsupported(key, ", ".join(known))
        return value

    # --- Objects -------------------------------------------------------------------------------------------------

    def inner(self, key: str) -> Values | None:
        """An object inside this one."""
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            self.refuse(key, "an object")
        return Values(self.source, value, inside=f"{self.name(key)}.")

    def inners(self, key: str) -> list[Values]:
        """A list of objects; empty if absent."""
        value = self.get(key)
        if value is None:
            return []
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            self.refuse(key, "a list of objects")
        return [Values(self.source, item, inside=f"{self.name(key)}[{at}].") for at, item in enumerate(value)]


def is_integer(value: Any, at_least: int, at_most: int) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and at_least <= value <= at_most


def _is_flag(value: Any) -> bool:
    return isinstance(value, int) and value in (0, 1)


def _whole_number(at_least: int, at_most: int, value: Any) -> str:
    """What is expected in place of `value`. The upper limit is only mentioned if `value` exceeds it."""
    missed = _is_number(value) and value > at_most
    return f"a whole number of at least {at_least}" + (f" and at most {at_most}" if missed else "")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _at_most(value: Any, limit: float) -> str:
    """The upper limit, if `value` exceeds it; otherwise empty."""
    return f", and at most {limit:g}" if _is_number(value) and value > limit else ""


def _is_positive(value: Any) -> bool:
    return _is_number(value) and bool(SMALLEST <= value <= LARGEST)
