"""CUDA: NVIDIA's GPUs, through the driver and its compiler alone."""

from __future__ import annotations

import contextlib
import ctypes
import ctypes.util
import functools
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, ClassVar

from tinyvllm.config import Limits, usable_cores
from tinyvllm.device.kinds.base import DeviceKind, ProgramLimits
from tinyvllm.errors import DeviceError

if TYPE_CHECKING:
    import numpy as np
    from tinygrad.device import Buffer

    from tinyvllm.device.block_copies import BlockCopies, Plane
    from tinyvllm.device.mapping import HostArray
    from tinyvllm.device.recording import RecordedStep

BIG_BYTES = 40 << 30
EVENT_WITHOUT_TIME = 2  # CU_EVENT_DISABLE_TIMING
SLOT_BYTES = 8 << 20  # of pinned memory, through which weights reach the device
NUM_SLOTS = 4  # and threads that fill them


class Cuda(DeviceKind):
    # loads of 16 bytes of float16; METAL has no such vectors
    settings: ClassVar[Mapping[str, str]] = {"ALLOW_HALF8": "1"}
    has_kernels = True
    pins_host_memory = True
    # CUDA C++ Programming Guide, "technical specifications per compute capability": static shared memory, parameters of
    # 8 bytes
    program_limits = ProgramLimits(arguments=512, threads=1024, shared_bytes=48 << 10)

    def __init__(self) -> None:
        super().__init__("CUDA")

    def is_default(self) -> bool:
        return ctypes.util.find_library("cuda") is not None

    def why_missing(self) -> str:
        return "" if self.is_default() else "this computer has no NVIDIA driver (libcuda)"

    def step_limits(self, free_bytes: Callable[[], int]) -> Limits:
        """As many sequences as still raise the decoding rate: an H200 decodes 86,000 tokens a second with 128 and
        120,000 with 256 (1B parameters). A step of 8192 tokens takes it 29 ms."""
        if free_bytes() >= BIG_BYTES:
            return Limits(max_num_seqs=256, max_num_batched_tokens=8192)
        return Limits(max_num_seqs=128, max_num_batched_tokens=2048)

    def wake(self) -> None:
        with contextlib.suppress(OSError):  # opening the device says what is missing
            ctypes.CDLL("libcuda.so.1").cuInit(0)

    def free_memory(self, name: str) -> int:
        from tinygrad import Device
        from tinygrad.runtime.autogen import cuda  # loads the driver

        cuda.cuCtxSetCurrent(Device[name].context)  # the calling thread may not be the one that opened the device
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        status = cuda.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total))
        if status != 0:
            raise DeviceError(f"cuMemGetInfo failed with CUDA error {status}: give --num-gpu-blocks-override")
        return free.value

    def hardware_name(self, name: str) -> str:
        from tinygrad.runtime.autogen import cuda  # loads the driver

        number = int(name.partition(":")[2] or 0)
        handle, text = cuda.CUdevice(), ctypes.create_string_buffer(256)
        failed = cuda.cuDeviceGet(ctypes.byref(handle), number) or cuda.cuDeviceGetName(text, len(text), handle)
        return f"CUDA:{number}" if failed else text.value.decode(errors="replace")

    def input_array(self, buffer: Buffer) -> HostArray:
        pinned = _Pinned(buffer.device, buffer.size)
        return pinned.array, lambda: _send(buffer, pinned)

    def copy_in(self, buffer: Buffer, data: np.ndarray) -> bool:
        if data.nbytes < SLOT_BYTES:
            return False
        _staging(buffer.device).copy_in(buffer, data)
        return True

    def clear(self, buffer: Buffer) -> bool:
        from tinygrad.runtime.autogen import cuda  # loads the driver

        _check(cuda.cuMemsetD8Async(buffer._buf, 0, buffer.nbytes, None))
        return True

    def output_reader(self, buffer: Buffer) -> CudaReader:
        return CudaReader(buffer)

    def block_copies(self, name: str, planes: Sequence[Plane]) -> BlockCopies:
        from tinyvllm.device.cuda_blocks import CudaCopies  # loads the driver

        return CudaCopies(name, planes)

    def host_bytes(self, name: str, nbytes: int) -> np.ndarray:
        from tinyvllm.device.cuda_blocks import pinned_bytes  # loads the driver

        return pinned_bytes(name, nbytes)

    def make_replay(self, name: str, step: RecordedStep) -> Callable[[], Any] | None:
        from tinyvllm.device.cuda_graph import ChainReplay, fits_chain  # loads the driver

        return ChainReplay(name, step) if fits_chain(step) else None


@functools.cache
def _staging(device: str) -> _Staging:
    return _Staging(device)


class _Staging:
    """Copies host memory to a device through a ring of slots of pinned memory, which several threads fill while the
    device fetches others. tinygrad's copy pins as much memory as it copies, for good, and one thread fills it."""

    def __init__(self, device: str) -> None:
        from tinygrad.runtime.autogen import cuda  # loads the driver

        self._cuda = cuda
        self._slots = [_Pinned(device, SLOT_BYTES // 4) for _ in range(NUM_SLOTS)]
        self._events = [cuda.CUevent() for _ in self._slots]  # when the device has fetched what a slot has
        for event in self._events:
            _check(cuda.cuEventCreate(ctypes.byref(event), EVENT_WITHOUT_TIME))
        self._next = 0

    def copy_in(self, buffer: Buffer, data: np.ndarray) -> None:
        import numpy as np

        source = data.reshape(-1).view(np.uint8)
        filling: deque[tuple[int, int, Future[None]]] = deque()  # (slot, place, when it is full), in order
        with ThreadPoolExecutor(min(NUM_SLOTS, usable_cores())) as threads:
            for start in range(0, source.size, SLOT_BYTES):
                if len(filling) == NUM_SLOTS:
                    self._send(buffer, source.size, *filling.popleft())
                slot, self._next = self._next, (self._next + 1) % NUM_SLOTS
                _check(self._cuda.cuEventSynchronize(self._events[slot]))
                part = source[start : start + SLOT_BYTES]
                target = self._slots[slot].array.view(np.uint8)[: part.size]
                filling.append((slot, start, threads.submit(np.copyto, target, part)))
            while filling:
                self._send(buffer, source.size, *filling.popleft())

    def _send(self, buffer: Buffer, size: int, slot: int, start: int, full: Future[None]) -> None:
        cuda, count = self._cuda, min(SLOT_BYTES, size - start)
        full.result()
        place = cuda.CUdeviceptr_v2(buffer._buf.value + start)
        _check(cuda.cuMemcpyHtoDAsync_v2(place, self._slots[slot].address, count, None))
        _check(cuda.cuEventRecord(self._events[slot], None))


class CudaReader:
    """Enqueues a copy to pinned memory after the step and an event after the copy, and waits for the event."""

    def __init__(self, buffer: Buffer) -> None:
        from tinygrad.runtime.autogen import cuda  # loads the driver

        self._cuda, self._buffer, self._pinned = cuda, buffer, _Pinned(buffer.device, buffer.size)
        self._event = cuda.CUevent()
        _check(cuda.cuEventCreate(ctypes.byref(self._event), EVENT_WITHOUT_TIME))
        self._sent: list[Any] = []  # tinygrad's staging buffers of earlier copies: it frees them only when idle

    def start(self) -> None:
        from tinygrad import Device

        cuda, device = self._cuda, Device[self._buffer.device]
        self._sent += device.pending_copyin
        device.pending_copyin.clear()
        _check(cuda.cuMemcpyDtoHAsync_v2(self._pinned.address, self._buffer._buf, self._pinned.array.nbytes, None))
        _check(cuda.cuEventRecord(self._event, None))

    def read(self) -> np.ndarray:
        from tinygrad import Device

        _check(self._cuda.cuEventSynchronize(self._event))
        allocator = Device[self._buffer.device].allocator
        for opaque, size, options in self._sent:
            allocator.free(opaque, size, options)
        self._sent.clear()
        return self._pinned.array.copy()


class _Pinned:
    """Int32 words of pinned host memory, which a CUDA device accesses directly."""

    def __init__(self, device: str, words: int) -> None:
        import numpy as np
        from tinygrad import dtypes
        from tinygrad.device import Buffer, BufferSpec

        self._buffer = Buffer(device, words, dtypes.int, options=BufferSpec(host=True, nolru=True)).allocate()
        self.address = self._buffer._buf
        self.array = np.ctypeslib.as_array((ctypes.c_int32 * words).from_address(self.address.value))
        self.array[:] = 0


def _send(buffer: Buffer, pinned: _Pinned) -> None:
    from tinygrad.runtime.autogen import cuda

    _check(cuda.cuMemcpyHtoDAsync_v2(buffer._buf, pinned.address, pinned.array.nbytes, None))


def _check(status: int) -> None:
    from tinygrad.runtime.ops_cuda import check  # raises RuntimeError with the driver's message

    check(status)
