"""A quick test of a device's memory bandwidth, from which the floor of a step's time is computed."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from tinygrad import Tensor, TinyJit, dtypes

from tinyvllm.device.handle import DeviceHandle

ROUNDS = 40  # the fastest counts: a floor is what the memory can do, not what other programs leave of it
CPU_BYTES = 64 << 20  # read by each core: larger than any cache
GPU_BYTES = 256 << 20  # copied
GPU_COPIES = 16  # in one graph: single launches from Python take three times as long on an H200


def measure_bandwidth(device: DeviceHandle) -> float:
    """Bytes per second. On a CPU all cores read, as decoding does; elsewhere of a copy, counting reads and writes."""
    return _cpu_bandwidth() if device.is_cpu else _copy_bandwidth(device)


def _cpu_bandwidth() -> float:
    """By NumPy's maximum, which vectorizes and releases the GIL. (The additions of a sum would wait for each other.)"""
    cores = os.cpu_count() or 1
    parts = [np.ones(CPU_BYTES // 4, np.int32) for _ in range(cores)]
    with ThreadPoolExecutor(cores) as pool:
        return cores * CPU_BYTES / _fastest(lambda: list(pool.map(np.max, parts)))


def _copy_bandwidth(device: DeviceHandle) -> float:
    source = Tensor.zeros(GPU_BYTES // 4, dtype=dtypes.uint, device=device.name).clone().realize()

    def copies() -> Tensor:
        copy = source
        for number in range(GPU_COPIES):
            copy = (copy ^ (number + 1)).contiguous()
        return copy.realize()

    captured = TinyJit(copies)

    def round_of_copies() -> None:
        captured()
        device.wait()

    for _ in range(3):  # the second call captures, the third builds the graph
        round_of_copies()
    return 2 * GPU_COPIES * GPU_BYTES / _fastest(round_of_copies)


def _fastest(work: Callable[[], object]) -> float:
    """Seconds of the fastest of ROUNDS."""
    best = float("inf")
    for _ in range(ROUNDS):
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best
