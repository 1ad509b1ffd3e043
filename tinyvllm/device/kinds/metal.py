"""METAL: the GPU of a Mac, which shares the computer's memory."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import TYPE_CHECKING, Any

from tinyvllm.device.kinds.base import DeviceKind, ProgramLimits

if TYPE_CHECKING:
    import numpy as np
    from tinygrad.device import Buffer


class Metal(DeviceKind):
    is_unified = True
    default_share = 0.8  # of what the system recommends for the GPU, which already leaves some memory for the rest
    has_kernels = True
    # Metal Feature Set Tables: "maximum buffer argument entries", "threads per threadgroup", "threadgroup memory"
    program_limits = ProgramLimits(arguments=31, threads=1024, shared_bytes=32 << 10)
    safe_threads = 256  # a core runs 384 threads that have all 128 registers (profiling/apple.py: OCCUPANCY)

    def __init__(self) -> None:
        super().__init__("METAL")

    def is_default(self) -> bool:
        return sys.platform == "darwin"

    def why_missing(self) -> str:
        return "" if sys.platform == "darwin" else "METAL is the GPU of a Mac, and this computer is not a Mac"

    def can_be_installed(self) -> bool:
        return sys.platform == "darwin"

    def free_memory(self, name: str) -> int:
        """The system's recommended maximum for the GPU, two thirds to three quarters of a Mac's memory. It must be
        asked before the weights are loaded."""
        from tinygrad import Device

        return int(Device[name].sysdevice.recommendedMaxWorkingSetSize()) or super().free_memory(name)

    def hardware_name(self, name: str) -> str:
        if sys.platform != "darwin":
            return name
        from tinygrad import Device
        from tinygrad.runtime.ops_metal import from_ns_str

        return str(from_ns_str(Device[name].sysdevice.name()))

    def gpu_cores(self, name: str) -> int | None:
        """As the registry of devices has it, since Metal does not say."""
        if sys.platform != "darwin":
            return None
        command = ["/usr/sbin/ioreg", "-rc", "AGXAccelerator", "-d", "1"]
        try:
            text = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False).stdout
        except (OSError, subprocess.TimeoutExpired):
            return None
        return find_gpu_cores(text)

    def output_reader(self, buffer: Buffer) -> MetalReader:
        return MetalReader(buffer)


def find_gpu_cores(text: str) -> int | None:
    """The number of GPU cores in what `ioreg` prints."""
    found = re.search(r'"gpu-core-count"\s*=\s*(\d+)', text)
    return int(found[1]) if found else None


class MetalReader:
    """Waits for the command buffers that were committed up to `start`, and reads the values in place."""

    def __init__(self, buffer: Buffer) -> None:
        from tinygrad import Device

        from tinyvllm.device.mapping import mapped

        self._device, self._array = Device[buffer.device], mapped(buffer)
        self._committed: list[Any] = []

    def start(self) -> None:
        self._committed = list(self._device.mtl_buffers_in_flight)

    def read(self) -> np.ndarray:
        from tinygrad.runtime.ops_metal import wait_check  # loads Metal

        for command_buffer in self._committed:
            wait_check(command_buffer)
        # tinygrad lists the command buffers it has to wait for: those that have ended must leave, or the list grows
        ended = {id(command_buffer) for command_buffer in self._committed}
        in_flight = self._device.mtl_buffers_in_flight
        in_flight[:] = [command_buffer for command_buffer in in_flight if id(command_buffer) not in ended]
        self._committed = []
        return self._array.copy()
