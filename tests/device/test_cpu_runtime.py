"""The CPU's runtime without the renderers that are rarely wanted."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tinyvllm.device.cpu_runtime import RARE_RENDERERS

OPEN = """
import sys
from tinyvllm.device.handle import open_device
open_device()
from tinygrad import Device
print(type(Device["CPU"].renderer).__name__, *sys.modules)
"""


def _opened(wanted: str) -> tuple[str, set[str]]:
    """(the renderer's class, the imported modules) of a process that has opened the device `wanted`."""
    environment = os.environ | {"DEV": wanted}
    ran = subprocess.run([sys.executable, "-c", OPEN], env=environment, capture_output=True, text=True, check=True)
    renderer, *modules = ran.stdout.split()
    return renderer, set(modules)


def test_opening_the_cpu_imports_no_rare_renderer() -> None:
    renderer, modules = _opened("CPU")
    assert renderer == "ClangRenderer" and "tinygrad.runtime.ops_cpu" in modules
    assert not modules & {*RARE_RENDERERS, "tinygrad.runtime.autogen.mesa"}


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the renderer is of x86")
def test_a_rare_renderer_is_there_for_those_who_name_it() -> None:
    renderer, modules = _opened("CPU:X86")
    assert renderer == "X86Renderer" and "tinygrad.renderer.isa.x86" in modules
