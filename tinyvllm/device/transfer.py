"""Moving a step's inputs to the device and its output back while other steps run.

Both pass through memory that device and host share: on METAL and a CPU that is all memory, on CUDA it is pinned memory
of the host. So only `OutputReader.read` waits, and for one step only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from tinygrad import Device, Tensor, dtypes
from tinygrad.device import Buffer

from tinyvllm.device.kinds import kind_of
from tinyvllm.device.mapping import OutputReader, mapped


@dataclass(frozen=True)
class InputBuffer:
    """A persistent int32 tensor, the host array to fill, and `send`, which enqueues the copy from array to tensor.

    The array may be filled again once a step that was enqueued after `send` has ended."""

    tensor: Tensor
    host: np.ndarray
    send: Callable[[], None]


def input_buffer(tensor: Tensor, is_mapped: bool) -> InputBuffer:
    """Inputs in a realized int32 tensor. Where memory is mapped, the host array is the tensor's own memory."""
    buffer = tensor.uop.base.buffer.ensure_allocated()
    if is_mapped:
        Device[buffer.device].synchronize()  # a kernel in flight that zeroes it would overwrite what the host writes
        return InputBuffer(tensor, mapped(buffer), lambda: None)
    own = kind_of(buffer.device).input_array(buffer)
    if own is not None:
        return InputBuffer(tensor, *own)
    host, allocator = np.zeros(buffer.size, np.int32), Device[buffer.device].allocator
    # the allocator's copy: Buffer.copy_from would schedule a graph for each
    return InputBuffer(tensor, host, lambda: allocator._copyin(buffer._buf, host.data.cast("B")))


def output_reader(tensor: Tensor, is_mapped: bool, mark: Callable[[], Callable[[], None]]) -> OutputReader:
    """A reader of a realized int32 tensor. `mark` returns a function that waits for everything enqueued before it."""
    buffer = tensor.uop.base.buffer.ensure_allocated()
    return kind_of(buffer.device).output_reader(buffer) or _PlainReader(buffer, is_mapped, mark)


def copy_out(buffer: Buffer, is_mapped: bool) -> np.ndarray:
    """A copy of an int32 buffer's values, now."""
    if is_mapped:
        return mapped(buffer).copy()
    host = np.empty(buffer.size, np.int32)
    Device[buffer.device].allocator._copyout(host.data.cast("B"), buffer._buf)
    return host


def copy_out_floats(buffer: Buffer, is_mapped: bool) -> np.ndarray:
    """A copy of a float buffer's values, now, as float32."""
    if is_mapped:
        data = np.frombuffer(buffer.as_memoryview(force_zero_copy=True, no_sync=True), np.uint8)
    else:
        data = np.empty(buffer.nbytes, np.uint8)
        Device[buffer.device].allocator._copyout(data.data, buffer._buf)
    if buffer.dtype == dtypes.bfloat16:
        return (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return data.view(np.float16 if buffer.dtype == dtypes.half else np.float32).astype(np.float32)


class _PlainReader:
    """Waits for a mark in the device's queue, then copies."""

    def __init__(self, buffer: Buffer, is_mapped: bool, mark: Callable[[], Callable[[], None]]) -> None:
        self._buffer, self._is_mapped, self._mark = buffer, is_mapped, mark
        self._wait = mark()

    def start(self) -> None:
        self._wait = self._mark()

    def read(self) -> np.ndarray:
        self._wait()
        return copy_out(self._buffer, self._is_mapped)
