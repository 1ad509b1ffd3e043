"""Moving a step's inputs to the device and its output back while other steps run.

Both pass through memory that device and host share: on METAL and a CPU that is all memory, on CUDA it is pinned memory
of the host. So only `OutputReader.read` waits, and for one step only.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from tinygrad import Device, Tensor, dtypes
from tinygrad.device import Buffer, BufferSpec

EVENT_WITHOUT_TIME = 2  # CU_EVENT_DISABLE_TIMING


@dataclass(frozen=True)
class InputBuffer:
    """A persistent int32 tensor, the host array to fill, and `send`, which enqueues the copy from array to tensor.

    The array may be filled again once a step that was enqueued after `send` has ended."""

    tensor: Tensor
    host: np.ndarray
    send: Callable[[], None]


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


def input_buffer(tensor: Tensor, is_mapped: bool) -> InputBuffer:
    """Inputs in a realized int32 tensor. Where memory is mapped, the host array is the tensor's own memory."""
    buffer = tensor.uop.base.buffer.ensure_allocated()
    if is_mapped:
        Device[buffer.device].synchronize()  # a kernel in flight that zeroes it would overwrite what the host writes
        return InputBuffer(tensor, mapped(buffer), lambda: None)
    if _kind(buffer) == "CUDA":
        pinned = _Pinned(buffer.device, buffer.size)
        return InputBuffer(tensor, pinned.array, lambda: _cuda_send(buffer, pinned))
    host, allocator = np.zeros(buffer.size, np.int32), Device[buffer.device].allocator
    # the allocator's copy: Buffer.copy_from would schedule a graph for each
    return InputBuffer(tensor, host, lambda: allocator._copyin(buffer._buf, host.data.cast("B")))


def output_reader(tensor: Tensor, is_mapped: bool, mark: Callable[[], Callable[[], None]]) -> OutputReader:
    """A reader of a realized int32 tensor. `mark` returns a function that waits for everything enqueued before it."""
    buffer = tensor.uop.base.buffer.ensure_allocated()
    kind = _kind(buffer)
    if kind == "CUDA":
        return _CudaReader(buffer)
    if kind == "METAL":
        return _MetalReader(buffer)
    return _PlainReader(buffer, is_mapped, mark)


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


def mapped(buffer: Buffer) -> np.ndarray:
    """The int32 words of a buffer that the host reads and writes in place."""
    return np.frombuffer(buffer.as_memoryview(force_zero_copy=True, no_sync=True), np.int32)


def _kind(buffer: Buffer) -> str:
    return buffer.device.split(":")[0]


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


class _MetalReader:
    """Waits for the command buffers that were committed up to `start`, and reads the values in place."""

    def __init__(self, buffer: Buffer) -> None:
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


class _CudaReader:
    """Enqueues a copy to pinned memory after the step and an event after the copy, and waits for the event."""

    def __init__(self, buffer: Buffer) -> None:
        from tinygrad.runtime.autogen import cuda  # loads the driver

        self._cuda, self._buffer, self._pinned = cuda, buffer, _Pinned(buffer.device, buffer.size)
        self._event = cuda.CUevent()
        _check(cuda.cuEventCreate(ctypes.byref(self._event), EVENT_WITHOUT_TIME))
        self._sent: list[Any] = []  # tinygrad's staging buffers of earlier copies: it frees them only when idle

    def start(self) -> None:
        cuda, device = self._cuda, Device[self._buffer.device]
        self._sent += device.pending_copyin
        device.pending_copyin.clear()
        _check(cuda.cuMemcpyDtoHAsync_v2(self._pinned.address, self._buffer._buf, self._pinned.array.nbytes, None))
        _check(cuda.cuEventRecord(self._event, None))

    def read(self) -> np.ndarray:
        _check(self._cuda.cuEventSynchronize(self._event))
        allocator = Device[self._buffer.device].allocator
        for opaque, size, options in self._sent:
            allocator.free(opaque, size, options)
        self._sent.clear()
        return self._pinned.array.copy()


class _Pinned:
    """Int32 words of pinned host memory, which a CUDA device accesses directly."""

    def __init__(self, device: str, words: int) -> None:
        self._buffer = Buffer(device, words, dtypes.int, options=BufferSpec(host=True, nolru=True)).allocate()
        self.address = self._buffer._buf
        self.array = np.ctypeslib.as_array((ctypes.c_int32 * words).from_address(self.address.value))
        self.array[:] = 0


def _cuda_send(buffer: Buffer, pinned: _Pinned) -> None:
    from tinygrad.runtime.autogen import cuda

    _check(cuda.cuMemcpyHtoDAsync_v2(buffer._buf, pinned.address, pinned.array.nbytes, None))


def _check(status: int) -> None:
    from tinygrad.runtime.ops_cuda import check  # raises RuntimeError with the driver's message

    check(status)
