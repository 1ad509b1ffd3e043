"""Copies of blocks between a CUDA device's pool and pinned memory of the host, beside the steps.

A kernel gathers the pieces of some blocks into one of a few staging buffers on the device, in the order of the steps,
and a second stream copies the buffer to the host meanwhile. The other way, the kernel that scatters the pieces waits
for the second stream. So the host never waits, and the steps wait for the two kernels and for what they read only.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tinygrad import Device, dtypes
from tinygrad.device import Buffer, BufferSpec
from tinygrad.runtime.autogen import cuda
from tinygrad.runtime.ops_cuda import check

from tinyvllm.device.block_copies import Copy, Plane
from tinyvllm.faults import reach

STAGING_BYTES = 16 << 20
NUM_STAGING = 3  # one is filled, one is copied, and one is waited for
THREADS = 256
MIN_IDS = 1 << 15
WAIT_POLL_S = 0.5e-3
EVENT_WITHOUT_TIME = 2  # CU_EVENT_DISABLE_TIMING

# One threadgroup copies one block's piece of one plane. A plane: its address, the words of a piece, and the word of a
# row at which the piece begins.
SOURCE = """
struct Plane { unsigned long long address, words, start; };

extern "C" __global__
void copy_blocks(const Plane* planes, const int* ids, WORD* rows, long long row_words, int is_out) {
  Plane plane = planes[blockIdx.y];
  WORD* piece = (WORD*)plane.address + ids[blockIdx.x] * plane.words;
  WORD* place = rows + blockIdx.x * row_words + plane.start;
  for (unsigned long long i = threadIdx.x; i < plane.words; i += blockDim.x) {
    if (is_out) place[i] = piece[i]; else piece[i] = place[i];
  }
}
"""


def pinned_bytes(device: str, nbytes: int) -> NDArray[np.uint8]:
    """Pinned host memory, for as long as the process lives. May be called from any thread."""
    check(cuda.cuCtxSetCurrent(Device[device].context))
    address = ctypes.c_void_p()
    check(cuda.cuMemHostAlloc(ctypes.byref(address), nbytes, 1))  # CU_MEMHOSTALLOC_PORTABLE
    return np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(address.value or 0))


class CudaCopies:
    """Copies the blocks of some planes of one device."""

    follows_steps = True

    def __init__(self, device: str, planes: Sequence[Plane]) -> None:
        self._device = device
        self._context = Device[device].context
        check(cuda.cuCtxSetCurrent(self._context))
        self._row_bytes = sum(plane.nbytes for plane in planes)
        self._num_planes = len(planes)
        word = next(size for size in (16, 8, 4, 1) if all(plane.nbytes % size == 0 for plane in planes))
        self._row_words = self._row_bytes // word
        self._program = _compile(device, {16: "uint4", 8: "uint2", 4: "unsigned", 1: "unsigned char"}[word])
        self._table = _table(device, planes, word)
        self._stream = cuda.CUstream()
        check(cuda.cuStreamCreate(ctypes.byref(self._stream), cuda.CU_STREAM_NON_BLOCKING))
        self.batch = max(1, STAGING_BYTES // self._row_bytes)  # blocks that are copied at once
        self._staging = [_Staging(device, self.batch, self._row_bytes) for _ in range(NUM_STAGING)]
        self._turns = count()
        self._ids = _Ids(device, max(MIN_IDS, self.batch))

    def copy_out(self, copies: Sequence[Copy]) -> CudaTransfer:
        reach("tier.copy_out")
        check(cuda.cuCtxSetCurrent(self._context))
        transfer = CudaTransfer(self._context, self._stream)
        for staging, part in self._batches(copies):
            check(cuda.cuStreamWaitEvent(None, staging.event, 0))  # until its earlier content has left
            self._launch(staging, part, is_out=True)
            check(cuda.cuEventRecord(staging.event, None))
            check(cuda.cuStreamWaitEvent(self._stream, staging.event, 0))
            for start, rows in _runs(part):
                address = ctypes.c_void_p(rows.ctypes.data)
                place = cuda.CUdeviceptr_v2(staging.address + start * self._row_bytes)
                check(cuda.cuMemcpyDtoHAsync_v2(address, place, rows.nbytes, self._stream))
            check(cuda.cuEventRecord(staging.event, self._stream))
        return transfer.end()

    def copy_in(self, copies: Sequence[Copy]) -> CudaTransfer:
        reach("tier.copy_in")
        check(cuda.cuCtxSetCurrent(self._context))
        transfer = CudaTransfer(self._context, self._stream)
        for staging, part in self._batches(copies):
            check(cuda.cuStreamWaitEvent(self._stream, staging.event, 0))
            for start, rows in _runs(part):
                address = ctypes.c_void_p(rows.ctypes.data)
                place = cuda.CUdeviceptr_v2(staging.address + start * self._row_bytes)
                check(cuda.cuMemcpyHtoDAsync_v2(place, address, rows.nbytes, self._stream))
            check(cuda.cuEventRecord(staging.event, self._stream))
            check(cuda.cuStreamWaitEvent(None, staging.event, 0))
            self._launch(staging, part, is_out=False)
            check(cuda.cuEventRecord(staging.event, None))
        return transfer.end()

    def _batches(self, copies: Sequence[Copy]) -> Iterator[tuple[_Staging, Sequence[Copy]]]:
        for start in range(0, len(copies), self.batch):
            yield self._staging[next(self._turns) % NUM_STAGING], copies[start : start + self.batch]

    def _launch(self, staging: _Staging, copies: Sequence[Copy], *, is_out: bool) -> None:
        """Gather blocks into a staging buffer, or scatter them from it, in the order of the steps."""
        values = (
            ctypes.c_uint64(self._table._buf.value),
            ctypes.c_uint64(self._ids.put([copy.block_id for copy in copies])),
            ctypes.c_uint64(staging.address),
            ctypes.c_int64(self._row_words),
            ctypes.c_int32(is_out),
        )
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        grid = (len(copies), self._num_planes, 1)
        check(cuda.cuLaunchKernel(self._program, *grid, THREADS, 1, 1, 0, None, pointers, None))


class CudaTransfer:
    """What lies between two events of the stream that copies."""

    def __init__(self, context: Any, stream: Any) -> None:
        self._context, self._stream = context, stream
        self._events = [cuda.CUevent(), cuda.CUevent()]
        for event in self._events:
            check(cuda.cuEventCreate(ctypes.byref(event), 0))
        check(cuda.cuEventRecord(self._events[0], stream))
        self._is_done = False
        self.seconds = 0.0

    def end(self) -> CudaTransfer:
        """Nothing more belongs to it."""
        check(cuda.cuEventRecord(self._events[1], self._stream))
        return self

    def is_done(self) -> bool:
        if self._is_done:
            return True
        check(cuda.cuCtxSetCurrent(self._context))
        status = cuda.cuEventQuery(self._events[1])
        if status == cuda.CUDA_ERROR_NOT_READY:
            return False
        check(status)
        milliseconds = ctypes.c_float()
        check(cuda.cuEventElapsedTime(ctypes.byref(milliseconds), *self._events))
        self.seconds, self._is_done = milliseconds.value / 1e3, True
        return True

    def wait(self) -> None:
        while not self.is_done():
            time.sleep(WAIT_POLL_S)

    def __del__(self) -> None:
        for event in self._events:
            cuda.cuEventDestroy_v2(event)


class _Ids:
    """Ids of blocks in pinned memory, where kernels read them. Half of it is written again once the kernels that read
    it have run, so the host waits only if that much is in flight."""

    def __init__(self, device: str, size: int) -> None:
        self._array = pinned_bytes(device, 8 * size).view(np.int32).reshape(2, size)
        self._half, self._next = 0, 0
        self._read = [cuda.CUevent(), cuda.CUevent()]  # of each half: the kernels that read it have run
        for event in self._read:
            check(cuda.cuEventCreate(ctypes.byref(event), EVENT_WITHOUT_TIME))

    def put(self, ids: Sequence[int]) -> int:
        """The address of ids for the kernel that is launched next."""
        if self._next + len(ids) > self._array.shape[1]:
            check(cuda.cuEventRecord(self._read[self._half], None))
            self._half, self._next = 1 - self._half, 0
            check(cuda.cuEventSynchronize(self._read[self._half]))
        place = self._array[self._half, self._next : self._next + len(ids)]
        place[:] = ids
        self._next += len(ids)
        return int(place.ctypes.data)


class _Staging:
    """A buffer on the device. `event`: its latest use has ended."""

    def __init__(self, device: str, num_rows: int, row_bytes: int) -> None:
        self._buffer = Buffer(device, num_rows * row_bytes, dtypes.uint8, options=BufferSpec(nolru=True)).allocate()
        self.address = self._buffer._buf.value
        self.event = cuda.CUevent()
        check(cuda.cuEventCreate(ctypes.byref(self.event), EVENT_WITHOUT_TIME))


def _runs(copies: Sequence[Copy]) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """Rows that follow each other in host memory, with the place of the first among the copies."""
    start = 0
    for end in range(1, len(copies) + 1):
        first, last = copies[start], copies[end - 1]
        is_end = end == len(copies)
        if not is_end and copies[end].rows is first.rows and copies[end].row == last.row + 1:
            continue
        yield start, first.rows[first.row : last.row + 1]
        start = end


def _table(device: str, planes: Sequence[Plane], word: int) -> Buffer:
    rows, start = [], 0
    for plane in planes:
        rows.append((plane.buffer._buf.value, plane.nbytes // word, start))
        start += plane.nbytes // word
    data = np.array(rows, np.uint64)
    table = Buffer(device, data.size, dtypes.uint64, options=BufferSpec(nolru=True)).allocate()
    check(cuda.cuMemcpyHtoD_v2(table._buf, ctypes.c_void_p(data.ctypes.data), data.nbytes))
    return table


def _compile(device: str, word: str) -> Any:
    """The kernel for words of a type, as a function of the driver."""
    compiler = Device[device].compiler
    binary = compiler.compile(SOURCE.replace("WORD", word))
    module, function = cuda.CUmodule(), cuda.CUfunction()
    check(cuda.cuModuleLoadData(ctypes.byref(module), binary))
    check(cuda.cuModuleGetFunction(ctypes.byref(function), module, b"copy_blocks"))
    return function
