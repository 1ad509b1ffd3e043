"""How long each kernel of a recorded step takes.

On a CPU the step runs as it does when serving, on all cores, with a timestamp before and after every kernel, which
costs 30 to 60 ns each. On other devices kernels run one at a time, with a wait after each, because a graph hides them:
CUDA does not report the times of a graph's nodes, and tinygrad's times on METAL are the graph's time, spread evenly.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from tinygrad import UOp
from tinygrad.engine.realize import get_runtime
from tinygrad.uop.ops import Ops

from tinyvllm.device.handle import DeviceHandle
from tinyvllm.device.recording import Call, RecordedStep, record
from tinyvllm.device.replay import GraphReplay
from tinyvllm.errors import InvariantError
from tinyvllm.ops.kernel.body import F32, Body, cached_kernel, empty, finish, run_kernel

SPIN_ITERATIONS = 1 << 15  # of about four cycles: 75 us at 1.75 GHz, longer than a launch takes in Python


@dataclass(frozen=True)
class CallTime:
    """One run of one call. `start_ns`: perf_counter_ns at its start; on a GPU, at its launch."""

    start_ns: int
    seconds: float


Timer = Callable[[], list[CallTime]]  # runs the step once, and returns a time for each of its calls


def make_timer(device: DeviceHandle, step: RecordedStep) -> Timer:
    """A function that runs a step with the present contents of its buffers, and times its calls in order."""
    return _stamped(device, step) if device.is_cpu else _one_by_one(device, step)


def _stamped(device: DeviceHandle, step: RecordedStep) -> Timer:
    from tinyvllm.device.cpu_replay import CpuReplay  # takes 0.3 s to import

    stamps = np.zeros((len(step.calls), 2, 2), np.uint64)
    replay = CpuReplay(device.cores, step, stamps)

    def run() -> list[CallTime]:
        replay()
        device.wait()
        ends = (stamps[..., 0] * 1_000_000_000 + stamps[..., 1]).astype(np.int64)
        return [CallTime(int(start), int(end - start) * 1e-9) for start, end in ends]

    return run


def _one_by_one(device: DeviceHandle, step: RecordedStep) -> Timer:
    occupy = _occupation(device) if device.name.split(":")[0] == "CUDA" else _nothing
    launches = [_launch(device, step, call) for call in step.calls]

    def run() -> list[CallTime]:
        times = []
        for launch in launches:
            occupy()
            start_ns = time.perf_counter_ns()
            times.append(CallTime(start_ns, launch()))
        device.wait()
        return times

    return run


def _launch(device: DeviceHandle, step: RecordedStep, call: Call) -> Callable[[], float]:
    """A function that runs the call, waits for it, and returns the seconds that the device measured."""
    program = call.target
    if program.op is not Ops.PROGRAM:  # a copy is timed by the host
        copy = GraphReplay(replace(step, calls=(call,)))
        return lambda: _host_seconds(device, copy)
    info, runtime = program.arg, get_runtime(device.name, program)
    buffers = [call.buffers[index].ensure_allocated().get_buf(device.name) for index in info.globals]
    global_size, local_size = info.launch_dims({})
    values = info.vals({})

    def run() -> float:
        seconds = runtime(*buffers, global_size=global_size, local_size=local_size, vals=values, wait=True)
        if seconds is None:
            raise InvariantError(f"device {device.name} reports no time for {info.name}")
        return float(seconds)

    return run


def _host_seconds(device: DeviceHandle, work: Callable[[], None]) -> float:
    device.wait()
    start = time.perf_counter()
    work()
    device.wait()
    return time.perf_counter() - start


def _nothing() -> None:
    """METAL and OpenCL time a kernel from its start to its end, by the device's clock."""


def _occupation(device: DeviceHandle) -> Callable[[], None]:
    """A function that keeps the device busy while the next kernel is launched. CUDA's events measure from the time at
    which the device is free, so on an idle device a kernel's time would include its launch."""
    step = record(lambda: run_kernel(spin_kernel(SPIN_ITERATIONS), [empty(32, device=device.name)], [])[0].realize())
    return GraphReplay(step)


@cached_kernel
def spin_kernel(iterations: int) -> Callable[..., UOp]:
    """fn(out (32,)): a chain of multiplications and additions in each thread, without memory accesses."""

    def kernel(out: UOp) -> UOp:
        body = Body()
        thread = body.threads(32)
        total = body.registers(1)
        total = total.after(total[0].store(1.0))
        turn = body.fold(iterations)
        so_far = total.after(turn)[0]
        total = total.after(total[0].store(so_far * 0.999 + turn.cast(F32) * 1e-9).end(turn))
        return finish(out[thread].store(total[0]).end(thread), "spin")

    return kernel
