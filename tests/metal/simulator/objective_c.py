"""A stand-in for the Objective-C runtime, as far as tinygrad's bindings (runtime/support/objc.py) talk to it: classes
by name, objects by address, messages by selector, reference counts.

Objects are Python objects whose methods are named by their selectors, `_` for `:`. What a message takes and gives is
checked against the types that tinygrad's generated bindings declare. There is no autorelease pool, as there is none
around tinygrad's calls on a Mac: an object that is returned autoreleased lives until somebody releases it.
"""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar
from unittest import mock

FIRST_ADDRESS, ADDRESS_STEP = 0x7000_0000_0000, 16


class Object:
    """A simulated object with one reference. Subclasses answer messages by their methods."""

    classes: ClassVar[dict[str, type[Object]]] = {}
    by_address: ClassVar[dict[int, Object]] = {}
    next_address: ClassVar[int] = FIRST_ADDRESS

    def __init_subclass__(cls) -> None:
        Object.classes[cls.__name__] = cls

    def __init__(self) -> None:
        self.references = 1
        self.address = Object.next_address
        Object.next_address += ADDRESS_STEP
        Object.by_address[self.address] = self

    def retain(self) -> Object:
        self.references += 1
        return self

    def release(self) -> None:
        self.references -= 1
        if self.references == 0:
            del Object.by_address[self.address]
            self.dealloc()

    def dealloc(self) -> None:
        """Called when the last reference is gone."""


def live_objects() -> Counter[str]:
    """How many objects of each class there are."""
    return Counter(type(thing).__name__ for thing in Object.by_address.values())


class NSString(Object):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text

    @classmethod
    def stringWithUTF8String_(cls, text: bytes) -> NSString:
        return cls(text.decode())

    def UTF8String(self) -> bytes:
        return self.text.encode()


class NSError(Object):
    def __init__(self, message: str) -> None:
        super().__init__()
        self.message = message

    def localizedDescription(self) -> NSString:
        return NSString(self.message)

    def store(self, pointer: Any) -> None:
        """Put it where an `NSError **` argument points."""
        pointer._obj.value = self.address


class Data(Object):
    """dispatch_data_t."""

    def __init__(self, content: bytes) -> None:
        super().__init__()
        self.content = content


class _Class:
    """The address of a class itself, for messages to it."""

    def __init__(self, name: str) -> None:
        self.name = name


_CLASSES: dict[str, int] = {}


def _class_address(name: bytes) -> int:
    """Of any name: the bindings ask for every class of the framework when they are imported."""
    text = name.decode()
    if text not in _CLASSES:
        _CLASSES[text] = 0x6000_0000_0000 + len(_CLASSES) * ADDRESS_STEP
    return _CLASSES[text]


def _receiver(address: int) -> Object | type[Object]:
    if address in Object.by_address:
        return Object.by_address[address]
    name = next((name for name, known in _CLASSES.items() if known == address), None)
    if name is None:
        raise RuntimeError(f"a message to {address:#x}, where no object is: it was released before")
    if name not in Object.classes:
        raise RuntimeError(f"class {name} is not simulated")
    return Object.classes[name]


class _Function:
    """A C function with a settable result type, as ctypes has it."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self.call = call
        self.restype: Any = None
        self.argtypes: list[Any] = []

    def __call__(self, *args: Any) -> Any:
        return _to_type(self.call(*args), self.restype)


class _Sender(_Function):
    """objc_msgSend."""

    def __init__(self) -> None:
        super().__init__(self._send)

    def _send(self, pointer: Any, selector: Any, *args: Any) -> Any:
        address = pointer.value if isinstance(pointer, ctypes.c_void_p) else pointer
        if not address:
            return None  # a message to nil gives nil
        name = selector.decode().replace(":", "_")
        receiver = _receiver(address)
        method = getattr(receiver, name, None)
        if method is None:
            kind = receiver.__name__ if isinstance(receiver, type) else type(receiver).__name__
            raise RuntimeError(f"[{kind} {selector.decode()}] is not simulated")
        types = self.argtypes[2:] if self.argtypes else [None] * len(args)
        if len(types) != len(args):
            raise TypeError(f"{selector.decode()} takes {len(types)} arguments, not {len(args)}")
        return method(*(_from_type(value, kind) for value, kind in zip(args, types, strict=True)))


def _is_object_type(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, ctypes.c_void_p) and kind is not ctypes.c_void_p


def _from_type(value: Any, kind: Any) -> Any:
    """An argument as the simulated method takes it."""
    if kind is None:
        return value
    if _is_object_type(kind):
        address = value.value if isinstance(value, ctypes.c_void_p) else value
        if address and address not in Object.by_address:
            raise RuntimeError(f"an argument is {address:#x}, where no object is: it was released before")
        return Object.by_address[address] if address else None
    if isinstance(value, int) and issubclass(kind, ctypes._SimpleCData) and kind(value).value != value:
        raise OverflowError(f"{value} does not fit into {kind.__name__}")
    if isinstance(value, ctypes.Structure) and not isinstance(value, kind):
        raise TypeError(f"{value} is no {kind.__name__}")
    return value


def _to_type(value: Any, kind: Any) -> Any:
    """A result as ctypes would give it."""
    if _is_object_type(kind):
        return kind(value.address if isinstance(value, Object) else value)
    return value


class _Library:
    """libobjc, and libSystem's one function."""

    def __init__(self, name: str | None) -> None:
        # the bindings only hand a selector on to objc_msgSend: any object will do
        self.sel_registerName = _Plain(lambda name: name)
        self.objc_getClass = _Function(_class_address)
        self.dispatch_data_create = _Function(lambda data, size, queue, destructor: Data(data[:size]))

    def __getitem__(self, name: str) -> _Sender:
        assert name == "objc_msgSend", f"{name} is not simulated"
        return _Sender()


class _Plain(_Function):
    """A function whose result is left alone, whatever type is set."""

    def __call__(self, *args: Any) -> Any:
        return self.call(*args)


@contextmanager
def instead_of_the_real_one() -> Iterator[None]:
    """While tinygrad's bindings are imported: the libraries that they open are these."""
    with mock.patch("ctypes.CDLL", _Library), mock.patch("ctypes.util.find_library", lambda name: name):
        yield
