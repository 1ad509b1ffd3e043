"""The computer's own cores, each a device of tinygrad's with a worker thread. Kernels are C, compiled by clang."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Mapping
from typing import ClassVar

from tinyvllm.config import Limits
from tinyvllm.device.kinds.base import DeviceKind
from tinyvllm.errors import DeviceError

INSTALL = "install clang (Debian: apt-get install clang; macOS: xcode-select --install), or name it in CC"


class Cpu(DeviceKind):
    # DMC: scalar C, which clang vectorizes 8 wide; without it tinygrad emits float4 loads, which pin clang to 4 wide
    settings: ClassVar[Mapping[str, str]] = {"DMC": "1"}
    is_unified = True
    default_share = 0.5
    has_kernels = True

    def __init__(self) -> None:
        super().__init__("CPU")

    def is_default(self) -> bool:
        return True

    def check(self) -> None:
        compiler = os.environ.get("CC", "clang")
        if shutil.which(compiler) is None:
            raise DeviceError(f"the CPU device needs clang, and {compiler!r} is not on the PATH: {_remedy()}")
        if why := self.why_missing():  # at once: kept programs would let the device open without a compiler
            raise DeviceError(f"the CPU device cannot be opened: {why}")

    def why_missing(self) -> str:
        compiler = os.environ.get("CC")
        if compiler is None or shutil.which(compiler) is None or _is_clang(compiler):
            return ""
        return f"CC names {compiler!r}, which does not take the arguments of clang: {_remedy()}"

    def opened(self, name: str) -> None:
        """Refuse renderers that do not know C, in which many kernels have statements."""
        from tinygrad import Device
        from tinygrad.renderer.cstyle import ClangRenderer

        renderer = Device[name].renderer
        if not isinstance(renderer, ClangRenderer):
            raise DeviceError(
                f"kernels for a CPU have statements in C, which tinygrad's {type(renderer).__name__} cannot render: "
                "set DEV=CPU, or DEV=CPU::ARCH for another processor"
            )

    def step_limits(self, free_bytes: Callable[[], int]) -> Limits:
        """A step of 256 tokens takes 0.29 s on two cores (135M parameters)."""
        return Limits(max_num_seqs=16, max_num_batched_tokens=256)


def _remedy() -> str:
    """Where CC names something else, the clang that is there."""
    return INSTALL if shutil.which("clang") is None else "unset CC, or set CC=clang, which is installed"


def _is_clang(compiler: str) -> bool:
    """Whether it takes the argument of tinygrad's that other compilers refuse."""
    command = [compiler, "--target=x86_64-none-unknown-elf", "-fsyntax-only", "-x", "c", "-"]
    try:
        return subprocess.run(command, input=b"", capture_output=True, check=False).returncode == 0
    except OSError:  # a file that may be executed, but is no program of this machine
        return False
