"""Lines of DEBUG=2 for copies. tinygrad's executor prints those of kernels (jit_replay.py); ours bypass it.

A device whose memory the host uses in place (CPU, METAL) has no copies of a step's inputs and output, only of weights.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
from tinygrad import Device
from tinygrad.helpers import DEBUG, GlobalCounters, colored, size_to_str, time_to_str

from tinyvllm.device.mapping import OutputReader

HOST = "host"


def is_watched() -> bool:
    """Whether the user watches kernels: with DEBUG=2 tinygrad prints a line for each kernel that its executor runs."""
    return DEBUG.value >= 2


@contextmanager
def watched_copy(to: str, source: str, nbytes: int) -> Iterator[None]:
    """With DEBUG=2, print a line about the copy in this block, as tinygrad does for its own: `*** CUDA 7 copy  131.07
    MB, CUDA <- host ... GB/s`. Waits for the device. `to` and `source`: devices, one of them HOST."""
    if not is_watched():
        yield
        return
    device = Device[source if to == HOST else to]
    device.synchronize()
    start_s = time.perf_counter()
    yield
    device.synchronize()
    seconds = time.perf_counter() - start_s
    GlobalCounters.kernel_count += 1
    GlobalCounters.time_sum_s += seconds
    text = f"copy {size_to_str(nbytes):>10}, {to[:7]:>7s} <- {source[:7]:7s}"
    name = colored(text, "yellow") + " " * (46 - len(text))
    rate = nbytes * 1e-9 / max(seconds, 1e-9)
    print(
        f"*** {device.device[:7]:7s} {GlobalCounters.kernel_count:4d} {name} "
        f"arg  2 mem {GlobalCounters.mem_used / 1e9:6.2f} GB tm {time_to_str(seconds, w=9)}/"
        f"{GlobalCounters.time_sum_s * 1e3:9.2f}ms ({0:7.0f} GFLOPS {rate:4.0f}|{rate:<6.0f} GB/s)"
    )


def watched_send(send: Callable[[], None], to: str, nbytes: int) -> Callable[[], None]:
    """`send`, which copies a step's inputs to the device."""

    def watched() -> None:
        with watched_copy(to, HOST, nbytes):
            send()

    return watched if is_watched() else send


class WatchedReader:
    """A reader of a step's output that prints a line for its copy."""

    def __init__(self, reader: OutputReader, source: str, nbytes: int) -> None:
        self._reader, self._source, self._nbytes = reader, source, nbytes

    def start(self) -> None:
        self._reader.start()

    def read(self) -> np.ndarray:
        with watched_copy(HOST, self._source, self._nbytes):
            return self._reader.read()
