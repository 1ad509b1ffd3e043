"""Import tinygrad's CPU device, but not those of its renderers that are rarely wanted.

Its module imports four, of which two take 0.15 s of every start: LLVMpipe's reads the bindings of all of Mesa, and
that of x86 machine code builds its rewrite rules. Kernels are C unless DEV names another renderer.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from tinyvllm.device.clang_flags import use_fewer_copies

RARE_RENDERERS = {"tinygrad.renderer.nir": "LVPRenderer", "tinygrad.renderer.isa.x86": "X86Renderer"}


def cpu_runtime() -> ModuleType:
    """tinygrad.runtime.ops_cpu, whose compiler takes our flags."""
    with _imported_late():
        runtime = importlib.import_module("tinygrad.runtime.ops_cpu")
    use_fewer_copies()
    return runtime


@contextmanager
def _imported_late() -> Iterator[None]:
    """Until the end of the context, whoever imports a rare renderer gets a function in its place."""
    absent = {module: name for module, name in RARE_RENDERERS.items() if module not in sys.modules}
    for module, name in absent.items():
        stand_in = ModuleType(module)
        setattr(stand_in, name, _late(module, name))
        sys.modules[module] = stand_in
    try:
        yield
    finally:
        for module in absent:
            del sys.modules[module]


def _late(module: str, name: str) -> Callable[..., Any]:
    """A function that makes a renderer as its class does, and has the class's name, by which tinygrad chooses."""

    def make(*arguments: Any) -> Any:
        return getattr(importlib.import_module(module), name)(*arguments)

    make.__name__ = name
    return make
