"""The device that the engine runs on: its name, its memory, and copies to it and back."""

from __future__ import annotations

import functools
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tinygrad import Device, Tensor, UOp, dtypes
from tinygrad.device import Buffer, BufferSpec
from tinygrad.dtype import DType, _from_np_dtype
from tinygrad.uop.ops import buffers

from tinyvllm.device import helper_programs
from tinyvllm.device.block_copies import BlockCopies, MappedCopies, Plane, Rows
from tinyvllm.device.chunks import Chunks
from tinyvllm.device.cpu_runtime import cpu_runtime
from tinyvllm.device.kinds import DeviceKind, choice, kind_of
from tinyvllm.device.mapping import OutputReader, is_mapped
from tinyvllm.device.meta import has_memory
from tinyvllm.device.transfer import InputBuffer, copy_out, copy_out_floats, input_buffer, output_reader
from tinyvllm.device.watching import HOST, WatchedReader, is_watched, watched_copy, watched_send
from tinyvllm.errors import DeviceError, TinyvllmError
from tinyvllm.faults import reach
from tinyvllm.processes import explain_limit

# tinygrad's wait spins, which takes a core from the workers: with naps 60 products on two cores take 2.6 ms, not 4.1
NAP_S = 30e-6
KERNEL_STACK_BYTES = 64 << 20  # CPU kernels keep tiles on the stack; a Mac's threads get 512 KiB by default
MAX_UNIFIED_SHARE = 0.9  # of shared memory, whatever is asked for
COPIED_BYTES = 64 << 20  # zeros up to this size are copied; beyond, a kernel is faster than the bus

_CHUNKS = Chunks()

FLOATS = {"float32": dtypes.float, "float16": dtypes.half, "bfloat16": dtypes.bfloat16}


@dataclass(frozen=True)
class DeviceHandle:
    """An open device. `has_threads`: kernels run in threadgroups (on every GPU) rather than on a core."""

    name: str  # tinygrad's name: CPU, METAL, CUDA, CL
    has_threads: bool
    is_unified: bool  # it shares the computer's memory
    cores: tuple[str, ...] = ()  # on a CPU: tinygrad's name of each core's device

    @property
    def is_cpu(self) -> bool:
        return self.name.split(":")[0] == "CPU"

    @property
    def kind(self) -> DeviceKind:
        return kind_of(self.name)

    def free_memory(self) -> int:
        """Bytes that could be allocated now."""
        return self.kind.free_memory(self.name)

    def default_share(self) -> float:
        """Share of the free memory that the engine takes by default."""
        return self.kind.default_share

    @property
    def max_share(self) -> float:
        """The largest allowed share. The computer needs part of a shared memory itself."""
        return MAX_UNIFIED_SHARE if self.is_unified else 1.0

    def check_share(self, share: float) -> None:
        """Raise TinyvllmError for more than `max_share`."""
        if share > self.max_share:
            raise TinyvllmError(
                f"--gpu-memory-utilization is {share:g}, but {self.name} shares its memory with the computer: give at "
                f"most {self.max_share:g}"
            )

    def wait(self) -> None:
        """Return when everything enqueued has run. On a CPU this naps, so that the workers keep their cores."""
        if self.is_cpu:
            for core in self.cores:
                _nap_until_done(Device[core])
        for name in self.cores or (self.name,):
            Device[name].synchronize()

    def mark(self) -> Callable[[], None]:
        """A function that waits for everything enqueued by now; on a CPU, for nothing enqueued later."""
        if not self.is_cpu:
            return self.wait
        queues = [_counters(worker) for core in self.cores for worker in Device[core].workers]
        return functools.partial(_nap_until, [(done, int(put[0])) for put, done in queues])

    def upload(self, array: np.ndarray) -> Tensor:
        """Copy a host array to a new flat tensor on the device."""
        return upload(array, self.name)

    def zeros(self, size: int, dtype: DType, core: str | None = None) -> Tensor:
        """A flat zeroed tensor. On a CPU it is fresh anonymous memory: zero, and taking no room until it is used."""
        reach("device.allocate")
        if not self.is_cpu:
            return self._cleared(size, dtype)
        return Tensor(_fresh(core or self.name, size, dtype))

    def _cleared(self, size: int, dtype: DType) -> Tensor:
        """Without a kernel if possible: one is compiled for each size, and the first starts the compiling processes."""
        uop = UOp.new_buffer(self.name, size, dtype)
        buffer = uop.buffer.allocate()
        if not has_memory(self.name) or self.kind.clear(buffer):
            return Tensor(uop)
        if buffer.nbytes > COPIED_BYTES:
            return Tensor.zeros(size, dtype=dtype, device=self.name).clone().realize()
        _copy_in(buffer, np.zeros(buffer.nbytes, np.uint8))
        return Tensor(uop)

    @property
    def _is_mapped(self) -> bool:
        return is_mapped(self.name)

    def input_buffer(self, words: int) -> InputBuffer:
        """A persistent zeroed tensor for a step's inputs."""
        made = input_buffer(self.zeros(words, dtypes.int), self._is_mapped)
        if self._is_mapped:
            return made
        return replace(made, send=watched_send(made.send, self.name, made.host.nbytes))

    def output_reader(self, tensor: Tensor) -> OutputReader:
        """A reader of a step's output that does not wait for later steps."""
        reader = output_reader(tensor, self._is_mapped, self.mark)
        return reader if self._is_mapped or not is_watched() else WatchedReader(reader, self.name, tensor.nbytes())

    def block_copies(self, planes: Sequence[Plane]) -> BlockCopies:
        """What copies blocks of these planes to host memory and back. Raises DeviceError where nothing does."""
        if self._is_mapped:
            return MappedCopies(planes)
        copies = self.kind.block_copies(self.name, planes)
        if copies is None:
            raise DeviceError(
                f"{self.name} cannot copy KV blocks to host memory yet: leave out --kv-offloading-size and "
                "--kv-disk-cache, or use CPU, METAL or CUDA"
            )
        return copies

    @property
    def pins_host_memory(self) -> bool:
        """Whether `host_rows` takes long: up to 0.4 s a GiB."""
        return self.kind.pins_host_memory

    def host_rows(self, num_rows: int, nbytes: int) -> Rows:
        """Host memory that the device copies from and to fastest, pinned if need be. May be called from any thread."""
        pinned = self.kind.host_bytes(self.name, num_rows * nbytes)
        return (np.empty(num_rows * nbytes, np.uint8) if pinned is None else pinned).reshape(num_rows, nbytes)

    def write(self, tensor: Tensor, array: np.ndarray) -> None:
        """Overwrite the beginning of a realized tensor with an array's bytes. Waits for the device."""
        self.wait()
        _copy_in(tensor.uop.base.buffer.ensure_allocated(), array)

    def read_floats(self, buffer: Buffer) -> np.ndarray:
        """A copy of a float buffer's values as float32. Waits for the device."""
        self.wait()
        return copy_out_floats(buffer, self._is_mapped)

    def read(self, tensor: Tensor) -> np.ndarray:
        """A copy of a realized int32 tensor's values. Waits for the device."""
        return self.read_ints(tensor.uop.base.buffer)

    def read_ints(self, buffer: Buffer) -> np.ndarray:
        """A copy of an int32 buffer's values. Waits for the device."""
        self.wait()
        return copy_out(buffer, self._is_mapped)


def open_device(num_cores: int = 1, programs: Path | None = None) -> DeviceHandle:
    """Open tinygrad's default device; on a CPU, `num_cores` cores, each of which is a device with a worker thread.
    `programs`: the folder in which those that tinygrad needs there are kept; None: they are not.

    Raises DeviceError, which names what is missing and what to install."""
    wanted = os.environ.get("DEV", "")
    if wanted:
        kind_of(wanted).check()
    _let_open_devices_be_used()
    previous = threading.stack_size(KERNEL_STACK_BYTES)  # opening the CPU device starts its worker thread
    cores: tuple[str, ...] = ()
    helper_programs.keep(programs)
    try:
        if Device.DEFAULT.split(":")[0] == "CPU":
            runtime: Any = cpu_runtime()  # here: takes 0.1 s
            runtime.do_to_program = helper_programs.helper_program
        device = Device[Device.DEFAULT]
        kind_of(device.device).opened(device.device)
        if device.device.split(":")[0] == "CPU":
            cores = ("CPU", *[f"CPU:{i}" for i in range(1, num_cores)])
            for core in cores:
                Device[core].worker("COMPUTE:0")
    except Exception as error:
        name = wanted or "of tinygrad"
        if (advice := explain_limit(error)) is not None:
            raise DeviceError(f"device {name} cannot be opened: {advice}") from error
        raise DeviceError(
            f"device {name} cannot be opened: {kind_of(wanted).why_missing() or error}. Instead, {choice(wanted)}"
        ) from error
    finally:
        threading.stack_size(previous)
    return DeviceHandle(device.device, bool(device.renderer.has_local), kind_of(device.device).is_unified, cores)


@functools.cache
def _let_open_devices_be_used() -> None:
    """While a thread generates code, tinygrad lets nobody use a device, so that none is opened. But a buffer may be
    freed then, by the garbage collector or another thread, and would stay mapped for the other cores."""
    kind: Any = type(Device)
    get = kind.__getitem__

    def get_open(self: Any, name: str) -> Any:
        known = self.canonicalize(name)
        return self._Device__get_canonicalized_item(known) if known in self._opened_devices else get(self, name)

    kind.__getitem__ = get_open


def upload(array: np.ndarray, device: str) -> Tensor:
    """Copy a host array to a new flat tensor on `device`. Bypasses tinygrad's scheduler, which takes 2 ms a tensor."""
    reach("device.allocate")
    dtype = _from_np_dtype(array.dtype)
    if device.split(":")[0] == "CPU":
        uop = _fresh(device, array.size, dtype, of_chunk=True)
        _copy_in(uop.buffer, array, waits=False)
        return Tensor(uop)
    uop = UOp.new_buffer(device, array.size, dtype)
    _copy_in(uop.buffer.allocate(), array)
    return Tensor(uop)


def _fresh(core: str, size: int, dtype: DType, *, of_chunk: bool = False) -> UOp:
    """A buffer of a CPU, of memory that the system has just given, zeroed. A recycled one would have its old contents,
    and may still be in use. of_chunk: in one mapping with others, which it keeps alive."""
    uop, memory = UOp.new_buffer(core, size, dtype), None
    if of_chunk and has_memory(core):
        address, mapping = _CHUNKS.take(size * dtype.itemsize)
        memory = Device[core].allocator._alloc(size * dtype.itemsize, BufferSpec(external_ptr=address))
        memory.meta = mapping  # where tinygrad keeps its own
    buffers[uop] = Buffer(core, size, dtype, options=BufferSpec(nolru=True)).allocate(memory).ref(1)
    return uop


def _copy_in(buffer: Buffer, array: np.ndarray, *, waits: bool = True) -> None:
    """Overwrite the beginning of a buffer. Waits for the device, which may still use recycled memory, unless told that
    it does not use this."""
    if not has_memory(buffer.device):
        return
    reach("device.copy_in")
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    with watched_copy(buffer.device, HOST, data.size):
        if is_mapped(buffer.device):
            memory = buffer.as_memoryview(force_zero_copy=True, no_sync=not waits)
            np.frombuffer(memory, np.uint8)[: data.size] = data
        elif not kind_of(buffer.device).copy_in(buffer, data):
            # tinygrad takes writable memory only, and a checkpoint's values are views of a file's pages
            data = data if data.flags.writeable else data.copy()
            buffer.allocator._copyin(buffer._buf, data.data)


def has_many_registers() -> bool:
    """Whether the CPU device's programs have 32 vector registers of 256 bits (AVX-512VL) rather than 16, or narrower
    ones: this computer has them, and DEV names no other processor (as CPU::x86_64,haswell)."""
    _, processor, *features = f"{Device['CPU'].renderer.target.arch},".split(",")
    excluded = [feature for feature in features if feature.startswith("-avx512")]
    return sys.platform.startswith("linux") and processor == "native" and not excluded and "avx512vl" in _cpu_flags()


@functools.cache
def _cpu_flags() -> frozenset[str]:
    """The instruction sets of this computer, under Linux's names. Products ask for them in every layer."""
    with open("/proc/cpuinfo") as file:
        return frozenset(flag for line in file if line.startswith("flags") for flag in line.split())


def has_dot_instructions() -> bool:
    """Whether the CPU device's processor multiplies pairs of 16-bit integers in one instruction: every x86."""
    return str(Device["CPU"].renderer.target.arch).startswith("x86_64")


def has_half(name: str) -> bool:
    """Whether the device computes in float16. If not, tinygrad emulates it without subnormal numbers, which are common
    among the scales of Q6_K."""
    return dtypes.half in Device[name].renderer.supported_dtypes()


def _nap_until_done(device: Any) -> None:
    """Nap until the workers' queues are empty."""
    _nap_until([(done, int(put[0])) for put, done in map(_counters, device.workers)])


def _counters(worker: Any) -> tuple[Any, Any]:
    """A worker's counters, views of one word each: `put`, commands submitted; `done`, commands that have run."""
    put, done = (getattr(worker, name)._buf.cpu_view().view(fmt="Q") for name in ("put", "done"))
    return put, done


def _nap_until(goals: list[tuple[Any, int]]) -> None:
    for done, goal in goals:
        while done[0] < goal:
            time.sleep(NAP_S)
