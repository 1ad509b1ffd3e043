"""The hardware of a device: its name, and its measured speed where no table has it."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np
from tinygrad import Device, Tensor, TinyJit, dtypes

from tinyvllm.device.handle import DeviceHandle

CPU_SIZE, GPU_SIZE = 512, 4096  # rows and columns of the products that are timed: 1 to 100 ms
ROUNDS = 60  # the fastest counts


def hardware_name(device: DeviceHandle) -> str:
    """The maker's name ("NVIDIA H200", "Apple M4"), or tinygrad's name of the device if there is none."""
    return device.kind.hardware_name(device.name)


def architecture(device: DeviceHandle) -> str:
    """The target of the kernels: the family of a Mac's GPU ("Apple9"), CUDA's "sm_90"; "" on a CPU."""
    return "" if device.is_cpu else str(Device[device.name].renderer.target.arch)


def has_graphs(device: DeviceHandle) -> bool:
    """Whether a step is launched as one graph. Not on virtualized Metal, where indirect commands do not work."""
    return device.is_cpu or Device[device.name].graph is not None


def processor_name() -> str:
    """The maker's name of the computer's CPU, or "" if the system has none."""
    if sys.platform == "darwin":
        return subprocess.check_output(["sysctl", "-n", "machdep.cpu.brand_string"], text=True).strip()
    try:
        with open("/proc/cpuinfo") as file:
            return next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), "")
    except OSError:
        return ""


def measure_flops(device: DeviceHandle) -> float:
    """Operations per second of a matrix product; a multiplication and an addition are two. On a CPU it is NumPy's, in
    float32 with its BLAS's threads; elsewhere it is tinygrad's untuned product in float16."""
    return _cpu_flops() if device.is_cpu else _gpu_flops(device)


def _cpu_flops() -> float:
    a = np.random.default_rng(0).standard_normal((CPU_SIZE, CPU_SIZE), np.float32)
    return 2 * CPU_SIZE**3 / _fastest(lambda: a @ a)


def _gpu_flops(device: DeviceHandle) -> float:
    a, b = (Tensor.rand(GPU_SIZE, GPU_SIZE, device=device.name).cast(dtypes.half).realize() for _ in range(2))
    product = TinyJit(lambda: (a @ b).realize())

    def run() -> None:
        product()
        device.wait()

    run()
    run()  # captures
    return 2 * GPU_SIZE**3 / _fastest(run)


def _fastest(work: Callable[[], object]) -> float:
    """Seconds of the fastest of ROUNDS."""
    best = float("inf")
    for _ in range(ROUNDS):
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best
