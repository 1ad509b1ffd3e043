"""The hardware of a device: its name, and its measured speed where no table has it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable

from tinygrad import Device, Tensor, TinyJit, dtypes

from tinyvllm.device.handle import DeviceHandle
from tinyvllm.errors import DeviceError

CPU_SIZE, GPU_SIZE = 512, 4096  # rows and columns of the products that are timed: 1 to 100 ms
ROUNDS = 60  # the fastest counts; on a CPU, the median
ROUNDS_S = 3.0  # time for them elsewhere: one takes a second where OpenCL runs on a CPU
PRODUCTS_S = 120.0  # time for the products of a CPU, which take less than a second if nothing else runs


def hardware_name(device: DeviceHandle) -> str:
    """The maker's name ("NVIDIA H200", "Apple M4"), or tinygrad's name of the device if there is none."""
    return device.kind.hardware_name(device.name)


def gpu_cores(device: DeviceHandle) -> int | None:
    """The number of cores of a Mac's GPU; None elsewhere."""
    return device.kind.gpu_cores(device.name)


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
    float32 on each of the device's cores; elsewhere it is tinygrad's untuned product in float16."""
    return _cpu_flops(len(device.cores)) if device.is_cpu else _gpu_flops(device)


# One thread multiplies, and its processor time is taken: the threads of NumPy's library wait for each other, so on a
# busy machine wall time gives a rate that is 10 to 16 times too low. The median, because the processor's frequency
# changes.
_PRODUCTS = f"""
import statistics, time, numpy
a = numpy.random.default_rng(0).standard_normal(({CPU_SIZE}, {CPU_SIZE}), numpy.float32)
def product():
    start = time.thread_time()
    a @ a
    return time.thread_time() - start
product()
print({2 * CPU_SIZE**3} / statistics.median(product() for _ in range({ROUNDS})))
"""
_ONE_THREAD = dict.fromkeys(
    ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"), "1"
)


def _cpu_flops(num_cores: int) -> float:
    """By a process for each core, all at the same time. They are processes because the number of the library's threads
    is an environment variable. Raises DeviceError."""
    command = [sys.executable, "-c", _PRODUCTS]
    running = [
        subprocess.Popen(command, env=os.environ | _ONE_THREAD, stdout=subprocess.PIPE, text=True)
        for _ in range(num_cores)
    ]
    outputs = [process.communicate(timeout=PRODUCTS_S)[0] for process in running]
    try:
        return sum(float(output) for output in outputs)
    except ValueError:
        raise DeviceError("the speed of matrix products cannot be measured: give --chip NAME") from None


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
    """Seconds of the fastest of ROUNDS, or of as many as there is time for."""
    best, end = float("inf"), time.perf_counter() + ROUNDS_S
    for _ in range(ROUNDS):
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
        if time.perf_counter() > end:
            break
    return best
