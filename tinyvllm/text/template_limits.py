"""Limits on rendering a chat template: time, steps, and characters.

A thread cannot be ended from outside, so the compiled template checks the limits itself (template_environment.py): it
calls `tick` at each iteration and each call, and the other methods wherever an expression makes a value. Operations
that could make a large value at once are checked before they run.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, ValuesView
from collections.abc import Set as AbstractSet
from itertools import islice
from typing import Any

MAX_CHARS = 16 * 2**20  # of one value, or of the chat: far more than any context window holds
MAX_MADE_CHARS = 16 * MAX_CHARS  # of all values together that one rendering makes
MAX_ITEMS = 300_000  # of one value; the messages of a body have fewer
MAX_TICKS = 1_000_000  # iterations and calls; templates of real models take some for each message
MAX_RENDER_S = 1.0  # of the thread's own time; those templates take 0.1 to 5 ms, and 0.1 s for a chat of 16 MiB
MAX_INT_BITS = 2**16
MAX_WIDTH = 10_000  # of padding, in characters
_TICKS_PER_LOOK = 16  # at the clock

_ATOMS = frozenset((int, float, bool, type(None)))
_CONTAINERS = (list, tuple, dict, Mapping, AbstractSet, ValuesView)  # the usual ones first
# Methods of texts and numbers whose results may be much larger than what they are given
# fmt: off
CHECKED_METHODS = frozenset((
    "center", "ljust", "rjust", "zfill", "to_bytes", "expandtabs", "replace", "join", "split", "rsplit", "splitlines",
    "translate", "maketrans",
))
# fmt: on
_REFERENCE_CHARS = 8  # what an item of a container counts as


class TemplateLimitError(Exception):
    """A template takes too much; the message completes "the chat template ..."."""


class Budget:
    """The remaining budget of one rendering. Every method raises TemplateLimitError when it is exceeded."""

    def __init__(self, inputs: Iterable[object] = ()) -> None:
        """inputs: messages and tools, whose size is counted only once."""
        self._end_s = time.thread_time() + MAX_RENDER_S
        self._left = MAX_MADE_CHARS
        self._inputs = {id(one): -1 for one in inputs}  # weights by id, once they are known
        self.tick: Callable[[], None] = self._ticks().__next__

    def _ticks(self) -> Iterator[None]:
        for _ in range(MAX_TICKS // _TICKS_PER_LOOK):
            if time.thread_time() > self._end_s:
                raise TemplateLimitError(f"takes more than {MAX_RENDER_S:g} s to render")
            for _ in range(_TICKS_PER_LOOK):
                yield
        raise TemplateLimitError(f"takes more than {MAX_TICKS} iterations and calls")

    def spend(self, num_chars: int) -> None:
        """Called before a value of so many characters is made."""
        self._left -= num_chars
        if num_chars > MAX_CHARS or self._left < 0:
            limit = MAX_CHARS if num_chars > MAX_CHARS else MAX_MADE_CHARS
            raise TemplateLimitError(f"makes more than {limit} characters{' in all' if self._left < 0 else ''}")

    def note(self, value: Any) -> Any:
        """Count a value that was just made from counted ones, by an operation that was checked or makes nothing larger.
        Returns the value."""
        if type(value) is str:
            self._left -= len(value)
            if self._left < 0:
                self.spend(0)
        elif type(value) in _ATOMS:
            return value
        elif isinstance(value, str | bytes):
            self.spend(len(value))
        elif isinstance(value, _CONTAINERS):
            self.weigh(value)
            self.spend(_REFERENCE_CHARS * len(value))
        return value

    def weigh(self, value: object) -> int:
        """The characters and items in a value, counted as often as they occur, as in its text."""
        total, num_items, stack = 0, 0, [value]
        while stack:
            num_items += 1
            if num_items > MAX_ITEMS:
                raise TemplateLimitError(f"makes a value of more than {MAX_ITEMS} items")
            one = stack.pop()
            if isinstance(one, str | bytes):
                total += len(one)
            elif type(one) in _ATOMS:
                total += 1
            elif isinstance(one, _CONTAINERS):
                known = self._inputs.get(id(one))
                if known == -1:
                    known = self._inputs[id(one)] = self._weigh_new(one)
                if known is not None:
                    total += known
                else:
                    total += self._enter(one, stack)
            else:
                total += 1
            if total > MAX_CHARS:
                raise TemplateLimitError(f"makes a value of more than {MAX_CHARS} characters and items")
        return total

    def _weigh_new(self, value: Any) -> int:
        del self._inputs[id(value)]
        return self.weigh(value)

    def _enter(self, container: Any, stack: list[object]) -> int:
        """Put the items on the stack, and return their number."""
        if len(container) <= MAX_CHARS:
            stack.extend(container)
            if isinstance(container, Mapping):
                stack.extend(container.values())
        return len(container)

    def text(self, value: Any) -> str:
        """str(value), for output."""
        if type(value) is str:
            return value
        if type(value) not in _ATOMS and isinstance(value, _CONTAINERS):
            self.weigh(value)
        text = str(value)
        self.spend(len(text))
        return text

    def join(self, values: Iterable[Any], separator: str = "") -> str:
        """separator.join(map(str, values))"""
        texts = [self.text(value) for value in self.listed(values)]
        self.spend(sum(map(len, texts)) + len(separator) * len(texts))
        return separator.join(texts)

    def listed(self, values: Iterable[Any]) -> Sequence[Any]:
        """The values of an iterable, which may be a generator."""
        if isinstance(values, list | tuple):
            return values
        found = list(islice(iter(values), MAX_ITEMS + 1))
        if len(found) > MAX_ITEMS:
            raise TemplateLimitError(f"makes a list of more than {MAX_ITEMS} items")
        self.spend(_REFERENCE_CHARS * len(found))
        return found

    def width(self, value: object) -> None:
        """Check a width of padding."""
        if isinstance(value, int) and abs(value) > MAX_WIDTH:
            raise TemplateLimitError(f"pads a text to {str(value)[:20]} characters: the limit is {MAX_WIDTH}")

    # ---- Operators ----

    def add(self, left: Any, right: Any) -> Any:
        """left + right"""
        if type(left) is str and type(right) is str:
            text: str = left + right  # which are noted themselves
            self._left -= len(text)
            if self._left < 0 or len(text) > MAX_CHARS:
                self.spend(len(text))
            return text
        self._before_sum(left, right)
        return left + right

    def mod(self, left: Any, right: Any) -> Any:
        """left % right"""
        if isinstance(left, str | bytes):
            self.before_format(str(left), right)
        return left % right

    def _before_sum(self, left: Any, right: Any) -> None:
        if isinstance(left, str | bytes) and isinstance(right, str | bytes):
            self.spend(len(left) + len(right))
        elif isinstance(left, list | tuple) and isinstance(right, list | tuple):
            num_items = len(left) + len(right)
            self.spend(_REFERENCE_CHARS * num_items)
            if num_items > MAX_ITEMS:
                raise TemplateLimitError(f"makes a list of more than {MAX_ITEMS} items")

    def before_product(self, operator: str, left: Any, right: Any) -> None:
        """Called before `left * right` or `left ** right`."""
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * max(right, 0) if operator == "**" else left.bit_length() + right.bit_length()
            if bits > MAX_INT_BITS:
                raise TemplateLimitError(f"makes a number of more than {MAX_INT_BITS} bits")
        for value, count in ((left, right), (right, left)):
            if isinstance(value, str | bytes | list | tuple) and isinstance(count, int):
                self.spend(self.weigh(value) * max(count, 0))

    def before_format(self, form: str, arguments: Any) -> None:
        """Called before `form % arguments`."""
        for width in re.findall(r"%(?:\([^)]*\))?[#0\- +]*(\*|\d*)(?:\.(?:\*|\d*))?", form):
            self._check_width(width)
        for precision in re.findall(r"%[^a-zA-Z%]*\.(\*|\d+)", form):
            self._check_width(precision)
        repeats = form.count("%") if isinstance(arguments, Mapping) else 1
        self.spend(len(form) + 4 * repeats * self.weigh(arguments))

    def before_str_format(self, form: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Called before `form.format(*args, **kwargs)`."""
        for spec in re.findall(r"[:{]([^{}]*)", form):
            for width in re.findall(r"\d+", spec):
                self._check_width(width)
        if re.search(r"\{[^{}]*\{", form.replace("{{", "")):  # a width that is an argument
            for value in (*args, *kwargs.values()):
                self.width(value)
        self.spend(len(form) + 4 * form.count("{") * self.weigh([list(args), dict(kwargs)]))

    def _check_width(self, digits: str) -> None:
        if digits == "*" or len(digits) > 9:
            raise TemplateLimitError(f"pads a text to {digits[:20]} characters: the limit is {MAX_WIDTH}")
        if digits:
            self.width(int(digits))

    # ---- Methods of texts and numbers ----

    def before_method(self, owner: Any, name: str, args: Sequence[Any]) -> None:
        """Called before a built-in method of a text or a number."""
        if name in ("center", "ljust", "rjust", "zfill", "to_bytes", "expandtabs"):
            for value in args[:1]:
                self.width(value)
            if name == "expandtabs" and args:
                self.spend(len(owner) + owner.count(owner[:0] + type(owner)("\t")) * MAX_WIDTH)
        elif name == "replace" and len(args) >= 2:
            self.before_replace(owner, args[0], args[1])
        elif name == "join" and args:
            self.spend(self.weigh(args[0]) + len(owner) * len(args[0]))
        elif name in ("split", "rsplit", "splitlines") and len(owner) > MAX_WIDTH:
            count = owner.count(args[0]) if args and args[0] and isinstance(args[0], str) else len(owner) // 2
            self.spend(_REFERENCE_CHARS * count)
        elif name in ("translate", "maketrans"):
            raise TemplateLimitError(f"uses the method {name}, which is not supported")

    def before_replace(self, text: Any, old: Any, new: Any) -> None:
        if isinstance(text, str) and isinstance(old, str) and isinstance(new, str):
            count = text.count(old) if old else len(text) + 1
            self.spend(len(text) + count * max(0, len(new) - len(old)))
