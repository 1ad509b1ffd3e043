"""Metal's objects: device, buffers, pipelines, command buffers, indirect command buffers.

Command buffers run when somebody waits for them, or for a later one, and not before: whoever reads a result without
waiting reads what was there before, and whoever writes into a buffer of a command buffer in flight is found by the
buffer's checksum (buffers up to CHECKED_BYTES). New memory is full of NaN.
"""

from __future__ import annotations

import ctypes
import mmap
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from tests.metal.simulator.msl import MAX_BUFFERS, MAX_THREADGROUP_BYTES, MAX_THREADS, SIMDGROUP, Kernel, read_kernel
from tests.metal.simulator.native import Argument, CompilerError, KernelFault, Natives
from tests.metal.simulator.objective_c import Data, NSError, NSString, Object

ANY_ROWS = "_4096x"  # in the names of kernels for any number of rows (device/recording.py, MOST_ROWS)
CHECKED_BYTES = 1 << 20  # larger buffers are weights and pools, which no host writes between steps
POISONED_BYTES = 64 << 20  # larger buffers stay zero, and take no memory before they are written
MAX_OFFSET = 0xFFFFFFFF  # of a buffer in an indirect command: 32 bits
LIBRARY_HEAD, LIBRARY_TAIL = b"MTLB", b"ENDT"  # what tinygrad looks for in Apple's format
Size = tuple[int, int, int]


class MetalError(RuntimeError):
    """The caller broke a rule of Metal's interface: what Xcode's API validation stops at."""


@dataclass
class Settings:
    """What a simulated computer is like, and what is watched."""

    natives: Natives
    family: str = "Apple9"
    name: str = "Simulated Apple GPU"
    memory_bytes: int = 16 << 30
    # nothing is compiled, checked or run; new buffers are zeros, and take no memory before the host looks at them
    is_dry: bool = False
    watches_device_memory: bool = False  # who reads what another thread of the same dispatch wrote
    watches_host_writes: bool = True  # whether the host writes into a buffer that a command buffer in flight uses
    num_command_buffers: int = 0  # committed
    num_graph_runs: int = 0
    launches: list[str] | None = None  # names of kernels as they run, where somebody listens
    _order: int = field(default=0, repr=False)

    def next_is_reversed(self) -> bool:
        """By turns: an order between threadgroups that a kernel relies on shows in one of them."""
        self._order ^= 1
        return bool(self._order)


class MTLDevice(Object):
    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.settings = settings
        self._name = NSString(settings.name)

    def name(self) -> NSString:
        return self._name

    def supportsFamily_(self, family: int) -> bool:
        """Families count up by their generation: 1007 is Apple7, 2002 is Mac2."""
        kind, number = self.settings.family.rstrip("0123456789"), int(self.settings.family[-1])
        first = {"Apple": 1000, "Mac": 2000}[kind]
        return first < family <= first + number

    def recommendedMaxWorkingSetSize(self) -> int:
        """About what a Mac of 16 GiB says."""
        return self.settings.memory_bytes * 2 // 3

    def maxBufferLength(self) -> int:
        return self.settings.memory_bytes // 2

    def newCommandQueueWithMaxCommandBufferCount_(self, count: int) -> MTLCommandQueue:
        return MTLCommandQueue(self.settings, count)

    def newSharedEvent(self) -> MTLSharedEvent:
        return MTLSharedEvent()

    def newBufferWithLength_options_(self, length: int, options: int) -> MTLBuffer | None:
        return None if length > self.maxBufferLength() else MTLBuffer(length, is_poisoned=not self.settings.is_dry)

    def newLibraryWithData_error_(self, data: Data, error: Any) -> MTLLibrary | None:
        content = data.content
        if not (content.startswith(LIBRARY_HEAD) and content.endswith(LIBRARY_TAIL)):
            NSError("Invalid library file").store(error)
            return None
        return MTLLibrary(read_kernel(content[len(LIBRARY_HEAD) : -len(LIBRARY_TAIL)].decode()))

    def newComputePipelineStateWithDescriptor_options_reflection_error_(
        self, descriptor: MTLComputePipelineDescriptor, options: int, reflection: Any, error: Any
    ) -> MTLComputePipelineState | None:
        assert descriptor.function is not None, "setComputeFunction comes first"
        kernel = descriptor.function.kernel
        if kernel.threadgroup_bytes > MAX_THREADGROUP_BYTES and not self.settings.is_dry:
            NSError(
                f"{kernel.name}: Threadgroup memory size ({kernel.threadgroup_bytes}) exceeds the maximum threadgroup "
                f"memory allowed ({MAX_THREADGROUP_BYTES})"
            ).store(error)
            return None
        return MTLComputePipelineState(kernel, descriptor.for_indirect)

    def newIndirectCommandBufferWithDescriptor_maxCommandCount_options_(
        self, descriptor: MTLIndirectCommandBufferDescriptor, count: int, options: int
    ) -> MTLIndirectCommandBuffer:
        return MTLIndirectCommandBuffer(descriptor, count)


class MTLSharedEvent(Object):
    """Between devices, of which there is one: nothing waits for it."""


class MTLBuffer(Object):
    def __init__(self, length: int, *, is_poisoned: bool = True) -> None:
        super().__init__()
        self.length = length
        self._is_poisoned = is_poisoned and length <= POISONED_BYTES
        self._shadow: mmap.mmap | None = None

    @cached_property
    def _memory(self) -> mmap.mmap:
        return mmap.mmap(-1, max(1, self.length))

    @cached_property
    def base(self) -> int:
        """The memory's address. There is none before somebody asks."""
        address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        if self._is_poisoned:
            ctypes.memset(address, 0xFF, self.length)
        return address

    def contents(self) -> int:
        return self.base

    def shadow(self) -> int:
        """The address of 8 bytes for each of the buffer's, made when first asked for."""
        if self._shadow is None:
            self._shadow = mmap.mmap(-1, self.length * 8)
        return ctypes.addressof(ctypes.c_char.from_buffer(self._shadow))

    def checksum(self) -> int:
        return zlib.crc32((ctypes.c_char * self.length).from_address(self.base))


class MTLLibrary(Object):
    def __init__(self, kernel: Kernel) -> None:
        super().__init__()
        self.kernel = kernel

    def newFunctionWithName_(self, name: NSString) -> MTLFunction | None:
        return MTLFunction(self.kernel) if name.text == self.kernel.name else None


class MTLFunction(Object):
    def __init__(self, kernel: Kernel) -> None:
        super().__init__()
        self.kernel = kernel


class MTLComputePipelineDescriptor(Object):
    def __init__(self) -> None:
        super().__init__()
        self.function: MTLFunction | None = None
        self.for_indirect = False

    @classmethod
    def new(cls) -> MTLComputePipelineDescriptor:
        return cls()

    def setComputeFunction_(self, function: MTLFunction) -> None:
        self.function = function

    def setSupportIndirectCommandBuffers_(self, value: bool) -> None:
        self.for_indirect = value


class MTLComputePipelineState(Object):
    def __init__(self, kernel: Kernel, for_indirect: bool) -> None:
        super().__init__()
        self.kernel, self.for_indirect = kernel, for_indirect

    def maxTotalThreadsPerThreadgroup(self) -> int:
        return MAX_THREADS

    def threadExecutionWidth(self) -> int:
        return SIMDGROUP

    def staticThreadgroupMemoryLength(self) -> int:
        return self.kernel.threadgroup_bytes


# -- commands ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bound:
    """A buffer at a place of the argument table, or bytes that were copied there."""

    buffer: MTLBuffer
    offset: int


@dataclass
class Command:
    """A dispatch in the making."""

    pipeline: MTLComputePipelineState | None = None
    bound: dict[int, Bound] = field(default_factory=dict)
    grid: Size = (0, 0, 0)
    threads: Size = (0, 0, 0)
    has_barrier: bool = False

    def bind(self, buffer: MTLBuffer, offset: int, index: int) -> None:
        if index >= MAX_BUFFERS:
            raise MetalError(f"buffer index {index} is not below {MAX_BUFFERS}")
        if buffer is None or offset > buffer.length:
            raise MetalError(f"offset {offset} at index {index} is past the buffer's end")
        self.bound[index] = Bound(buffer, offset)

    def run(self, settings: Settings) -> None:
        """Raises MetalError, KernelFault, CompilerError."""
        assert self.pipeline is not None, "a dispatch needs a pipeline"
        if settings.is_dry:
            return
        kernel = self.pipeline.kernel
        total = self.threads[0] * self.threads[1] * self.threads[2]
        if total > MAX_THREADS:
            raise MetalError(f"{kernel.name}: {total} threads in a threadgroup, but at most {MAX_THREADS} can be")
        if total == 0 or 0 in self.grid:
            return
        if settings.launches is not None:
            settings.launches.append(kernel.name)
        arguments = [self._argument(kernel, index, settings) for index in range(len(kernel.params))]
        is_reversed = settings.next_is_reversed()
        settings.natives.run(kernel, arguments, self.grid, self.threads, is_reversed=is_reversed)

    def _argument(self, kernel: Kernel, index: int, settings: Settings) -> Argument:
        param = kernel.params[index]
        if index not in self.bound:
            raise MetalError(f"{kernel.name}: nothing is bound at index {index}, where {param.name} is")
        buffer, offset = self.bound[index].buffer, self.bound[index].offset
        nbytes = param.nbytes if param.nbytes is not None else buffer.length - offset
        if ANY_ROWS in kernel.name:  # it has room for more rows than it is launched for
            nbytes = min(nbytes, buffer.length - offset)
        if offset + nbytes > buffer.length:
            raise MetalError(
                f"{kernel.name}: {param.name} takes {nbytes} bytes, but {buffer.length - offset} are bound at {index}"
            )
        shadow = buffer.shadow() + offset * 8 if settings.watches_device_memory and not param.is_constant else 0
        return Argument(buffer.base + offset, nbytes, shadow)


class MTLIndirectCommandBufferDescriptor(Object):
    def __init__(self) -> None:
        super().__init__()
        self.max_buffers = 0

    @classmethod
    def new(cls) -> MTLIndirectCommandBufferDescriptor:
        return cls()

    def setCommandTypes_(self, types: int) -> None:
        pass

    def setInheritBuffers_(self, value: bool) -> None:
        assert not value, "inherited buffers are not simulated"

    def setInheritPipelineState_(self, value: bool) -> None:
        assert not value, "inherited pipelines are not simulated"

    def setMaxKernelBufferBindCount_(self, count: int) -> None:
        if count > MAX_BUFFERS:
            raise MetalError(f"an indirect command has at most {MAX_BUFFERS} buffers, not {count}")
        self.max_buffers = count


class MTLIndirectComputeCommand(Object):
    """A place in an indirect command buffer. Asking for it again gives another object of the same command."""

    def __init__(self, command: Command, max_buffers: int) -> None:
        super().__init__()
        self.command, self.max_buffers = command, max_buffers

    def setComputePipelineState_(self, pipeline: MTLComputePipelineState) -> None:
        if not pipeline.for_indirect:
            raise MetalError(f"{pipeline.kernel.name} was not made for indirect command buffers")
        self.command.pipeline = pipeline

    def setKernelBuffer_offset_atIndex_(self, buffer: MTLBuffer, offset: int, index: int) -> None:
        if offset > MAX_OFFSET:
            raise MetalError(f"offset {offset} at index {index}: an indirect command keeps 32 bits of it")
        if index >= self.max_buffers:
            raise MetalError(f"buffer index {index} is not below the {self.max_buffers} of the descriptor")
        self.command.bind(buffer, offset, index)

    def concurrentDispatchThreadgroups_threadsPerThreadgroup_(self, grid: Any, threads: Any) -> None:
        self.command.grid, self.command.threads = _size(grid), _size(threads)

    def setBarrier(self) -> None:
        self.command.has_barrier = True


class MTLIndirectCommandBuffer(Object):
    def __init__(self, descriptor: MTLIndirectCommandBufferDescriptor, count: int) -> None:
        super().__init__()
        self.commands = [Command() for _ in range(count)]
        self.max_buffers = descriptor.max_buffers

    def indirectComputeCommandAtIndex_(self, index: int) -> MTLIndirectComputeCommand:
        return MTLIndirectComputeCommand(self.commands[index], self.max_buffers)


class MTLComputeCommandEncoder(Object):
    def __init__(self, owner: MTLCommandBuffer) -> None:
        super().__init__()
        self._owner, self._command = owner, Command()
        self._resident: set[int] = set()  # addresses of buffers that indirect commands may use
        self._pipelines: set[int] = set()  # that were set here

    def setComputePipelineState_(self, pipeline: MTLComputePipelineState) -> None:
        self._command.pipeline = pipeline
        self._pipelines.add(pipeline.address)

    def setBuffer_offset_atIndex_(self, buffer: MTLBuffer, offset: int, index: int) -> None:
        self._command.bind(buffer, offset, index)

    def setBytes_length_atIndex_(self, data: bytes, length: int, index: int) -> None:
        if length > 4096:
            raise MetalError(f"setBytes takes at most 4 KiB, not {length}")
        copy = MTLBuffer(length)
        ctypes.memmove(copy.base, data, length)
        self._command.bind(copy, 0, index)
        self._owner.owned.append(copy)

    def useResources_count_usage_(self, resources: Any, count: int, usage: int) -> None:
        self._resident |= {resources[i].value for i in range(count)}

    def dispatchThreadgroups_threadsPerThreadgroup_(self, grid: Any, threads: Any) -> None:
        done = Command(self._command.pipeline, dict(self._command.bound), _size(grid), _size(threads))
        self._owner.add([done])

    def executeCommandsInBuffer_withRange_(self, indirect: MTLIndirectCommandBuffer, span: Any) -> None:
        commands = indirect.commands[span.location : span.location + span.length]
        for number, command in enumerate(commands):
            self._check_indirect(command, is_last=number == len(commands) - 1)
        self._owner.settings.num_graph_runs += 1
        # the arguments are read when the commands run: whoever changes them before that is too early
        self._owner.add(commands)

    def _check_indirect(self, command: Command, *, is_last: bool) -> None:
        assert command.pipeline is not None, "an indirect command needs a pipeline"
        name = command.pipeline.kernel.name
        if self._owner.needs_pipelines and command.pipeline.address not in self._pipelines:
            raise MetalError(f"{name}: kIOGPUCommandBufferCallbackErrorInvalidResource (pipeline not resident)")
        for index, bound in command.bound.items():
            if bound.buffer.address not in self._resident:
                raise MetalError(f"{name}: the buffer at index {index} is not among those of useResources")
        if not command.has_barrier and not is_last:
            raise MetalError(f"{name}: without a barrier the next indirect command runs beside it")

    def endEncoding(self) -> None:
        self._owner.is_encoding = False


class MTLBlitCommandEncoder(Object):
    def __init__(self, owner: MTLCommandBuffer) -> None:
        super().__init__()
        self._owner = owner

    def copyFromBuffer_sourceOffset_toBuffer_destinationOffset_size_(
        self, source: MTLBuffer, start: int, target: MTLBuffer, at: int, size: int
    ) -> None:
        if start + size > source.length or at + size > target.length:
            raise MetalError(f"a copy of {size} bytes goes beyond a buffer's end")
        self._owner.add([Copy(source, start, target, at, size)])

    def endEncoding(self) -> None:
        self._owner.is_encoding = False


@dataclass(frozen=True)
class Copy:
    source: MTLBuffer
    start: int
    target: MTLBuffer
    at: int
    size: int

    @property
    def bound(self) -> dict[int, Bound]:
        return {0: Bound(self.source, self.start), 1: Bound(self.target, self.at)}

    def run(self, settings: Settings) -> None:
        ctypes.memmove(self.target.base + self.at, self.source.base + self.start, self.size)


def _size(size: Any) -> Size:
    return size.width, size.height, size.depth


# -- command buffers ---------------------------------------------------------------------------------------------------


class MTLCommandQueue(Object):
    """Runs command buffers in the order of their commits."""

    def __init__(self, settings: Settings, capacity: int) -> None:
        super().__init__()
        self.settings, self._capacity = settings, capacity
        self._in_flight: list[MTLCommandBuffer] = []
        self._checksums: dict[MTLBuffer, int] = {}  # of buffers in use by a command buffer in flight

    def commandBuffer(self) -> MTLCommandBuffer:
        return MTLCommandBuffer(self)

    def commit(self, command_buffer: MTLCommandBuffer) -> None:
        while len(self._in_flight) >= self._capacity:
            self._run(self._in_flight.pop(0))
        self.settings.num_command_buffers += 1
        command_buffer.retain()
        for buffer in command_buffer.checked_buffers():
            self._check(buffer, command_buffer)
            self._checksums[buffer] = buffer.checksum()
        self._in_flight.append(command_buffer)

    def wait(self, command_buffer: MTLCommandBuffer) -> None:
        while not command_buffer.is_done:
            self._run(self._in_flight.pop(0))

    def _run(self, command_buffer: MTLCommandBuffer) -> None:
        try:
            for buffer in command_buffer.checked_buffers():
                self._check(buffer, command_buffer)
            command_buffer.run()
        except (MetalError, KernelFault, CompilerError) as error:
            command_buffer.failure = NSError(str(error))
        command_buffer.is_done = True
        still_used = {buffer for other in self._in_flight for buffer in other.checked_buffers()}
        for buffer in command_buffer.checked_buffers():
            if buffer in still_used:
                self._checksums[buffer] = buffer.checksum()  # the commands may have written it
            else:
                self._checksums.pop(buffer, None)
        command_buffer.release()

    def _check(self, buffer: MTLBuffer, command_buffer: MTLCommandBuffer) -> None:
        is_written = buffer in self._checksums and self._checksums[buffer] != buffer.checksum()
        if is_written and self.settings.watches_host_writes:
            raise MetalError(
                f"the host wrote into a buffer of {buffer.length} bytes, which {command_buffer.user_of(buffer)} of "
                f"{command_buffer.title} uses, while this or one before it was in flight"
            )


class MTLCommandBuffer(Object):
    def __init__(self, queue: MTLCommandQueue) -> None:
        super().__init__()
        self._queue = queue
        self.settings = queue.settings
        self.is_encoding = self.is_committed = self.is_done = False
        self.failure: NSError | None = None
        self.owned: list[MTLBuffer] = []
        self._label: NSString | None = None
        self._commands: list[Command | Copy] = []
        self._start_s = self._end_s = 0.0
        # before Apple9 a pipeline must have been used in the encoder, or the GPU faults (tinygrad's FIX_METAL_ICB)
        family = self.settings.family
        self.needs_pipelines = not family.startswith("Apple") or int(family[-1]) < 9

    @property
    def title(self) -> str:
        return f"command buffer {self._label.text!r}" if self._label else "a command buffer"

    def add(self, commands: Sequence[Command | Copy]) -> None:
        self._commands += commands

    def checked_buffers(self) -> list[MTLBuffer]:
        buffers = {bound.buffer for command in self._commands for bound in command.bound.values()}
        return [buffer for buffer in buffers if buffer.length <= CHECKED_BYTES and not self.settings.is_dry]

    def user_of(self, buffer: MTLBuffer) -> str:
        """The first command that a buffer is bound to, and where."""
        uses = ((command, *item) for command in self._commands for item in command.bound.items())
        command, index = next((command, index) for command, index, bound in uses if bound.buffer is buffer)
        if isinstance(command, Copy) or command.pipeline is None:
            return "a copy"
        return f"{command.pipeline.kernel.name} at index {index}"

    def run(self) -> None:
        self._start_s = time.perf_counter()
        for command in self._commands:
            command.run(self.settings)
        self._end_s = time.perf_counter()

    def dealloc(self) -> None:
        for buffer in self.owned:
            buffer.release()

    # -- messages ------------------------------------------------------------------------------------------------------

    def computeCommandEncoder(self) -> MTLComputeCommandEncoder:
        self._begin_encoding()
        return MTLComputeCommandEncoder(self)

    def blitCommandEncoder(self) -> MTLBlitCommandEncoder:
        self._begin_encoding()
        return MTLBlitCommandEncoder(self)

    def _begin_encoding(self) -> None:
        if self.is_encoding or self.is_committed:
            raise MetalError("an encoder is open, or the command buffer is committed")
        self.is_encoding = True

    def setLabel_(self, label: NSString) -> None:
        self._label = label

    def label(self) -> NSString | None:
        return self._label

    def commit(self) -> None:
        if self.is_encoding or self.is_committed:
            raise MetalError("a command buffer is committed once, after endEncoding")
        self.is_committed = True
        self._queue.commit(self)

    def waitUntilCompleted(self) -> None:
        if not self.is_committed:
            raise MetalError("waiting for a command buffer that was not committed")
        self._queue.wait(self)

    def error(self) -> NSError | None:
        return self.failure.retain() if self.failure is not None else None  # type: ignore[return-value]

    def GPUStartTime(self) -> float:
        return self._start_s

    def GPUEndTime(self) -> float:
        return self._end_s
