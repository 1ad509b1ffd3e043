"""Memory that device and host share, and what moves bytes where they share none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeAlias

import numpy as np
from tinygrad import Device
from tinygrad.device import Buffer

HostArray: TypeAlias = tuple[np.ndarray, Callable[[], None]]  # int32 words, and what enqueues their copy to the device
RowWriter: TypeAlias = Callable[[int, np.ndarray], None]  # (row, its first values)


class OutputReader(Protocol):
    """Reads one int32 tensor, while steps that write elsewhere may run."""

    def start(self) -> None:
        """Enqueue reading the tensor's values as they are once everything enqueued before has run."""

    def read(self) -> np.ndarray:
        """A copy of the values. Waits for the last `start`, and for nothing enqueued after it."""


def is_mapped(device: str) -> bool:
    """Whether the host can read and write the device's buffers in place (CPU, METAL). tinygrad's allocators say so by
    having the method."""
    return hasattr(Device[device].allocator, "_as_buffer")


def mapped(buffer: Buffer) -> np.ndarray:
    """The int32 words of a buffer that the host reads and writes in place."""
    return np.frombuffer(buffer.as_memoryview(force_zero_copy=True, no_sync=True), np.int32)
