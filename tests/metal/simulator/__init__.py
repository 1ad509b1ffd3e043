"""tinygrad's METAL device on Linux, for tests.

`install` puts a stand-in under tinygrad's own METAL code, which then runs as on a Mac: its renderer, its allocator, its
programs, its graphs of indirect commands. What is simulated lies below it:

- objective_c.py: the Objective-C runtime, messages checked against the bindings' types, reference counts;
- metal_objects.py: Metal's objects, with the checks of Xcode's API validation that matter here;
- the compiler service: reading the source (msl.py) and refusing what Apple's compiler would refuse;
- native.py, runtime.cpp, metal_stdlib: kernels compiled as C++ and run on the CPU, one fiber a GPU thread.

docs/METAL.md says what this shows and what it cannot.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from tests.metal.simulator.metal_objects import LIBRARY_HEAD, LIBRARY_TAIL, MetalError, MTLDevice, Settings
from tests.metal.simulator.msl import MslError, read_kernel, refusals
from tests.metal.simulator.native import KernelFault, Natives
from tests.metal.simulator.objective_c import instead_of_the_real_one, live_objects

MACOS = "15.0"
FAMILIES = ("Apple7", "Apple8", "Apple9", "Mac2")  # M1, M2, M3 and M4; Macs with Intel's or AMD's GPUs


def install(cache: Path, *, family: str = "Apple9", is_checked: bool = True) -> Settings:
    """Make METAL a device of this process. Before tinygrad is imported; kernels are kept in `cache`.

    The result's fields may be changed at any time, the family by `set_family`."""
    if "tinygrad.runtime.ops_metal" in sys.modules:
        raise RuntimeError("tinygrad's METAL code is imported already")
    os.environ["PARALLEL"] = "0"  # tinygrad's pool of compiling processes would not have the stand-in
    os.environ["CACHEDB"] = str(cache / "tinygrad.db")  # what is compiled here is of no use to anybody else
    settings = Settings(Natives(cache, is_checked=is_checked), family)
    with instead_of_the_real_one():
        import tinygrad.runtime.support.objc  # noqa: F401
    from tinygrad.runtime.autogen import metal
    from tinygrad.runtime.support import c

    metal.MTLCreateSystemDefaultDevice = lambda: metal.MTLDevice(MTLDevice(settings).address)
    service = _CodeGenService(settings)

    class Libraries(c.DLL):
        def __new__(cls, name: str, *args: Any, **kwargs: Any) -> Any:
            return service if name == "MTLCompiler" else super().__new__(cls)

    with mock.patch.object(c, "DLL", Libraries):
        from tinygrad.runtime import ops_metal
    ops_metal.platform = types.SimpleNamespace(mac_ver=lambda: (MACOS, ("", "", ""), "arm64"))
    return settings


def set_family(settings: Settings, family: str) -> None:
    """Make the open device one of another family: what is rendered from now on is for it."""
    from tinygrad import Device

    settings.family = family
    device = Device["METAL"]
    device.arch = family
    device.cached_renderer.clear()


@contextmanager
def watching_device_memory(settings: Settings | None) -> Iterator[None]:
    """Within: a thread that reads or writes what another thread of the same dispatch wrote is a fault. On a real
    device (no settings) nothing is watched."""
    if settings is None:
        yield
        return
    settings.watches_device_memory = True
    try:
        yield
    finally:
        settings.watches_device_memory = False


@contextmanager
def allowing_host_writes(settings: Settings | None) -> Iterator[None]:
    """Within: the host may write into buffers that are in use. For words that the kernels in flight do not read: the
    simulator only knows whole buffers. Without effect on a real device (no settings)."""
    if settings is None:
        yield
        return
    settings.watches_host_writes = False
    try:
        yield
    finally:
        settings.watches_host_writes = True


@contextmanager
def where_nothing_runs(settings: Settings) -> Iterator[None]:
    """Within: all but the kernels is as ever, and what they would have computed is 0."""
    settings.is_dry = True
    try:
        yield
    finally:
        settings.is_dry = False


@contextmanager
def without_checks(settings: Settings | None) -> Iterator[None]:
    """Within: kernels run faster, and no access to memory is looked at. For kernels that are checked elsewhere, and
    without effect on a real device (no settings)."""
    if settings is None:
        yield
        return
    checked = settings.natives
    settings.natives = Natives(checked.folder, is_checked=False)
    try:
        yield
    finally:
        settings.natives = checked


class _CodeGenService:
    """MTLCompiler.framework's functions. A "library" is the source, compiled to machine code when it first runs."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.MTLCodeGenServiceCreate = self._Create()

    class _Create:
        restype: Any = None

        def __call__(self, name: bytes) -> int:
            return 1

    def MTLCodeGenServiceBuildRequest(
        self, service: Any, block: Any, kind: int, request: bytes, size: int, callback: Any
    ) -> None:
        source_size, _ = struct.unpack("<QQ", request[:16])
        source = request[16 : 16 + source_size].rstrip(b"\0").decode()
        answer = callback._obj  # a reference with an offset, to look like a block
        try:
            kernel = read_kernel(source)
            if (found := refusals(kernel)) and not self._settings.is_dry:
                raise MslError(f"program_source: error: {'; '.join(found)} (kernel {kernel.name})")
        except MslError as error:
            answer(None, 1, None, 0, str(error).encode())
            return
        library = LIBRARY_HEAD + source.encode() + LIBRARY_TAIL
        reply = bytes(8) + struct.pack("<LL", 16, 0) + library
        data = ctypes.create_string_buffer(reply, len(reply))
        answer(None, 0, ctypes.addressof(data), len(reply), None)


__all__ = [
    "FAMILIES",
    "KernelFault",
    "MetalError",
    "MslError",
    "Settings",
    "allowing_host_writes",
    "install",
    "live_objects",
    "set_family",
    "watching_device_memory",
    "where_nothing_runs",
    "without_checks",
]
