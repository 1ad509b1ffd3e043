"""Methods of dataclasses, each made when it is first used.

`dataclasses` compiles the source of up to six methods for every class while it is defined: 2,200 methods of 420 classes
in a start of the server, a fifth of the time of all its imports. A start uses 170 of them. Since Python 3.13 a class's
methods are compiled together, by other functions, which are left as they are.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable
from typing import Any

LAST_PYTHON = (3, 12)  # whose `dataclasses` makes each method by a call of `_create_fn`


def make_methods_late() -> None:
    """From now on, a method of a dataclass is compiled when it is first looked up, whosever class it is. For our own
    processes, not for a script that imports us."""
    create = getattr(dataclasses, "_create_fn", None)
    if create is None or sys.version_info[:2] > LAST_PYTHON or isinstance(create, _CreateLate):
        return
    dataclasses._create_fn = _CreateLate(create)  # type: ignore[attr-defined]


class _CreateLate:
    """Takes the place of dataclasses._create_fn. `create`: the original."""

    def __init__(self, create: Callable[..., Any]) -> None:
        self._create = create

    def __call__(self, name: str, *arguments: Any, **options: Any) -> LateMethod:
        module = (options.get("globals") or {}).get("__name__", "builtins")
        return LateMethod(name, module, functools.partial(self._create, name, *arguments, **options))


class LateMethod:
    """What stands for a method in its class, and gives its place to the method once that is made."""

    # no __dict__, which functools.wraps would copy
    __slots__ = ("__name__", "_make", "_method", "_module")

    def __init__(self, name: str, module: str, make: Callable[[], Any]) -> None:
        self.__name__, self._module, self._make = name, module, make
        self._method: Any = None

    def __getattribute__(self, name: str) -> Any:
        """The method's own module and docstring, which functools.wraps copies, not those of this class."""
        if name == "__module__":
            return self._module
        return None if name == "__doc__" else object.__getattribute__(self, name)

    def _made(self) -> Any:
        if self._method is None:
            self._method = self._make()
        return self._method

    def __get__(self, instance: Any, owner: type) -> Any:
        method = self._made()
        for kind in owner.__mro__:
            if kind.__dict__.get(self.__name__) is self:
                method.__qualname__ = f"{kind.__qualname__}.{self.__name__}"
                setattr(kind, self.__name__, method)
                break
        return method.__get__(instance, owner)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """For `__repr__`, which dataclasses wraps in a function of its own, and which thus keeps its place."""
        return self._made()(*arguments, **options)
