"""Counts of what the host asks of the device: launches, waits, copies and compilations.

While it is open, a `DeviceAccount` hooks our own replays, tinygrad's executor and compiler, the waits and copies of
tinygrad's device and, on CUDA, the driver's functions. So it also counts accidents: a stray `.numpy()`, a tensor
operation in the step loop, a graph that is captured again. Each event costs about a microsecond more, so times are
measured without an account.
"""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from tinygrad import Device
from tinygrad.engine import realize
from tinygrad.helpers import GlobalCounters, ansistrip
from tinygrad.uop.ops import Ops

from tinyvllm.device import handle as device_module
from tinyvllm.device import replay
from tinyvllm.device.compiling import Compiler
from tinyvllm.device.handle import DeviceHandle
from tinyvllm.device.jit_replay import JitReplay
from tinyvllm.device.kinds.metal import MetalReader
from tinyvllm.device.mapping import is_mapped

CUDA_WAITS = ("cuCtxSynchronize", "cuStreamSynchronize", "cuEventSynchronize")
CUDA_COPIES_IN = ("cuMemcpyHtoD_v2", "cuMemcpyHtoDAsync_v2")
CUDA_COPIES_OUT = ("cuMemcpyDtoH_v2", "cuMemcpyDtoHAsync_v2")  # (to, from, bytes, ...), all four


@dataclass
class DeviceCounts:
    """Counts since the last `take`.

    `replays`: launches of recorded steps, with `kernels` kernels in all, as `graph_launches` graphs and
    `single_launches` single kernels (on a device without graphs), and `barriers` at which a kernel waits for an earlier
    one: on a CPU for one of another core, on a GPU for any. `eager_kernels`: kernels outside of recorded steps,
    which `kernels` includes. `syncs`: waits for the device; a blocking copy on CUDA waits too and is not among them.
    Where the host reads the device's memory in place (CPU, METAL), each access to a buffer counts as a copy of it.
    """

    replays: int = 0
    kernels: int = 0
    barriers: int = 0
    graph_launches: int = 0
    single_launches: int = 0
    eager_kernels: int = 0
    syncs: int = 0
    copies_h2d: int = 0
    copies_d2h: int = 0
    bytes_h2d: int = 0
    bytes_d2h: int = 0
    compilations: int = 0  # schedules with kernels to lower, whether or not a cache had them
    compile_s: float = 0.0  # in tinygrad's code generation and its compiler
    replay_s: float = 0.0  # building, launching and waiting for recorded steps
    details: Counter[str] = field(default_factory=Counter)  # kernels outside of recorded steps, and their devices

    @property
    def numbers(self) -> dict[str, int]:
        """The counts by name."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if type(value) is int}


class DeviceAccount:
    """Counts inside its `with` block. One at a time, on the thread that drives the device."""

    def __init__(self, device: DeviceHandle) -> None:
        self.device = device
        self._counts = DeviceCounts()
        self._is_replaying = self._is_waiting = self._is_writing = False
        self._hooks = ExitStack()

    def take(self) -> DeviceCounts:
        """The counts since the last call. Counting starts at zero again."""
        counts, self._counts = self._counts, DeviceCounts()
        return counts

    def used_memory(self) -> int:
        """Bytes of all buffers on the device, by tinygrad's own count."""
        return sum(GlobalCounters.mem_used_per_device[name] for name in self._names)

    @property
    def _names(self) -> tuple[str, ...]:
        return self.device.cores or (self.device.name,)

    def __enter__(self) -> DeviceAccount:
        hook = self._hook
        kinds: list[type[Any]] = [replay.GraphReplay, JitReplay]
        if self.device.is_cpu:
            from tinyvllm.device.cpu_replay import CpuReplay  # takes 0.3 s to import

            kinds.append(CpuReplay)
        for kind in kinds:
            hook(kind, "__init__", self._on_make_replay)
            hook(kind, "__call__", self._on_replay)
        hook(realize, "track_stats", self._on_executed)
        hook(realize, "lower_and_compile", self._on_compile)
        hook(Compiler, "programs", self._on_make_programs)
        hook(DeviceHandle, "wait", self._on_wait)
        if self.device.name.split(":")[0] == "CUDA":
            self._hook_driver()
            return self
        hook(device_module, "_copy_in", self._on_write)
        hook(device_module, "_nap_until", self._on_wait)
        hook(MetalReader, "read", self._on_metal_read)
        for name in self._names:
            opened = Device[name]
            hook(opened, "synchronize", self._on_wait)
            hook(opened.allocator, "_copyin", self._on_copy_in)
            hook(opened.allocator, "_copyout", self._on_copy_out)
            if is_mapped(name):
                hook(opened.allocator, "_as_buffer", self._on_reach)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._hooks.close()

    def _hook_driver(self) -> None:
        """Every wait and copy on CUDA ends in these functions."""
        from tinygrad.runtime.autogen import cuda  # only where there is a driver to load

        from tinyvllm.device.cuda_graph import ChainReplay

        self._hook(ChainReplay, "__init__", self._on_make_replay)
        self._hook(ChainReplay, "__call__", self._on_replay)
        for name in CUDA_WAITS:
            self._hook(cuda, name, self._on_driver_wait)
        for name in CUDA_COPIES_IN:
            self._hook(cuda, name, self._on_driver_copy_in)
        for name in CUDA_COPIES_OUT:
            self._hook(cuda, name, self._on_driver_copy_out)

    def _hook(self, owner: Any, name: str, handler: Callable[..., Any]) -> None:
        """Call `handler(original, *args)` in place of an attribute until the account closes."""
        original = getattr(owner, name)
        is_own = name in vars(owner)

        def hooked(*args: Any, **kwargs: Any) -> Any:
            return handler(original, *args, **kwargs)

        setattr(owner, name, hooked)
        self._hooks.callback(setattr, owner, name, original) if is_own else self._hooks.callback(delattr, owner, name)

    # -- handlers ----------------------------------------------------------------------------------------------------

    def _on_make_replay(self, original: Callable[..., None], *args: Any) -> None:
        with self._timed("replay_s"):
            original(*args)

    def _on_replay(self, original: Callable[..., None], one: replay.Replay) -> None:
        self._counts.replays += 1
        self._counts.kernels += len(one.step.calls)
        self._counts.barriers += one.num_barriers
        self._counts.graph_launches += one.is_own_launch  # the others' go through tinygrad's executor
        with self._flag("_is_replaying"), self._timed("replay_s"):
            original(one)

    def _on_executed(self, original: Callable[..., None], context: Any, call: Any, *args: Any) -> None:
        target, counts = call.src[0], self._counts
        is_graph = target.op is Ops.CUSTOM_FUNCTION and target.arg == "graph"
        if self._is_replaying:
            counts.graph_launches += is_graph
            counts.single_launches += target.op is Ops.PROGRAM
        elif is_graph or target.op is Ops.PROGRAM:
            num_kernels = len(target.src[0].src) if is_graph else 1
            counts.kernels += num_kernels
            counts.eager_kernels += num_kernels
            name = "a graph" if is_graph else ansistrip(target.arg.name)
            counts.details[f"{name} on {call.src[1].device}"] += 1
        original(context, call, *args)

    def _on_compile(self, original: Callable[..., Any], linear: Any) -> Any:
        self._counts.compilations += any(call.src[0].op is Ops.SINK for call in linear.src)
        with self._timed("compile_s"):
            return original(linear)

    def _on_make_programs(self, original: Callable[..., Any], compiler: Any, kernels: Any) -> Any:
        """Programs of a recorded step. Only waiting for them counts, not the compilers in other processes."""
        self._counts.compilations += 1
        with self._timed("compile_s"):
            return original(compiler, kernels)

    def _on_wait(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A wait for a device or for all its cores. Waits inside it are part of the same one."""
        if self._is_waiting or self.device.name.split(":")[0] == "CUDA":  # there the driver's functions are counted
            return original(*args, **kwargs)
        self._counts.syncs += 1
        with self._flag("_is_waiting"), self._timed("replay_s"):
            return original(*args, **kwargs)

    def _on_metal_read(self, original: Callable[..., Any], reader: Any) -> Any:
        values = self._on_wait(original, reader)
        self._book(False, values.nbytes)
        return values

    def _on_write(self, original: Callable[..., None], *args: Any) -> None:
        with self._flag("_is_writing"):
            original(*args)

    def _on_reach(self, original: Callable[..., memoryview], *args: Any) -> memoryview:
        view = original(*args)
        self._book(self._is_writing, view.nbytes)
        return view

    def _on_copy_in(self, original: Callable[..., None], dest: Any, src: memoryview) -> None:
        self._book(True, src.nbytes)
        original(dest, src)

    def _on_copy_out(self, original: Callable[..., None], dest: memoryview, src: Any) -> None:
        self._book(False, dest.nbytes)
        original(dest, src)

    def _on_driver_wait(self, original: Callable[..., int], *args: Any) -> int:
        self._counts.syncs += 1
        with self._timed("replay_s"):
            return original(*args)

    def _on_driver_copy_in(self, original: Callable[..., int], to: Any, source: Any, nbytes: int, *args: Any) -> int:
        self._book(True, nbytes)
        return original(to, source, nbytes, *args)

    def _on_driver_copy_out(self, original: Callable[..., int], to: Any, source: Any, nbytes: int, *args: Any) -> int:
        self._book(False, nbytes)
        return original(to, source, nbytes, *args)

    def _book(self, is_in: bool, nbytes: int) -> None:
        if is_in:
            self._counts.copies_h2d += 1
            self._counts.bytes_h2d += nbytes
        else:
            self._counts.copies_d2h += 1
            self._counts.bytes_d2h += nbytes

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        start_s = time.perf_counter()
        try:
            yield
        finally:
            setattr(self._counts, name, getattr(self._counts, name) + time.perf_counter() - start_s)

    @contextmanager
    def _flag(self, name: str) -> Iterator[None]:
        before = getattr(self, name)
        setattr(self, name, True)
        try:
            yield
        finally:
            setattr(self, name, before)
