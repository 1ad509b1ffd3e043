"""Running a recorded step repeatedly, each time with one call: on a CPU from a table (cpu_replay.py), on other devices
as tinygrad's graph, or a chain (cuda_graph.py). With TinyJit: jit_replay.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from tinygrad import UOp
from tinygrad.device import DepsTracker
from tinygrad.engine.jit import graph_split_rewrite
from tinygrad.engine.realize import get_runtime, run_linear, runtime_cache
from tinygrad.helpers import JIT
from tinygrad.uop.ops import CallInfo, Ops

from tinyvllm.device.handle import DeviceHandle
from tinyvllm.device.recording import Call, RecordedStep


class Replay(Protocol):
    """A function that enqueues a step. `num_barriers`: how often a kernel waits for an earlier one. `is_own_launch`: it
    bypasses tinygrad's executor."""

    step: RecordedStep
    is_own_launch: bool

    @property
    def num_barriers(self) -> int: ...

    def __call__(self) -> None: ...


def make_replay(device: DeviceHandle, step: RecordedStep) -> Callable[[], None]:
    """A function that enqueues the step and keeps its buffers alive."""
    for call in step.calls:
        _load_once(call)
    if device.is_cpu:
        from tinyvllm.device.cpu_replay import CpuReplay  # takes 0.3 s to import

        return CpuReplay(device.cores, step)
    return device.kind.make_replay(device.name, step) or GraphReplay(step)


_loaded: dict[tuple[str, bytes], UOp] = {}  # by device and binary: the program for which it was loaded


def _load_once(call: Call) -> None:
    """Have programs that differ in the number of their work items share the binary that is loaded."""
    program, device = call.target, call.buffers[0].device
    if program.op is not Ops.PROGRAM or (program.key, device) in runtime_cache:
        return
    binary = next((uop.arg for uop in program.src if uop.op is Ops.BINARY), None)
    if binary is not None:
        first = _loaded.setdefault((device, binary), program)
        runtime_cache[program.key, device] = get_runtime(device, first)


class LazyReplay:
    """A replay that is built when it first runs."""

    def __init__(self, device: DeviceHandle, step: RecordedStep) -> None:
        self._device, self.step = device, step
        self._replay: Callable[[], None] | None = None

    def __call__(self) -> None:
        if self._replay is None:
            self._replay = make_replay(self._device, self.step)
        self._replay()


class GraphReplay:
    """A step as tinygrad's graph of the device, or as single launches on a device without graphs."""

    is_own_launch = False

    def __init__(self, step: RecordedStep) -> None:
        self._linear = UOp(Ops.LINEAR, src=tuple(_call(call) for call in step.calls))
        if JIT < 2:
            # one batch: tinygrad's batches of 32, 64, ... let the device begin while the host encodes the rest; this
            # one is encoded once, and a step is launched while the previous one runs
            self._linear = graph_split_rewrite(self._linear, max_batch_size=0)
        self.step = step

    @property
    def num_barriers(self) -> int:
        """On METAL tinygrad sets one before every command. Elsewhere a kernel waits if it depends on an earlier one."""
        if self.step.calls and self.step.calls[0].buffers[0].device.split(":")[0] == "METAL":
            return len(self.step.calls)
        return count_dependent(self.step)

    def __call__(self) -> None:
        run_linear(self._linear, jit=True)


def count_dependent(step: RecordedStep) -> int:
    """The calls that touch memory which an earlier one writes, or write memory which an earlier one touches."""
    tracker = DepsTracker()
    written = [list(call.target.arg.outs) if call.target.op is Ops.PROGRAM else [0] for call in step.calls]
    return sum(
        bool(tracker.access_resources(list(call.buffers), outs, number))
        for number, (call, outs) in enumerate(zip(step.calls, written, strict=True))
    )


def _call(call: Call) -> UOp:
    """A launch. Not by UOp.call, which mistakes a program's loops with a length from data for open ones."""
    return UOp(Ops.CALL, src=(call.target, *(UOp.from_buffer(buffer) for buffer in call.buffers)), arg=CallInfo())
