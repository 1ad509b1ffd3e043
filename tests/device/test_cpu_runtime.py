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


def _open(wanted: str) -> subprocess.CompletedProcess[str]:
    """A process that has opened the device `wanted`."""
    environment = os.environ | {"DEV": wanted}
    return subprocess.run([sys.executable, "-c", OPEN], env=environment, capture_output=True, text=True, check=False)


def test_opening_the_cpu_imports_no_rare_renderer() -> None:
    renderer, *modules = _open("CPU").stdout.split()
    assert renderer == "ClangRenderer" and "tinygrad.runtime.ops_cpu" in modules
    assert not {*modules} & {*RARE_RENDERERS, "tinygrad.runtime.autogen.mesa"}


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the renderer is of x86")
def test_a_rare_renderer_is_found_and_refused() -> None:
    """It was opened, and failed at the first kernel with a statement in C."""
    opened = _open("CPU:X86")
    assert "tinygrad's X86Renderer cannot render: set DEV=CPU" in opened.stderr and opened.returncode == 1
